//! Volumes in memory: an `emptyDir` of medium Memory, for which a kubelet mounts a tmpfs on the host. The
//! guest makes one of its own instead, which all containers of the pod share: what is in it never leaves
//! the VM, and programs find the file system that they asked for. Looks at the mount table; changes
//! nothing.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::sys::statvfs::statvfs;
use sealpod_protocol::MEMORY_DIR;

use super::mounts::name_of;

/// The folder in which a kubelet keeps a pod's volumes of this kind.
const EMPTY_DIRS: &str = "kubernetes.io~empty-dir";
/// The one in which it mounts parts of volumes (`subPath`).
const SUB_PATHS: &str = "volume-subpaths";

/// A volume that the guest makes. Mode and owners are those of the host's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryVolume {
    /// Below [`MEMORY_DIR`]; the same for all containers that use it.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// Its root folder.
    pub root: Folder,
    /// The part of it that the container gets, where it does not get all.
    pub part: Option<(PathBuf, Folder)>,
}

/// Permissions and owners of a folder.
#[expect(missing_docs, reason = "as in stat(2)")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Folder {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Folder {
    fn like(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
        })
    }
}

impl MemoryVolume {
    /// Where the guest has what the container gets.
    pub(super) fn guest_path(&self) -> PathBuf {
        let volume = Path::new(MEMORY_DIR).join(&self.name);
        match &self.part {
            Some((part, _)) => volume.join(part),
            None => volume,
        }
    }
}

/// The volume in memory that `path` is, or is a folder of; `None` for everything else.
pub(super) fn find(path: &Path) -> io::Result<Option<MemoryVolume>> {
    let named = |folder: &str| path.components().any(|c| c.as_os_str() == folder);
    if !path.is_dir() || !(named(EMPTY_DIRS) || named(SUB_PATHS)) {
        return Ok(None);
    }
    let path = path.canonicalize()?;
    let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let Some((volume, part)) = locate(&table, &path) else {
        return Ok(None);
    };
    let space = statvfs(&volume)?;
    let part = match part {
        Some(part) => Some((part, Folder::like(&path)?)),
        None => None,
    };
    Ok(Some(MemoryVolume {
        name: name_of(&volume),
        bytes: space.blocks().saturating_mul(space.fragment_size()),
        root: Folder::like(&volume)?,
        part,
    }))
}

/// In a mount table (proc_pid_mountinfo(5)): the volume to which what is mounted on `path` belongs, and
/// which part of it that is.
fn locate(table: &str, path: &Path) -> Option<(PathBuf, Option<PathBuf>)> {
    let all: Vec<_> = table.lines().filter_map(tmpfs).collect();
    let here = all.iter().rfind(|m| m.point == path)?;
    let volume = all.iter().rfind(|m| {
        let parent = m.point.parent().and_then(Path::file_name);
        m.device == here.device && m.root == "/" && parent.is_some_and(|name| name == EMPTY_DIRS)
    })?;
    let part = Path::new(here.root).strip_prefix("/").ok()?;
    let part = (!part.as_os_str().is_empty()).then(|| part.to_owned());
    Some((volume.point.clone(), part))
}

struct Tmpfs<'a> {
    device: &'a str,
    root: &'a str,
    point: PathBuf,
}

/// A line of the table, if it is a tmpfs's. A kubelet's names need no escapes; one with them is no match.
fn tmpfs(line: &str) -> Option<Tmpfs<'_>> {
    let (mount, kind) = line.split_once(" - ")?;
    if !kind.starts_with("tmpfs ") {
        return None;
    }
    let mut fields = mount.split(' ').skip(2);
    Some(Tmpfs {
        device: fields.next()?,
        root: fields.next()?,
        point: fields.next()?.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
30 1 8:1 / / rw - ext4 /dev/sda1 rw
40 30 0:50 / /k/pods/u/volumes/kubernetes.io~empty-dir/cache rw,relatime - tmpfs tmpfs rw,size=4096k
41 30 0:51 / /k/pods/u/volumes/kubernetes.io~secret/token rw,relatime - tmpfs tmpfs rw
42 30 0:50 /a/b /k/pods/u/volume-subpaths/cache/c/0 rw,relatime - tmpfs tmpfs rw
43 30 0:51 /x /k/pods/u/volume-subpaths/token/c/1 rw,relatime - tmpfs tmpfs rw
44 30 8:1 /v /k/pods/u/volumes/kubernetes.io~empty-dir/disk rw - ext4 /dev/sda1 rw
";

    #[test]
    fn only_memory_that_a_kubelet_made_for_the_pod_is_the_guests() {
        let volume = "/k/pods/u/volumes/kubernetes.io~empty-dir/cache";
        let found = |path: &str| locate(TABLE, Path::new(path));
        assert_eq!(found(volume), Some((volume.into(), None)));
        assert_eq!(
            found("/k/pods/u/volume-subpaths/cache/c/0"),
            Some((volume.into(), Some("a/b".into())))
        );
        for other in [
            "/k/pods/u/volumes/kubernetes.io~secret/token",
            "/k/pods/u/volume-subpaths/token/c/1",
            "/k/pods/u/volumes/kubernetes.io~empty-dir/disk",
            "/k/pods/u/volumes/kubernetes.io~empty-dir/cache/below",
        ] {
            assert_eq!(found(other), None, "{other}");
        }
    }
}
