//! The mounts of a container. Every one is made detached, given its attributes, and only then put in
//! place, on a target that was opened inside the container's root: a symbolic link in an image cannot
//! lead a mount out of it.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, openat};
use nix::sys::stat::{Mode, mkdirat};

use sealpod_protocol::MEMORY_DIR;

use super::{LaunchError, Step, describe};
use crate::container::plan::{ContainerPlan, MountKind, MountPlan};
use crate::sys::{self, MountAttr};

/// linux/mount.h
const MOUNT_ATTR_RDONLY: u64 = 1;

/// What to make where a mount's target does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Folder,
    File,
}

/// Opens `path` inside `root` (O_PATH), symbolic links being followed inside it only.
pub(crate) fn open_inside(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    let path = sys::c_string(path.as_os_str().as_bytes())?;
    let resolve = libc::RESOLVE_IN_ROOT | libc::RESOLVE_NO_MAGICLINKS;
    sys::openat2(root, &path, libc::O_PATH | libc::O_CLOEXEC, resolve)
}

/// Opens the folder `path` inside `root`, making it where it does not exist.
pub(crate) fn ensure_folder(root: BorrowedFd<'_>, path: &Path) -> nix::Result<OwnedFd> {
    ensure(root, path, Kind::Folder)
}

/// Opens what a bind mount shows. Containers write in volumes in memory: there, no link leads out.
fn open_source(source: &Path) -> nix::Result<OwnedFd> {
    let within = source.strip_prefix(MEMORY_DIR).ok();
    let within = within.and_then(|rest| Some((rest, rest.components().next()?)));
    let Some((rest, volume)) = within else {
        return open_path(source);
    };
    let root = open_path(&Path::new(MEMORY_DIR).join(volume))?;
    match rest.strip_prefix(volume) {
        Ok(part) if !part.as_os_str().is_empty() => {
            open_inside(root.as_fd(), &Path::new("/").join(part))
        }
        _ => Ok(root),
    }
}

/// Opens `path` inside `root`, making it and the folders above it where they do not exist.
pub(super) fn ensure(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> nix::Result<OwnedFd> {
    match open_inside(root, path) {
        Err(Errno::ENOENT) => {}
        other => return other,
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::ENOENT);
    };
    let parent = ensure(root, parent, Kind::Folder)?;
    let made = match kind {
        Kind::Folder => mkdirat(&parent, name, Mode::from_bits_truncate(0o755)),
        Kind::File => {
            let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            openat(&parent, name, flags, Mode::from_bits_truncate(0o644)).map(drop)
        }
    };
    // Whoever made it in between, it is opened inside the root below.
    if !matches!(made, Ok(()) | Err(Errno::EEXIST)) {
        made?;
    }
    open_inside(root, path)
}

/// Makes one mount inside `root`.
pub(super) fn add(root: BorrowedFd<'_>, plan: &MountPlan) -> Result<(), LaunchError> {
    let destination = plan.destination.display();
    let (mount, kind) = match &plan.kind {
        MountKind::Bind { source, recursive } => {
            let what = || format!("failed to mount {source:?} to {destination}");
            let source = open_source(source).step(what)?;
            let kind = match is_folder(&source).step(what)? {
                true => Kind::Folder,
                false => Kind::File,
            };
            (
                sys::open_tree(source.as_fd(), c"", *recursive).step(what)?,
                kind,
            )
        }
        MountKind::New {
            fs,
            source,
            options,
        } => (
            new(fs, source, options)
                .map_err(|e| LaunchError::text(format!("failed to mount {destination}: {e}")))?,
            Kind::Folder,
        ),
    };
    let what = || format!("failed to set attributes of mount {destination}");
    set(&mount, false, plan.set, plan.clear, 0).step(what)?;
    set(&mount, true, plan.set_recursive, plan.clear_recursive, 0).step(what)?;
    let target = ensure(root, &plan.destination, kind)
        .step(|| format!("failed to make mount target {destination}"))?;
    sys::move_mount(mount.as_fd(), target.as_fd())
        .step(|| format!("failed to mount on {destination}"))?;
    for (propagation, recursive) in &plan.propagation {
        set(&mount, *recursive, 0, 0, *propagation).step(what)?;
    }
    Ok(())
}

fn set(
    mount: &OwnedFd,
    recursive: bool,
    set: u64,
    clear: u64,
    propagation: u64,
) -> nix::Result<()> {
    if (set, clear, propagation) == (0, 0, 0) {
        return Ok(());
    }
    let attr = MountAttr {
        set,
        clear,
        propagation,
        userns: 0,
    };
    sys::mount_setattr(mount.as_fd(), recursive, &attr)
}

