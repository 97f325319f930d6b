//! The container's root: a private copy of the mounts, the root file system in place, everything of
//! the plan mounted in it, and the old root gone. Runs in the child, in its new mount namespace.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use nix::unistd::fchdir;

use super::{LaunchError, Step, devices, mounts};
use crate::container::plan::ContainerPlan;
use crate::sys;

/// Where the root is put together before it becomes the root: a folder of the agent's, the same for
/// all, since each has a mount namespace of its own.
pub const STAGE: &str = "/run/sealpod/root";

/// Builds the container's mounts and makes its root the root of this process.
pub(super) fn enter(plan: &ContainerPlan) -> Result<(), LaunchError> {
    let all = MsFlags::from_bits_truncate(plan.propagation) | MsFlags::MS_REC;
    change("/", all).step(|| "set propagation of the mounts".into())?;
    let root = place(&plan.rootfs)?;
    for mount in &plan.mounts {
        mounts::add(root.as_fd(), mount)?;
    }
    devices::make(root.as_fd(), plan)?;
    pivot(&root)?;
    if plan.propagation == libc::MS_SHARED {
        change("/", all).step(|| "set propagation of the root".into())?;
    }
    Ok(())
}

/// Puts the root file system on [`STAGE`] and opens it.
fn place(rootfs: &Path) -> Result<OwnedFd, LaunchError> {
    let what = || format!("failed to mount the root file system {rootfs:?}");
    let path = sys::c_string(rootfs.as_os_str().as_bytes()).step(what)?;
    let root = sys::open_tree(AT_FDCWD, &path, true).step(what)?;
    // pivot_root refuses a root whose parent mount is shared.
    change("/run", MsFlags::MS_PRIVATE).step(what)?;
    let stage = open(STAGE, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).step(what)?;
    sys::move_mount(root.as_fd(), stage.as_fd()).step(what)?;
    Ok(root)
}

fn pivot(root: &OwnedFd) -> Result<(), LaunchError> {
    let what = || "failed to make the root file system the root".to_owned();
    let folder = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let old = open("/", folder, Mode::empty()).step(what)?;
    fchdir(root).step(what)?;
    sys::pivot_root_here().step(what)?;
    // The old root now lies on the new one. Its unmounting must not reach the agent.
    fchdir(&old).step(what)?;
    change(".", MsFlags::MS_SLAVE | MsFlags::MS_REC).step(what)?;
    umount2(".", MntFlags::MNT_DETACH).step(what)?;
    nix::unistd::chdir("/").step(what)
}

fn change(path: &str, flags: MsFlags) -> nix::Result<()> {
    mount(None::<&str>, path, None::<&str>, flags, None::<&str>)
}
