//! `measure`: predicts the launch measurement of a guest and writes it as reference values.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use sealpod_attestation::encoding;
use sealpod_attestation::measure::{CpuType, KernelHashes, SnpLaunch, snp_launch_digest};
use sealpod_attestation::reference::ReferenceValues;

use crate::{Done, input, output};

/// Kernels and initial RAM disks are larger than evidence, and the user's own.
const MAX_BOOT_FILE: u64 = 1 << 30;

#[derive(Args)]
pub(crate) struct MeasureArgs {
    /// Firmware: an OVMF image with SEV-SNP metadata
    #[arg(long)]
    ovmf: PathBuf,
    /// Kernel that is booted directly, with its hash in the measurement
    #[arg(long)]
    kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(
        long,
        requires = "kernel",
        default_value = "",
        hide_default_value = true
    )]
    append: String,
    /// Number of vCPUs
    #[arg(long, default_value_t = 1)]
    vcpus: u32,
    /// vCPU model as QEMU names it
    #[arg(long, default_value = "EPYC-Milan")]
    vcpu_type: CpuType,
    /// SEV_FEATURES of the vCPUs, hexadecimal; QEMU sets 1
    #[arg(long, default_value = "0x1", value_parser = features)]
    guest_features: u64,
    /// Write the measurement as reference values for `verify`
    #[arg(long)]
    output: Option<PathBuf>,
}

fn features(text: &str) -> Result<u64, std::num::ParseIntError> {
    u64::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16)
}

pub(crate) fn run(args: &MeasureArgs) -> anyhow::Result<Done> {
    let read = |path: &PathBuf| input::read_up_to(path, MAX_BOOT_FILE);
    let ovmf = read(&args.ovmf)?;
    let initrd = args.initrd.as_ref().map(read).transpose()?;
    let kernel = match &args.kernel {
        Some(path) => Some(KernelHashes::new(
            &read(path)?,
            initrd.as_deref(),
            &args.append,
        )),
        None => None,
    };
    let launch = SnpLaunch {
        ovmf: &ovmf,
        kernel,
        vcpus: args.vcpus,
        cpu: args.vcpu_type,
        guest_features: args.guest_features,
    };
    let digest = snp_launch_digest(&launch)
        .with_context(|| format!("Cannot measure {}", args.ovmf.display()))?;
    output::print(&(encoding::hex(&digest) + "\n"))?;
    if let Some(path) = &args.output {
        let mut references = ReferenceValues::default();
        references.snp.measurement.push(encoding::hex(&digest));
        std::fs::write(path, serde_json::to_string_pretty(&references)?)
            .with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(Done::Accepted)
}
