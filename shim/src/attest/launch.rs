//! What a pod's VM starts with, as evidence sees it: the launch measurement, and the init-data that is
//! bound into it. Reads the files that are booted; starts nothing.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    config::{self, Config},
    vm::{self, Driver as _},
};
use sealpod_attestation::{
    binding::PublicKey,
    crypto::sha384,
    init_data::{self, InitData},
    measure::{self, CpuType, KernelHashes, MeasureError, SnpLaunch},
    simulate::TdxClaims,
};

/// SEV_FEATURES of the vCPUs: SNP and nothing else.
const FEATURES: u64 = 1;
/// RTMR1 and RTMR2 as event logs number them (UEFI 2.10, 38.4.1).
const RTMR1: u32 = 2;
const RTMR2: u32 = 3;

/// A measurement that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A file that is booted.
    #[error("Cannot read {path} to measure it")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The settings.
    #[error(transparent)]
    Measure(#[from] MeasureError),
}

/// What a VM starts with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// The guest's root.
    pub initramfs: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// Virtual CPUs.
    pub vcpus: u32,
}

impl Launch {
    /// MEASUREMENT that an SNP guest of these files and settings has, with direct boot and kernel
    /// hashes. For OVMF stands [`measure::stand_in`]: pods boot by PVH without it. Blocks for some
    /// 100 ms: 20 MiB are hashed.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn measurement(&self) -> Result<[u8; 48], LaunchError> {
        let (kernel, initramfs) = (read(&self.kernel)?, read(&self.initramfs)?);
        let launch = SnpLaunch {
            ovmf: &measure::stand_in(),
            kernel: Some(KernelHashes::new(&kernel, Some(&initramfs), &self.cmdline)),
            vcpus: self.vcpus,
            cpu: CpuType::Milan,
            guest_features: FEATURES,
        };
        Ok(measure::snp_launch_digest(&launch)?)
    }

    /// What a simulated TD of these files and settings says of itself: MRTD, for which stands the digest
    /// of [`measure::stand_in`], and the events that make RTMR1 (kernel) and RTMR2 (command line, initial
    /// RAM disk). The number of vCPUs is in none of them. Blocks like [`Self::measurement`].
    ///
    /// # Errors
    /// [`LaunchError::Read`].
    pub fn td(&self) -> Result<TdxClaims, LaunchError> {
        let (kernel, initramfs) = (read(&self.kernel)?, read(&self.initramfs)?);
        Ok(TdxClaims {
            mr_td: sha384(&measure::stand_in()),
            events: vec![
                (RTMR1, sha384(&kernel).to_vec()),
                (RTMR2, self.cmdline.clone().into_bytes()),
                (RTMR2, sha384(&initramfs).to_vec()),
            ],
            ..TdxClaims::default()
        })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, LaunchError> {
    std::fs::read(path).map_err(|source| LaunchError::Read {
        path: path.to_owned(),
        source,
    })
}

/// What a pod of this node starts with: with so many vCPUs, more words for its kernel, and devices or none
/// (which says whose VM it is, and a VM that takes none has no ports for them).
pub async fn of_node(config: &Config, vcpus: u32, params: &[String], devices: bool) -> Launch {
    let hypervisor = &config.hypervisor;
    let wanted = match hypervisor.accelerator {
        config::Accelerator::Auto => None,
        config::Accelerator::Kvm => Some(vm::Accelerator::Kvm),
        config::Accelerator::Tcg => Some(vm::Accelerator::Tcg),
    };
    let state_dir = &config.runtime.state_dir;
    let mut kernel_params = hypervisor.kernel_params.clone();
    kernel_params.extend_from_slice(params);
    let vm = vm::VmConfig {
        // A pod's folder, as far as a command line goes.
        dir: state_dir.join("measure"),
        program: PathBuf::new(),
        kernel: hypervisor.kernel.clone(),
        initramfs: hypervisor.initramfs.clone(),
        kernel_params,
        vcpus,
        memory_mib: vm::MEMORY_MIN_MIB,
        share: None,
        nics: Vec::new(),
        netns: None,
        cgroup: Vec::new(),
        hotplug_ports: if devices { hypervisor.hotplug_ports } else { 0 },
        accelerator: vm::choose_accelerator(wanted, state_dir),
        user: hypervisor.user.get(),
    };
    let kvm = vm.accelerator == vm::Accelerator::Kvm;
    let cmdline = match hypervisor.uses_vmm(kvm, devices) {
        true => vm::Builtin.cmdline(&vm).await,
        false => vm::Qemu.cmdline(&vm).await,
    };
    Launch {
        cmdline,
        kernel: vm.kernel,
        initramfs: vm.initramfs,
        vcpus,
    }
}

/// Init-data of a pod that brings none: it believes this node's verifier, and what that one's anchors
/// are.
pub(super) fn default_init_data(verifier: &PublicKey, audience: &str, simulated: bool) -> Vec<u8> {
    let mut init = InitData::default();
    let anchors = if simulated { "simulated" } else { "production" };
    // A key is always JSON.
    let key = serde_json::to_string(verifier).unwrap_or_default();
    for (name, value) in [
        (init_data::VERIFIER, key),
        (init_data::AUDIENCE, audience.to_owned()),
        (init_data::ANCHORS, anchors.to_owned()),
    ] {
        init.data.insert(name.into(), value);
    }
    init.to_text().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_booted_changes_the_measurement() {
        let dir = tempfile::tempdir().expect("folder");
        let file = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).expect("file");
            path
        };
        let launch = Launch {
            kernel: file("kernel", "k"),
            initramfs: file("initramfs", "i"),
            cmdline: "console=ttyS0".into(),
            vcpus: 1,
        };
        let mut others = vec![launch.clone(); 5];
        others[1].kernel = file("other", "x");
        others[2].initramfs = file("other", "x");
        others[3].cmdline.push_str(" quiet");
        others[4].vcpus = 2;
        let mut all: Vec<_> = others
            .iter()
            .map(|l| l.measurement().expect("measurement"))
            .collect();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), others.len());
        // A TD's does not have the vCPUs.
        let td = |l: &Launch| l.td().expect("claims").registers();
        let mut all: Vec<_> = others.iter().map(td).collect();
        assert_eq!(all.pop(), Some(all[0]));
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), others.len() - 1);
        others[0].kernel = dir.path().join("missing");
        let e = others[0].measurement().expect_err("missing").to_string();
        assert!(e.contains("missing"), "{e}");
    }
}
