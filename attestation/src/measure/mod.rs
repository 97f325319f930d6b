//! Launch measurement, predicted: what a guest's MEASUREMENT (MRTD and RTMRs of a TD) will be, from the
//! files and settings that it starts with. Compare: SEV-SNP firmware ABI specification, SNP_LAUNCH_UPDATE; QEMU
//! `target/i386/sev.c`; OVMF's AmdSev package.

mod hashes;
mod ovmf;
mod pe;
mod tdx;
mod vmsa;

pub use hashes::KernelHashes;
pub use ovmf::{MAX_IMAGE, Ovmf, OvmfError, Section, SectionKind, stand_in, stand_in_td};
pub use tdx::{mr_td, rtmr1, rtmr1_of, rtmr2};
pub use vmsa::{CpuType, CpuTypeError, MAX_VCPUS};

use crate::crypto::sha384;

const PAGE: usize = 4096;
/// Where the firmware says the save areas of the vCPUs lie when it measures them.
const VMSA_GPA: u64 = 0xffff_ffff_f000;

/// Page types of SNP_LAUNCH_UPDATE.
#[derive(Clone, Copy)]
#[repr(u8)]
enum PageType {
    Normal = 1,
    Vmsa = 2,
    Zero = 3,
    Secrets = 5,
    Cpuid = 6,
}

/// What an SNP guest starts with.
#[derive(Clone, Copy, Debug)]
pub struct SnpLaunch<'a> {
    /// The firmware image.
    pub ovmf: &'a [u8],
    /// Kernel, initial RAM disk and command line whose hashes the firmware checks (QEMU's
    /// `kernel-hashes=on`); `None` without direct boot.
    pub kernel: Option<KernelHashes>,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Model of the vCPUs.
    pub cpu: CpuType,
    /// SEV_FEATURES of the vCPUs; bit 0 is SNP itself.
    pub guest_features: u64,
}

/// Why a measurement cannot be predicted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MeasureError {
    /// The firmware cannot be read.
    #[error("Firmware image")]
    Ovmf(#[from] OvmfError),
    /// No vCPU, or more than any machine has.
    #[error("{0} vCPUs; 1 to {MAX_VCPUS} are allowed")]
    Vcpus(u32),
    /// The firmware does not check kernel hashes.
    #[error("Firmware has no place for kernel hashes; the AmdSev build of OVMF has one")]
    NoHashes,
    /// No EFI stub.
    #[error("Kernel is no PE image, so firmware cannot start it")]
    Kernel,
    /// SNP is off in the features.
    #[error("Guest features 0x{0:x} do not have SNP (bit 0)")]
    Features(u64),
}

/// The launch digest while pages are added.
struct Digest([u8; 48]);

impl Digest {
    fn page(&mut self, kind: PageType, gpa: u64, contents: [u8; 48]) {
        const PAGE_INFO: usize = 0x70;
        let mut info = [0; PAGE_INFO];
        info[..48].copy_from_slice(&self.0);
        info[48..96].copy_from_slice(&contents);
        info[96..98].copy_from_slice(&(PAGE_INFO as u16).to_le_bytes());
        info[98] = kind as u8;
        info[104..112].copy_from_slice(&gpa.to_le_bytes());
        self.0 = sha384(&info);
    }

    fn data(&mut self, gpa: u64, data: &[u8]) {
        for (page, at) in data.chunks(PAGE).zip((gpa..).step_by(PAGE)) {
            self.page(PageType::Normal, at, sha384(page));
        }
    }

    fn zeros(&mut self, gpa: u64, size: u64) {
        for at in (gpa..gpa + size).step_by(PAGE) {
            self.page(PageType::Zero, at, [0; 48]);
        }
    }
}

