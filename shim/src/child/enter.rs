//! How a child enters its jail, between clone and exec: as in `exec`, system calls only.

#![expect(
    unsafe_code,
    reason = "the code between clone and exec is system calls only"
)]

use std::ffi::{CStr, c_int, c_ulong};
use std::ptr::null;

use super::exec::{Failed, Stage, check};
use super::jail::Step;

/// Mounts `source` (or nothing) on `target`.
///
/// # Safety
/// Only in a process just cloned with a mount namespace of its own: it changes what the caller sees.
unsafe fn mount(
    source: Option<&CStr>,
    target: &CStr,
    kind: Option<&CStr>,
    flags: c_ulong,
    data: Option<&CStr>,
) -> c_int {
    let pointer = |text: Option<&CStr>| text.map_or(null(), CStr::as_ptr);
    // SAFETY: the texts end with NUL and outlive the call.
    unsafe {
        libc::mount(
            pointer(source),
            target.as_ptr(),
            pointer(kind),
            flags,
            pointer(data).cast(),
        )
    }
}

/// Builds the root `root` from `steps` and makes it this process's only one.
///
/// # Safety
/// Only in a process just cloned with a mount namespace of its own.
pub(super) unsafe fn enter_jail(
    root: &CStr,
    steps: &[Step],
    user: Option<(u32, u32)>,
) -> Result<(), Failed> {
    // Room for the mount points of a jail, no more.
    let options = c"mode=0755,size=64k,nr_inodes=128";
    let quiet = libc::MS_NOSUID | libc::MS_NOEXEC;
    let slave = libc::MS_REC | libc::MS_SLAVE;
    // SAFETY: system calls in a mount namespace of this process alone.
    unsafe {
        // Mounts that the shim makes later still arrive; none made here leaves.
        check(mount(None, c"/", None, slave, None), Stage::Root, 0)?;
        let tmpfs = Some(c"tmpfs");
        check(
            mount(tmpfs, root, tmpfs, quiet, Some(options)),
            Stage::Root,
            0,
        )?;
        check(libc::chdir(root.as_ptr()), Stage::Root, 0)?;
        for (index, step) in steps.iter().enumerate() {
            take(step, index, user)?;
        }
        let here = c".".as_ptr();
        check(
            libc::syscall(libc::SYS_pivot_root, here, here),
            Stage::Pivot,
            0,
        )?;
        check(libc::umount2(here, libc::MNT_DETACH), Stage::Pivot, 1)?;
        check(libc::chdir(c"/".as_ptr()), Stage::Pivot, 2)?;
        let sealed = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_RDONLY | quiet;
        check(mount(None, c"/", None, sealed, None), Stage::Pivot, 3)
    }
}

/// Takes one step of the jail.
///
/// # Safety
/// As [`enter_jail`].
unsafe fn take(step: &Step, index: usize, user: Option<(u32, u32)>) -> Result<(), Failed> {
    let there = || std::io::Error::last_os_error().raw_os_error() == Some(libc::EEXIST);
    // SAFETY: system calls on texts of the step, in a mount namespace of this process alone.
    unsafe {
        match step {
            Step::Dir(at) => {
                let made = libc::mkdir(at.as_ptr(), 0o755);
                if made == -1 && there() {
                    return Ok(());
                }
                check(made, Stage::Jail, index)
            }
            Step::File(at) => {
                let fd = libc::open(at.as_ptr(), libc::O_CREAT | libc::O_CLOEXEC, 0o444);
                check(fd, Stage::Jail, index)?;
                check(libc::close(fd), Stage::Jail, index)
            }
            Step::Bind {
                source,
                target,
                recursive,
                readonly,
            } => {
                let all = if *recursive { libc::MS_REC } else { 0 };
                let bound = mount(Some(source), target, None, libc::MS_BIND | all, None);
                check(bound, Stage::Jail, index)?;
                let mut flags = libc::MS_REMOUNT | libc::MS_BIND | libc::MS_NOSUID | libc::MS_NODEV;
                if *readonly {
                    flags |= libc::MS_RDONLY;
                }
                check(mount(None, target, None, flags, None), Stage::Jail, index)
            }
            Step::Device {
                target,
                major,
                minor,
            } => {
                let device = libc::makedev(*major, *minor);
                let made = libc::mknod(target.as_ptr(), libc::S_IFCHR | 0o600, device);
                check(made, Stage::Jail, index)?;
                let (uid, gid) = user.unwrap_or((0, 0));
                check(libc::chown(target.as_ptr(), uid, gid), Stage::Jail, index)
            }
            Step::Proc(at) => {
                // Read-only: root needs no capability to write to many a sysctl.
                let flags = libc::MS_NOSUID | libc::MS_NOEXEC | libc::MS_NODEV | libc::MS_RDONLY;
                let proc = Some(c"proc");
                let mounted = mount(proc, at, proc, flags, None);
                check(mounted, Stage::Jail, index)
            }
        }
    }
}
