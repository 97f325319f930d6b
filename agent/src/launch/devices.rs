//! Device nodes and the symbolic links of `/dev`. Runs in the child, before its root is the root.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchownat, symlinkat, unlinkat};

use super::mounts::{self, Kind};
use super::{LaunchError, Step};
use crate::container::plan::{ContainerPlan, DevicePlan};
use crate::sys;

/// Symbolic links of every container's `/dev` (runtime specification, runtime-linux).
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Makes the plan's nodes, and the links where `/dev` is the container's own.
pub(super) fn make(root: BorrowedFd<'_>, plan: &ContainerPlan) -> Result<(), LaunchError> {
    for device in &plan.devices {
        if plan.own_dev || !device.path.starts_with("/dev") {
            node(root, device)?;
        }
    }
    if !plan.own_dev {
        return Ok(());
    }
    let dev = mounts::ensure(root, Path::new("/dev"), Kind::Folder).step(|| "make /dev".into())?;
    for (name, target) in LINKS {
        let mut made = symlinkat(target, &dev, name);
        if name == "ptmx" && made == Err(Errno::EEXIST) {
            // An image's own ptmx would open terminals of another devpts.
            made = unlinkat(&dev, name, UnlinkatFlags::NoRemoveDir)
                .and_then(|()| symlinkat(target, &dev, name));
        }
        if made != Err(Errno::EEXIST) {
            made.step(|| format!("make /dev/{name}"))?;
        }
    }
    Ok(())
}

fn node(root: BorrowedFd<'_>, device: &DevicePlan) -> Result<(), LaunchError> {
    let what = || format!("failed to make device {:?}", device.path);
    let (Some(parent), Some(name)) = (device.path.parent(), device.path.file_name()) else {
        return Err(Errno::EINVAL).step(what);
    };
    let parent = mounts::ensure(root, parent, Kind::Folder).step(what)?;
    let number = makedev(device.major.into(), device.minor.into());
    let mode = Mode::from_bits_truncate(device.mode);
    match mknodat(
        &parent,
        name,
        SFlag::from_bits_truncate(device.kind),
        mode,
        number,
    ) {
        Ok(()) => {}
        Err(Errno::EEXIST) => return Ok(()),
        // No right to make nodes here (a user namespace, a file server without them).
        Err(Errno::EPERM | Errno::EACCES) => return bind(root, device),
        Err(errno) => return Err(errno).step(what),
    }
    fchmodat(&parent, name, mode, FchmodatFlags::FollowSymlink).step(what)?;
    fchownat(
        &parent,
        name,
        Some(Uid::from_raw(device.uid)),
        Some(Gid::from_raw(device.gid)),
        nix::fcntl::AtFlags::AT_SYMLINK_NOFOLLOW,
    )
    .step(what)
}

/// Mounts the guest's own node in place of a new one.
fn bind(root: BorrowedFd<'_>, device: &DevicePlan) -> Result<(), LaunchError> {
    let what = || format!("failed to bind device {:?}", device.path);
    let source = guest_node(device.kind, device.major, device.minor).step(what)?;
    let source = sys::c_string(source.into_os_string().into_encoded_bytes()).step(what)?;
    let copy = sys::open_tree(nix::fcntl::AT_FDCWD, &source, false).step(what)?;
    let target = mounts::ensure(root, &device.path, Kind::File).step(what)?;
    sys::move_mount(copy.as_fd(), target.as_fd()).step(what)
}

/// The node that devtmpfs has for a device number.
fn guest_node(kind: libc::mode_t, major: u32, minor: u32) -> nix::Result<PathBuf> {
    let class = if kind == libc::S_IFBLK {
        "block"
    } else {
        "char"
    };
    let path = format!("/sys/dev/{class}/{major}:{minor}/uevent");
    let uevent = std::fs::read_to_string(path).map_err(|_| Errno::ENODEV)?;
    let name = uevent.lines().find_map(|l| l.strip_prefix("DEVNAME="));
    name.map(|n| Path::new("/dev").join(n)).ok_or(Errno::ENODEV)
}