/// MEASUREMENT of an SNP guest.
///
/// # Errors
/// When the firmware or the settings are not such that a guest could start with them.
pub fn snp_launch_digest(launch: &SnpLaunch<'_>) -> Result<[u8; 48], MeasureError> {
    if launch.vcpus == 0 || launch.vcpus > MAX_VCPUS {
        return Err(MeasureError::Vcpus(launch.vcpus));
    }
    if launch.guest_features & 1 == 0 {
        return Err(MeasureError::Features(launch.guest_features));
    }
    let ovmf = Ovmf::parse(launch.ovmf)?;
    let mut digest = Digest([0; 48]);
    digest.data(ovmf.gpa, launch.ovmf);
    let mut hashes_placed = false;
    for section in &ovmf.sections {
        let (gpa, size) = (u64::from(section.gpa), u64::from(section.size));
        match (section.kind, &launch.kernel) {
            (SectionKind::SecMemory | SectionKind::SvsmCaa, _)
            | (SectionKind::KernelHashes, None) => digest.zeros(gpa, size),
            (SectionKind::Secrets, _) => digest.page(PageType::Secrets, gpa, [0; 48]),
            (SectionKind::Cpuid, _) => digest.page(PageType::Cpuid, gpa, [0; 48]),
            (SectionKind::KernelHashes, Some(kernel)) => {
                let table = ovmf.hash_table.ok_or(MeasureError::NoHashes)?;
                digest.data(
                    gpa,
                    &kernel
                        .page(table as usize % PAGE)
                        .ok_or(MeasureError::NoHashes)?,
                );
                hashes_placed = true;
            }
        }
    }
    if launch.kernel.is_some() && !hashes_placed {
        return Err(MeasureError::NoHashes);
    }
    for cpu in 0..launch.vcpus {
        let start = if cpu == 0 {
            vmsa::RESET_VECTOR
        } else {
            ovmf.reset_eip
        };
        let page = vmsa::page(start, launch.cpu, launch.guest_features);
        digest.page(PageType::Vmsa, VMSA_GPA, sha384(&page));
    }
    Ok(digest.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::encoding::hex;

    fn launch(ovmf: &[u8]) -> SnpLaunch<'_> {
        let kernel = KernelHashes::new(b"a kernel", Some(b"an initrd"), "console=ttyS0");
        SnpLaunch {
            ovmf,
            kernel: Some(kernel),
            vcpus: 2,
            cpu: CpuType::Milan,
            guest_features: 1,
        }
    }

    #[test]
    fn every_input_changes_the_digest() {
        let image = stand_in();
        let base = launch(&image);
        let mut other_image = image.clone();
        other_image[0] ^= 1;
        let kernel = |k: &[u8], i: Option<&[u8]>, c: &str| Some(KernelHashes::new(k, i, c));
        let variants = [
            base,
            SnpLaunch {
                ovmf: &other_image,
                ..base
            },
            SnpLaunch { vcpus: 1, ..base },
            SnpLaunch {
                cpu: CpuType::Genoa,
                ..base
            },
            SnpLaunch {
                guest_features: 0x21,
                ..base
            },
            SnpLaunch {
                kernel: kernel(b"b kernel", Some(b"an initrd"), "console=ttyS0"),
                ..base
            },
            SnpLaunch {
                kernel: kernel(b"a kernel", None, "console=ttyS0"),
                ..base
            },
            SnpLaunch {
                kernel: kernel(b"a kernel", Some(b"an initrd"), ""),
                ..base
            },
            SnpLaunch {
                kernel: None,
                ..base
            },
        ];
        let mut digests: Vec<String> = variants
            .iter()
            .map(|v| hex(&snp_launch_digest(v).unwrap()))
            .collect();
        digests.sort();
        digests.dedup();
        assert_eq!(digests.len(), variants.len());
    }

    #[test]
    fn impossible_settings_are_refused() {
        let image = stand_in();
        let base = launch(&image);
        assert_eq!(
            snp_launch_digest(&SnpLaunch { vcpus: 0, ..base }),
            Err(MeasureError::Vcpus(0))
        );
        assert_eq!(
            snp_launch_digest(&SnpLaunch {
                guest_features: 0,
                ..base
            }),
            Err(MeasureError::Features(0))
        );
        assert!(matches!(
            snp_launch_digest(&SnpLaunch {
                ovmf: &image[1..],
                ..base
            }),
            Err(MeasureError::Ovmf(_))
        ));
    }
}
