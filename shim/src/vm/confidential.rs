//! Guests whose memory the host cannot read: SEV-SNP and TDX, by QEMU. What they need of the host is looked
//! for before anything is taken; what QEMU is told is in `args`, what such a guest will say of itself in
//! [`crate::attest::launch`]. No hardware of the kind was at hand: how far QEMU follows is in docs/vm.md.

use std::{
    arch::x86_64::__cpuid,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use sealpod_attestation::evidence::Tee;

use super::{Accelerator, ImageError, check_bzimage, check_initramfs};

/// CPUID leaf with the place of the C-bit (AMD64 Architecture Programmer's Manual, volume 3, E.4.17).
const ENCRYPTION_LEAF: u32 = 0x8000_001f;
/// Room for QEMU's list of objects; it has some 4 KiB.
const FIRMWARE_MAX: u64 = 64 << 20;

/// How a guest is protected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confidential {
    /// By what.
    pub tee: Tee,
    /// Firmware image: OVMF with places for the kernel's hashes (SNP: the AmdSev build), TDVF.
    pub firmware: PathBuf,
    /// What its owner said to it, which its evidence binds: HOST_DATA, MRCONFIGID.
    pub init_data: Vec<u8>,
    /// Model of its processors, QEMU's name; of SNP guests, whose measurement has it.
    pub cpu: String,
    /// Socket of the service that makes quotes of TDs.
    pub quote_socket: Option<PathBuf>,
}

/// Why there are no confidential guests here.
#[derive(Debug, thiserror::Error)]
pub enum ConfidentialError {
    /// No hardware KVM.
    #[error("{tee} guests need hardware KVM, and this node has none that is real")]
    Kvm {
        /// What was asked for.
        tee: &'static str,
    },
    /// No device of the platform.
    #[error("{tee} guests need {path}, which this node has not")]
    Device {
        /// What was asked for.
        tee: &'static str,
        /// What is missing.
        path: PathBuf,
    },
    /// KVM was not told to.
    #[error("{tee} guests need KVM to have them switched on; {path} says {found:?}")]
    Off {
        /// What was asked for.
        tee: &'static str,
        /// Its parameter.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// This QEMU is too old.
    #[error("{tee} guests need a QEMU with the object {object}, which {qemu} has not")]
    Object {
        /// What was asked for.
        tee: &'static str,
        /// Its object.
        object: &'static str,
        /// The program.
        qemu: PathBuf,
    },
    /// Neither.
    #[error(
        "A confidential guest was asked for; this node's KVM has neither SEV-SNP nor TDX switched on"
    )]
    Neither,
    /// A file of the configuration.
    #[error("Firmware of {tee} guests ({key}): {reason}")]
    Firmware {
        /// What was asked for.
        tee: &'static str,
        /// The configuration's key.
        key: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// Kernel or initramfs.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The built-in VMM.
    #[error("{tee} guests run on QEMU only; hypervisor.driver says vmm")]
    Driver {
        /// What was asked for.
        tee: &'static str,
    },
}

/// As people say it.
#[must_use]
pub fn name(tee: Tee) -> &'static str {
    match tee {
        Tee::Snp => "SEV-SNP",
        Tee::Tdx => "TDX",
    }
}

/// QEMU's object for such guests.
#[must_use]
pub fn object(tee: Tee) -> &'static str {
    match tee {
        Tee::Snp => "sev-snp-guest",
        Tee::Tdx => "tdx-guest",
    }
}

/// Parameter of KVM that has to be on, below the root of sysfs.
fn parameter(tee: Tee) -> &'static str {
    match tee {
        Tee::Snp => "module/kvm_amd/parameters/sev_snp",
        Tee::Tdx => "module/kvm_intel/parameters/tdx",
    }
}

fn switched_on(sys: &Path, tee: Tee) -> Result<(), String> {
    let found = fs::read_to_string(sys.join(parameter(tee))).unwrap_or_default();
    match found.trim() {
        "Y" | "1" => Ok(()),
        other => Err(other.to_owned()),
    }
}

/// What this host's KVM has.
///
/// # Errors
/// [`ConfidentialError::Neither`].
pub fn of_host(sys: &Path) -> Result<Tee, ConfidentialError> {
    let both = [Tee::Snp, Tee::Tdx];
    let found = both.into_iter().find(|t| switched_on(sys, *t).is_ok());
    found.ok_or(ConfidentialError::Neither)
}

/// Whether this host has such guests: KVM, the platform's device, KVM's own switch. `root` is `/`, or what
/// looks like it.
///
/// # Errors
/// What is missing.
pub fn host_has(tee: Tee, accelerator: Accelerator, root: &Path) -> Result<(), ConfidentialError> {
    let (said, sys) = (name(tee), root.join("sys"));
    if accelerator != Accelerator::Kvm {
        return Err(ConfidentialError::Kvm { tee: said });
    }
    let device = root.join("dev/sev");
    if tee == Tee::Snp && !device.exists() {
        return Err(ConfidentialError::Device {
            tee: said,
            path: device,
        });
    }
    switched_on(&sys, tee).map_err(|found| ConfidentialError::Off {
        tee: said,
        path: sys.join(parameter(tee)),
        found,
    })
}

