//! What is checked of a VM's configuration before anything is taken.

use std::path::{Path, PathBuf};

use super::args::CMDLINE_MAX;
use super::{
    MEMORY_MAX_MIB, MEMORY_MIN_MIB, VCPUS_MAX, VmConfig, VmError, check_initramfs, check_kernel,
    confidential,
};

/// Where programs are looked for, besides `PATH`, when a configuration gives a name only.
const PROGRAM_DIRS: [&str; 3] = ["/usr/local/bin", "/usr/bin", "/usr/libexec"];

/// Refuses what no VM can have, naming the value and what is allowed.
pub(super) fn check(config: &VmConfig, cmdline: &str) -> Result<(), VmError> {
    let refuse = |what, value: &dyn ToString, allowed: String| VmError::Config {
        what,
        value: value.to_string(),
        allowed,
    };
    let memory = config.memory_mib;
    if !(MEMORY_MIN_MIB..=MEMORY_MAX_MIB).contains(&memory) {
        let allowed = format!("a guest needs {MEMORY_MIN_MIB} to {MEMORY_MAX_MIB} MiB");
        return Err(refuse("Guest memory, MiB,", &memory, allowed));
    }
    if !(1..=VCPUS_MAX).contains(&config.vcpus) {
        let allowed = format!("1 to {VCPUS_MAX} are possible");
        return Err(refuse("Number of vCPUs", &config.vcpus, allowed));
    }
    if config.user == 0 {
        let allowed = "the VMM does not run as root".into();
        return Err(refuse("User id", &0, allowed));
    }
    if cmdline.len() > CMDLINE_MAX {
        let allowed = format!("the kernel takes {CMDLINE_MAX} bytes");
        return Err(refuse(
            "Kernel command line of length",
            &cmdline.len(),
            allowed,
        ));
    }
    if let Some(bad) = cmdline.chars().find(|c| c.is_control()) {
        let allowed = "no control characters on the kernel command line".into();
        return Err(refuse("Character", &bad.escape_default(), allowed));
    }
    match &config.confidential {
        Some(guest) => confidential::check_files(guest, &config.kernel, &config.initramfs)?,
        None => {
            check_kernel(&config.kernel)?;
            check_initramfs(&config.initramfs)?;
        }
    }
    Ok(())
}

/// The real path of `program`: absolute, or a name that is searched in `PATH` and the usual folders.
///
/// # Errors
/// [`VmError::Host`] when there is none.
pub fn find_program(program: &Path) -> Result<PathBuf, VmError> {
    let found = if program.is_absolute() {
        program.to_path_buf()
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let dirs = std::env::split_paths(&path).filter(|d| d.is_absolute());
        let mut places = dirs.chain(PROGRAM_DIRS.map(PathBuf::from));
        let plain = program.components().count() == 1;
        let place = places.find(|d| plain && d.join(program).is_file());
        place.unwrap_or_default().join(program)
    };
    found.canonicalize().map_err(|source| VmError::Host {
        action: "find program",
        path: program.into(),
        source,
    })
}
