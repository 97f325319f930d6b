//! The pod's volumes in memory: one tmpfs each, made for the first container that uses it and there as
//! long as the guest.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown};
use sealpod_protocol::agent::{MemoryFolder, MemoryVolume};
use sealpod_protocol::{MEMORY_DIR, valid_id};

use crate::container::ContainerError;
use crate::launch;

/// Makes the volumes that are not there yet, and the parts of them that a container gets.
///
/// # Errors
/// [`ContainerError::Volume`] names the volume.
pub(crate) fn provide(volumes: &[MemoryVolume]) -> Result<(), ContainerError> {
    for volume in volumes {
        let failed = |source| ContainerError::Volume {
            name: volume.name.clone(),
            source,
        };
        if !valid_id(&volume.name) {
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        }
        let at = Path::new(MEMORY_DIR).join(&volume.name);
        make(&at, volume).map_err(failed)?;
        if let Some(part) = volume.part.as_ref() {
            make_part(&at, part).map_err(failed)?;
        }
    }
    Ok(())
}

fn make(at: &Path, volume: &MemoryVolume) -> io::Result<()> {
    match fs::create_dir_all(MEMORY_DIR).and_then(|()| fs::create_dir(at)) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        other => other?,
    }
    let size = format!("size={}", volume.bytes);
    let made = mount(
        Some("tmpfs"),
        at,
        Some("tmpfs"),
        MsFlags::empty(),
        Some(size.as_str()),
    );
    if let Err(errno) = made {
        let _ = fs::remove_dir(at);
        return Err(errno.into());
    }
    let root = volume.root.get_or_default();
    chown(at, Some(root.uid), Some(root.gid))?;
    fs::set_permissions(at, Permissions::from_mode(root.mode & 0o7777))
}

/// A folder of a volume. Containers write there: no link of theirs leads out of it.
fn make_part(volume: &Path, part: &MemoryFolder) -> io::Result<()> {
    let root = open_folder(volume)?;
    let path = Path::new("/").join(&part.path);
    if launch::open_inside(root.as_fd(), &path).is_ok() {
        return Ok(());
    }
    let made = launch::ensure_folder(root.as_fd(), &path)?;
    // A descriptor that only names the folder changes nothing; this one is the folder's.
    let folder = nix::fcntl::openat(&made, ".", FOLDER, Mode::empty())?;
    let (uid, gid) = (Uid::from_raw(part.uid), Gid::from_raw(part.gid));
    fchown(&folder, Some(uid), Some(gid))?;
    fchmod(&folder, Mode::from_bits_truncate(part.mode & 0o7777))?;
    Ok(())
}

const FOLDER: OFlag = OFlag::O_DIRECTORY
    .union(OFlag::O_RDONLY)
    .union(OFlag::O_CLOEXEC);

fn open_folder(path: &Path) -> io::Result<OwnedFd> {
    Ok(open(path, FOLDER, Mode::empty())?)
}
