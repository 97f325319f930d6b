//! No paths: a Landlock domain without a single rule (Linux' `Documentation/userspace-api/landlock.rst`).
//! What is open stays usable. An older kernel takes away less; what each takes is in the table below.

use std::io;

use super::Error;

/// `struct landlock_ruleset_attr`; a kernel that knows only the beginning takes zeros after it.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}
const _: () = assert!(size_of::<Ruleset>() == 24);

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const VERSION: libc::c_uint = 1;

/// What can be denied since which version of the interface.
fn everything(version: i64) -> Ruleset {
    let files = match version {
        ..=1 => 13,  // to execute, read, write, list, remove and make
        2 => 14,     // to link and rename between folders
        3 | 4 => 15, // to truncate
        _ => 16,     // ioctls of devices
    };
    Ruleset {
        files: (1 << files) - 1,
        // To bind and connect TCP.
        network: if version >= 4 { 0b11 } else { 0 },
        // To reach abstract sockets and to signal others.
        scoped: if version >= 6 { 0b11 } else { 0 },
    }
}

/// Denies the calling thread and those that it starts from now on every path. Without effect where the
/// kernel has no Landlock.
pub(super) fn deny_paths() -> Result<(), Error> {
    // SAFETY: asks for the version; no pointer is passed.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, VERSION) };
    if version < 0 {
        let source = io::Error::last_os_error();
        return match source.raw_os_error() {
            // Not built in, or not switched on.
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Ok(()),
            _ => Err(Error::Refused {
                what: "ask for Landlock",
                source,
            }),
        };
    }
    let rules = everything(version);
    // SAFETY: `rules` outlives the call, its size is told; the kernel only reads it.
    let ruleset = unsafe {
        let size = size_of_val(&rules);
        libc::syscall(libc::SYS_landlock_create_ruleset, &raw const rules, size, 0)
    };
    let Ok(ruleset) = libc::c_int::try_from(ruleset) else {
        return Err(Error::last("make Landlock rules"));
    };
    if ruleset < 0 {
        return Err(Error::last("make Landlock rules"));
    }
    // SAFETY: no pointers are passed; the descriptor was just made and is closed once.
    let denied = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(libc::SYS_landlock_restrict_self, ruleset, 0) == 0
    };
    let result = match denied {
        true => Ok(()),
        false => Err(Error::last("deny paths by Landlock")),
    };
    // SAFETY: as above.
    unsafe { libc::close(ruleset) };
    result
}