/// A detached mount of a new file system.
fn new(
    fs: &CString,
    source: &Option<CString>,
    options: &[(CString, Option<CString>)],
) -> Result<OwnedFd, LaunchError> {
    let name = fs.to_string_lossy();
    let context = match sys::fsopen(fs) {
        Err(Errno::EPERM) if fs.as_c_str() == c"sysfs" => return guests_sysfs(),
        opened => opened.step(|| format!("file system {name}"))?,
    };
    if let Some(source) = source {
        sys::fsconfig_set(context.as_fd(), c"source", Some(source))
            .step(|| format!("{name} source {source:?}"))?;
    }
    for (key, value) in options {
        sys::fsconfig_set(context.as_fd(), key, value.as_deref()).step(|| {
            let value = value.as_ref().map(|v| v.to_string_lossy());
            format!("{name} option {:?} = {value:?}", key.to_string_lossy())
        })?;
    }
    match sys::fsmount(context.as_fd(), 0) {
        Ok(mount) => Ok(mount),
        Err(Errno::EPERM) if fs.as_c_str() == c"sysfs" => guests_sysfs(),
        Err(errno) => Err(LaunchError::text(format!(
            "{name}: {}{}",
            describe(errno),
            complaint(&context)
        ))),
    }
}

/// In a user namespace sysfs cannot be made anew without a network namespace of its own; the guest's shows
/// the same devices.
fn guests_sysfs() -> Result<OwnedFd, LaunchError> {
    sys::open_tree(AT_FDCWD, c"/sys", true).step(|| "copy /sys".into())
}

/// What the file system itself says of the failure (fsopen(2), retrieving diagnostics).
fn complaint(context: &OwnedFd) -> String {
    let mut text = [0; 256];
    match nix::unistd::read(context, &mut text) {
        Ok(length) if length > 2 => format!(
            " ({})",
            String::from_utf8_lossy(&text[2..length]).trim_end()
        ),
        _ => String::new(),
    }
}

/// Makes the root read-only where the plan says so, and the plan's paths read-only or masked. Runs
/// inside the container's root.
pub(super) fn protect(plan: &ContainerPlan) -> Result<(), LaunchError> {
    for path in &plan.readonly_paths {
        let Some(target) = open_optional(path)? else {
            continue;
        };
        let what = || format!("failed to make {path:?} read-only");
        let copy = sys::open_tree(target.as_fd(), c"", true).step(what)?;
        set(&copy, false, MOUNT_ATTR_RDONLY, 0, 0).step(what)?;
        sys::move_mount(copy.as_fd(), target.as_fd()).step(what)?;
    }
    for path in &plan.masked_paths {
        let Some(target) = open_optional(path)? else {
            continue;
        };
        let what = || format!("failed to mask {path:?}");
        let cover = if is_folder(&target).step(what)? {
            // One each: a mount that is not attached cannot be copied before Linux 6.15.
            empty_folder()?
        } else {
            null_device().step(what)?
        };
        sys::move_mount(cover.as_fd(), target.as_fd()).step(what)?;
    }
    if plan.root_readonly {
        let what = || "failed to make the root read-only".to_owned();
        let root = open_path(Path::new("/")).step(what)?;
        set(&root, false, MOUNT_ATTR_RDONLY, 0, 0).step(what)?;
    }
    Ok(())
}

/// A detached, empty, read-only tmpfs.
fn empty_folder() -> Result<OwnedFd, LaunchError> {
    let what = || "failed to make an empty folder for masked paths".to_owned();
    let context = sys::fsopen(c"tmpfs").step(what)?;
    sys::fsconfig_set(context.as_fd(), c"size", Some(c"0k")).step(what)?;
    let mount = sys::fsmount(context.as_fd(), MOUNT_ATTR_RDONLY).step(what)?;
    Ok(mount)
}

/// A detached copy of the container's `/dev/null`, which must be the null device: an image could have
/// put another file there.
fn null_device() -> nix::Result<OwnedFd> {
    let null = open_path(Path::new("/dev/null"))?;
    let stat = nix::sys::stat::fstat(&null)?;
    if stat.st_mode & libc::S_IFMT != libc::S_IFCHR || stat.st_rdev != libc::makedev(1, 3) {
        return Err(Errno::ENODEV);
    }
    sys::open_tree(null.as_fd(), c"", false)
}

fn is_folder(fd: &OwnedFd) -> nix::Result<bool> {
    let stat = nix::sys::stat::fstat(fd)?;
    Ok(stat.st_mode & libc::S_IFMT == libc::S_IFDIR)
}

fn open_path(path: &Path) -> nix::Result<OwnedFd> {
    nix::fcntl::open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())
}

fn open_optional(path: &Path) -> Result<Option<OwnedFd>, LaunchError> {
    match open_path(path) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
        Err(errno) => Err(errno).step(|| format!("open {path:?}")),
    }
}