/// Whether this QEMU can start such guests. Blocks: it is asked for its objects.
///
/// # Errors
/// [`ConfidentialError::Object`].
pub fn qemu_has(tee: Tee, qemu: &Path) -> Result<(), ConfidentialError> {
    let asked = Command::new(qemu)
        .args(["-object", "help"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let object = object(tee);
    let listed = asked.is_ok_and(|out| {
        String::from_utf8_lossy(&out.stdout)
            .lines()
            .any(|line| line.trim() == object)
    });
    match listed {
        true => Ok(()),
        false => Err(ConfidentialError::Object {
            tee: name(tee),
            object,
            qemu: qemu.into(),
        }),
    }
}

/// Whether what such a guest is booted from can be: firmware, a kernel that firmware starts, a root.
///
/// # Errors
/// What is wrong, and where.
pub fn check_files(
    confidential: &Confidential,
    kernel: &Path,
    initramfs: &Path,
) -> Result<(), ConfidentialError> {
    let wrong = |reason: String| ConfidentialError::Firmware {
        tee: name(confidential.tee),
        key: "hypervisor.firmware",
        reason,
    };
    let path = &confidential.firmware;
    if path.as_os_str().is_empty() {
        return Err(wrong("none is named".into()));
    }
    let meta = fs::metadata(path).map_err(|e| wrong(format!("{}: {e}", path.display())))?;
    if !meta.is_file() || !(1..=FIRMWARE_MAX).contains(&meta.len()) {
        let bytes = meta.len();
        return Err(wrong(format!(
            "{} has {bytes} bytes, or is no file",
            path.display()
        )));
    }
    check_bzimage(kernel)?;
    check_initramfs(initramfs)?;
    Ok(())
}

/// Where the C-bit is in this processor's page tables, and how many bits of physical address it costs.
#[must_use]
pub(super) fn encryption_bit() -> (u32, u32) {
    let highest = __cpuid(0x8000_0000).eax;
    if highest < ENCRYPTION_LEAF {
        return (0, 0);
    }
    let ebx = __cpuid(ENCRYPTION_LEAF).ebx;
    (ebx & 0x3f, ebx >> 6 & 0x3f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(result: Result<(), ConfidentialError>) -> String {
        result.expect_err("missing").to_string()
    }

    #[test]
    fn what_the_host_lacks_is_named_before_anything_is_taken() {
        let dir = tempfile::tempdir().expect("folder");
        let root = dir.path();
        let kvm = Accelerator::Kvm;
        for tee in [Tee::Snp, Tee::Tdx] {
            assert!(said(host_has(tee, Accelerator::Tcg, root)).contains("hardware KVM"));
        }
        assert!(said(host_has(Tee::Snp, kvm, root)).contains("dev/sev"));
        fs::create_dir(root.join("dev")).expect("folder");
        fs::write(root.join("dev/sev"), "").expect("file");
        assert!(said(host_has(Tee::Snp, kvm, root)).contains("kvm_amd"));
        assert!(said(host_has(Tee::Tdx, kvm, root)).contains("kvm_intel"));
        assert!(of_host(&root.join("sys")).is_err());
        for (tee, value) in [(Tee::Snp, "Y\n"), (Tee::Tdx, "1\n")] {
            let file = root.join("sys").join(parameter(tee));
            fs::create_dir_all(file.parent().expect("folder")).expect("folder");
            fs::write(&file, "N\n").expect("file");
            assert!(said(host_has(tee, kvm, root)).contains("\"N\""));
            fs::write(&file, value).expect("file");
            host_has(tee, kvm, root).expect("there");
        }
        assert_eq!(of_host(&root.join("sys")).expect("SNP"), Tee::Snp);
        assert!(said(qemu_has(Tee::Snp, Path::new("/bin/true"))).contains("sev-snp-guest"));
    }

    #[test]
    fn firmware_and_kernel_have_to_be_such_as_start_a_measured_guest() {
        let dir = tempfile::tempdir().expect("folder");
        let file = |name: &str, content: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, content).expect("file");
            path
        };
        let mut image = vec![0; 0x400];
        image[..2].copy_from_slice(b"MZ");
        image[0x202..0x206].copy_from_slice(b"HdrS");
        let (kernel, root) = (file("bzImage", &image), file("root", b"070701"));
        let mut confidential = Confidential {
            tee: Tee::Snp,
            firmware: PathBuf::new(),
            init_data: Vec::new(),
            cpu: "EPYC-Milan".into(),
            quote_socket: None,
        };
        let e = check_files(&confidential, &kernel, &root);
        assert!(said(e).contains("hypervisor.firmware"));
        confidential.firmware = file("ovmf", b"x");
        check_files(&confidential, &kernel, &root).expect("good");
        // The kernel of other pods, which no firmware starts; and one without an EFI entry.
        let e = check_files(&confidential, &file("elf", b"\x7fELF"), &root);
        assert!(said(e).contains("bzImage"));
        image[0] = 0;
        assert!(check_files(&confidential, &file("no-efi", &image), &root).is_err());
        confidential.firmware = dir.path().into();
        assert!(check_files(&confidential, &kernel, &root).is_err());
    }
}
