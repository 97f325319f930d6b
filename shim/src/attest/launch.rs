//! What a pod's VM starts with, as evidence sees it: the launch measurement, and the init-data that is
//! bound into it. Reads the files that are booted; starts nothing.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::{
    config::{self, Config},
    pod::protect,
    vm::{self, Confidential, Driver as _},
};
use sealpod_attestation::{
    binding::PublicKey,
    crypto::sha384,
    encoding::hex,
    evidence::Tee,
    init_data::{self, InitData},
    measure::{self, CpuType, CpuTypeError, KernelHashes, MeasureError, SnpLaunch},
    reference::ReferenceValues,
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
    /// The model of the processors.
    #[error(transparent)]
    Cpu(#[from] CpuTypeError),
    /// The guest would not be affirmed.
    #[error("The guest's {name} would be {found}, which the policy's reference values do not have")]
    NotExpected {
        /// The register.
        name: &'static str,
        /// What it would be.
        found: String,
    },
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
    /// How its memory is kept from the host. `None`: not at all, and a simulator stands in.
    pub confidential: Option<Confidential>,
}

/// What a confidential guest will say of itself, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Predicted {
    /// MEASUREMENT.
    Snp(String),
    /// MRTD, RTMR1, and what RTMR2 can be: firmware has two ways.
    Tdx {
        /// See above.
        mr_td: String,
        /// See above.
        rtmr1: String,
        /// See above.
        rtmr2: Vec<String>,
    },
}

impl Predicted {
    /// Narrows reference values to this; where they have none, they are this.
    ///
    /// # Errors
    /// [`LaunchError::NotExpected`] where they have others: such a guest would never be affirmed.
    pub fn narrow(&self, references: &mut ReferenceValues) -> Result<(), LaunchError> {
        let list = |name, list: &mut Vec<String>, predicted: &[String]| {
            if list.is_empty() {
                *list = predicted.to_vec();
            } else {
                list.retain(|v| predicted.iter().any(|p| p.eq_ignore_ascii_case(v)));
            }
            match list.is_empty() {
                false => Ok(()),
                true => Err(LaunchError::NotExpected {
                    name,
                    found: predicted.join(" or "),
                }),
            }
        };
        match self {
            Self::Snp(digest) => {
                let known = &mut references.snp.measurement;
                list("MEASUREMENT", known, std::slice::from_ref(digest))
            }
            Self::Tdx {
                mr_td,
                rtmr1,
                rtmr2,
            } => {
                let known = &mut references.tdx;
                list("MRTD", &mut known.mr_td, std::slice::from_ref(mr_td))?;
                list("RTMR1", &mut known.rtmr1, std::slice::from_ref(rtmr1))?;
                list("RTMR2", &mut known.rtmr2, rtmr2)
            }
        }
    }
}

impl Launch {
    /// MEASUREMENT that an SNP guest of these files and settings has, with direct boot and kernel
    /// hashes. For the firmware of guests that are not confidential stands [`measure::stand_in`]: they boot by
    /// PVH without one. Blocks for some 100 ms: 20 MiB are hashed.
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn measurement(&self) -> Result<[u8; 48], LaunchError> {
        let (kernel, initramfs) = (read(&self.kernel)?, read(&self.initramfs)?);
        let (ovmf, cpu) = match &self.confidential {
            Some(guest) => (read(&guest.firmware)?, guest.cpu.parse()?),
            None => (measure::stand_in(), CpuType::Milan),
        };
        let launch = SnpLaunch {
            ovmf: &ovmf,
            kernel: Some(KernelHashes::new(&kernel, Some(&initramfs), &self.cmdline)),
            vcpus: self.vcpus,
            cpu,
            guest_features: FEATURES,
        };
        Ok(measure::snp_launch_digest(&launch)?)
    }

    /// What the guest will say of itself, if it is a confidential one. Blocks like [`Self::measurement`].
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn predicted(&self) -> Result<Option<Predicted>, LaunchError> {
        let Some(guest) = &self.confidential else {
            return Ok(None);
        };
        Ok(Some(match guest.tee {
            Tee::Snp => Predicted::Snp(hex(&self.measurement()?)),
            Tee::Tdx => {
                let (kernel, initramfs) = (read(&self.kernel)?, read(&self.initramfs)?);
                let rtmr2 = measure::rtmr2(&self.cmdline, Some(&initramfs));
                Predicted::Tdx {
                    mr_td: hex(&measure::mr_td(&read(&guest.firmware)?)?),
                    rtmr1: hex(&measure::rtmr1(&kernel)?),
                    rtmr2: rtmr2.iter().map(|r| hex(r)).collect(),
                }
            }
        }))
    }

