//! `measure`: predicts the launch measurement of a guest and writes it as reference values.
//! SEV-SNP, or with `--tdx` what of a TD can be predicted.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use sealpod_attestation::encoding;
use sealpod_attestation::measure::{self, CpuType, KernelHashes, SnpLaunch, snp_launch_digest};
use sealpod_attestation::reference::ReferenceValues;

use crate::{Done, input, output};

/// Kernels and initial RAM disks are larger than evidence, and the user's own.
const MAX_BOOT_FILE: u64 = 1 << 30;

#[derive(Args)]
pub(crate) struct MeasureArgs {
    /// Measure a TD: MRTD, and with a kernel RTMR1 and RTMR2
    #[arg(long)]
    tdx: bool,
    /// Firmware: an OVMF image with SEV-SNP or TDX metadata
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
    #[arg(long, default_value_t = 1, conflicts_with = "tdx")]
    vcpus: u32,
    /// vCPU model as QEMU names it
    #[arg(long, default_value = "EPYC-Milan", conflicts_with = "tdx")]
    vcpu_type: CpuType,
    /// SEV_FEATURES of the vCPUs, hexadecimal; QEMU sets 1
    #[arg(long, default_value = "0x1", value_parser = features, conflicts_with = "tdx")]
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
    let firmware = input::read_up_to(&args.ovmf, measure::MAX_IMAGE as u64)?;
    let initrd = args.initrd.as_ref().map(read).transpose()?;
    let kernel = args.kernel.as_ref().map(read).transpose()?;
    let (kernel, initrd) = (kernel.as_deref(), initrd.as_deref());
    let references = if args.tdx {
        tdx(args, &firmware, kernel, initrd)
    } else {
        snp(args, &firmware, kernel, initrd)
    };
    let references =
        references.with_context(|| format!("Cannot measure {}", args.ovmf.display()))?;
    if let Some(path) = &args.output {
        std::fs::write(path, serde_json::to_string_pretty(&references)?)
            .with_context(|| format!("Cannot write {}", path.display()))?;
    }
    Ok(Done::Accepted)
}

fn snp(
    args: &MeasureArgs,
    ovmf: &[u8],
    kernel: Option<&[u8]>,
    initrd: Option<&[u8]>,
) -> anyhow::Result<ReferenceValues> {
    let launch = SnpLaunch {
        ovmf,
        kernel: kernel.map(|k| KernelHashes::new(k, initrd, &args.append)),
        vcpus: args.vcpus,
        cpu: args.vcpu_type,
        guest_features: args.guest_features,
    };
    let digest = encoding::hex(&snp_launch_digest(&launch)?);
    output::print(&format!("{digest}\n"))?;
    let mut references = ReferenceValues::default();
    references.snp.measurement.push(digest);
    Ok(references)
}

fn tdx(
    args: &MeasureArgs,
    firmware: &[u8],
    kernel: Option<&[u8]>,
    initrd: Option<&[u8]>,
) -> anyhow::Result<ReferenceValues> {
    let mut references = ReferenceValues::default();
    let reference = &mut references.tdx;
    reference
        .mr_td
        .push(encoding::hex(&measure::mr_td(firmware)?));
    if let Some(kernel) = kernel {
        reference
            .rtmr1
            .push(encoding::hex(&measure::rtmr1(kernel)?));
        let values = measure::rtmr2(&args.append, initrd);
        reference
            .rtmr2
            .extend(values.iter().map(|v| encoding::hex(v)));
    }
    for (name, values) in [
        ("mr_td", &reference.mr_td),
        ("rtmr1", &reference.rtmr1),
        ("rtmr2", &reference.rtmr2),
    ] {
        for value in values {
            output::print(&format!("{name} {value}\n"))?;
        }
    }
    Ok(references)
}
