//! Removing a folder without ever leaving the mount it is on: a bind-mounted volume below a pod's
//! folder belongs to the user, and must survive. Safe calls relative to open folders only.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, openat, statx, unlinkat};
use rustix::io::Errno;

/// Deepest folder that is followed.
const DEPTH_MAX: usize = 64;

/// Removes `path` and, if it is a folder, everything in it that is on the same mount. Symbolic
/// links are removed, not followed. What is not there counts as removed.
///
/// # Errors
/// The first error met, after all the rest has been removed; `EBUSY` for a mount point below
/// `path`, `ELOOP` for folders nested deeper than 64.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // The parent's mount is not compared: the pod's folder may be a mount of its own.
    Ok(remove(CWD, &name, None, DEPTH_MAX)?)
}

fn remove(
    parent: BorrowedFd<'_>,
    name: &CStr,
    mount: Option<u64>,
    depth: usize,
) -> Result<(), Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e),
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = match openat(parent, name, flags, Mode::empty()) {
        Ok(dir) => dir,
        Err(Errno::NOENT) => return Ok(()),
        Err(e) => return Err(e),
    };
    let here = mount_id(&dir)?;
    if mount.is_some_and(|m| m != here) {
        return Err(Errno::BUSY);
    }
    let emptied = if depth == 0 {
        Err(Errno::LOOP)
    } else {
        empty(&dir, here, depth)
    };
    match unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(e) => emptied.and(Err(e)),
    }
}

fn empty(dir: &OwnedFd, mount: u64, depth: usize) -> Result<(), Errno> {
    let mut first = Ok(());
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push((entry.file_name().to_owned(), entry.file_type()));
        }
    }
    for (name, kind) in names {
        let removed = if kind == FileType::Directory {
            remove(dir.as_fd(), &name, Some(mount), depth - 1)
        } else {
            match unlinkat(dir, &name, AtFlags::empty()) {
                Err(Errno::NOENT) => Ok(()),
                // Some file systems do not say what an entry is.
                Err(Errno::ISDIR) => remove(dir.as_fd(), &name, Some(mount), depth - 1),
                other => other,
            }
        };
        first = first.and(removed);
    }
    first
}

fn mount_id(dir: &OwnedFd) -> Result<u64, Errno> {
    // STATX_MNT_ID, Linux 5.8.
    let stat = statx(dir, c"", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    if stat.stx_mask & StatxFlags::MNT_ID.bits() == 0 {
        return Err(Errno::NOSYS);
    }
    Ok(stat.stx_mnt_id)
}