    /// What a simulated TD of these files and settings says of itself: MRTD, computed as a real one's is, of
    /// [`measure::stand_in_td`]; and the events that make RTMR1 (kernel) and RTMR2 (command line, initial RAM
    /// disk). These are not what firmware would measure: no firmware starts an ELF kernel. The number of vCPUs
    /// is in none of them. Blocks like [`Self::measurement`].
    ///
    /// # Errors
    /// [`LaunchError`].
    pub fn td(&self) -> Result<TdxClaims, LaunchError> {
        let (kernel, initramfs) = (read(&self.kernel)?, read(&self.initramfs)?);
        Ok(TdxClaims {
            mr_td: measure::mr_td(&measure::stand_in_td())?,
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
    let protected = match hypervisor.confidential {
        config::Confidential::None => None,
        config::Confidential::Snp => Some(Tee::Snp),
        config::Confidential::Tdx => Some(Tee::Tdx),
        config::Confidential::Auto => vm::confidential::of_host(Path::new("/sys")).ok(),
    };
    let protected = protected.map(|tee| protect::of_node(config, tee));
    let kernel = match protected {
        Some(_) => &hypervisor.confidential_kernel,
        None => &hypervisor.kernel,
    };
    let vm = vm::VmConfig {
        // A pod's folder, as far as a command line goes.
        dir: state_dir.join("measure"),
        program: PathBuf::new(),
        kernel: kernel.clone(),
        initramfs: hypervisor.initramfs.clone(),
        kernel_params,
        vcpus,
        memory_mib: vm::MEMORY_MIN_MIB,
        share: None,
        nics: Vec::new(),
        passed: Vec::new(),
        cgroup: crate::host_cgroup::Entrance::default(),
        hotplug_ports: if devices { hypervisor.hotplug_ports } else { 0 },
        accelerator: vm::choose_accelerator(wanted, state_dir),
        confidential: protected,
        user: hypervisor.user.get(),
    };
    let kvm = vm.accelerator == vm::Accelerator::Kvm;
    let cmdline = match hypervisor.uses_vmm(kvm, devices || vm.confidential.is_some()) {
        true => vm::Builtin.cmdline(&vm).await,
        false => vm::Qemu.cmdline(&vm).await,
    };
    Launch {
        cmdline,
        kernel: vm.kernel,
        initramfs: vm.initramfs,
        vcpus,
        confidential: vm.confidential,
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
            confidential: None,
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

    #[test]
    fn what_a_confidential_guest_will_say_is_predicted_from_its_firmware_and_has_to_be_expected() {
        let dir = tempfile::tempdir().expect("folder");
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, content).expect("file");
            path
        };
        let guest = Confidential {
            tee: Tee::Snp,
            firmware: file("ovmf", &measure::stand_in()),
            init_data: Vec::new(),
            cpu: "EPYC-Genoa".into(),
            quote_socket: None,
        };
        let mut launch = Launch {
            kernel: file("kernel", b"k"),
            initramfs: file("initramfs", b"i"),
            cmdline: "console=ttyS0".into(),
            vcpus: 1,
            confidential: None,
        };
        assert_eq!(launch.predicted().expect("none"), None);
        let plain = hex(&launch.measurement().expect("stand-in"));
        launch.confidential = Some(guest);
        let predicted = launch
            .predicted()
            .expect("predicted")
            .expect("confidential");
        // Another model of processors than the simulator's.
        assert_ne!(predicted, Predicted::Snp(plain.clone()));
        let Predicted::Snp(digest) = &predicted else {
            panic!("{predicted:?}");
        };
        let mut none = ReferenceValues::default();
        predicted.narrow(&mut none).expect("it alone");
        assert_eq!(none.snp.measurement, std::slice::from_ref(digest));
        let mut both = ReferenceValues::default();
        both.snp.measurement = vec![plain.clone(), digest.to_uppercase()];
        predicted.narrow(&mut both).expect("one of them");
        assert_eq!(both.snp.measurement, [digest.to_uppercase()]);
        let mut other = ReferenceValues::default();
        other.snp.measurement = vec![plain];
        let e = predicted
            .narrow(&mut other)
            .expect_err("another")
            .to_string();
        assert!(
            e.contains("MEASUREMENT would be") && e.contains(digest),
            "{e}"
        );
    }
}
