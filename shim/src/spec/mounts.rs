//! Which mounts of a specification need something of the host, and where the guest finds it.
//!
//! A bind mount's source is bound below the pod's share; the guest's own file systems (proc, sysfs,
//! tmpfs, …) and volumes in memory are mounted by the guest; anything else is mounted on the host and
//! shared.

use std::{
    fs,
    hash::{Hash, Hasher},
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use nix::sys::{statfs, statvfs::statvfs};
use oci_spec::runtime::{Mount, Spec};
use sealpod_protocol::{SANDBOX_SHM_DIR, SHARE_DIR};

use super::{
    Error,
    memory::{self, MemoryVolume},
};

/// File systems that the guest makes itself.
const GUEST_TYPES: [&str; 12] = [
    "proc",
    "sysfs",
    "tmpfs",
    "ramfs",
    "devpts",
    "mqueue",
    "cgroup",
    "cgroup2",
    "bpf",
    "debugfs",
    "securityfs",
    "hugetlbfs",
];

/// One thing that has to be mounted on the host, below the pod's share. Containers that want the same
/// thing use one mount: so they see each other's changes at once, as two views of one file system.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostMount {
    /// Name below `<share>/<VOLUMES_DIR>/`; the same for all containers that want the same.
    pub name: String,
    /// What.
    pub source: HostSource,
    /// Whether the host may not write through it either.
    pub readonly: ReadOnly,
}

/// How much of a volume cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReadOnly {
    /// Nothing.
    No,
    /// What is on the volume itself; mounts below it can be.
    Top,
    /// All (`rro`).
    Recursive,
}

/// Folder of the share that holds the volumes. No container id has an `@`.
pub const VOLUMES_DIR: &str = "@volumes";

/// See [`HostMount::source`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HostSource {
    /// A file or directory of the host.
    Bind {
        /// Absolute path.
        path: PathBuf,
        /// Whether it is a directory.
        is_dir: bool,
        /// Whether mounts below it come along.
        recursive: bool,
        /// Whether mounts that the host makes later stay away (`rprivate`).
        private: bool,
    },
    /// A file system that the host mounts.
    Filesystem {
        /// Type, as for mount(2).
        fstype: String,
        /// Device or other source.
        source: String,
        /// Options.
        options: Vec<String>,
    },
}

/// Rewrites the mounts of `spec` for the guest and returns what the host has to provide, and which
/// volumes the guest has to make.
pub(super) fn translate(
    spec: &mut Spec,
    bundle: &Path,
) -> Result<(Vec<HostMount>, Vec<MemoryVolume>), Error> {
    let (mut host, mut memory) = (Vec::new(), Vec::new());
    for mount in spec.mounts_mut().iter_mut().flatten() {
        match source(mount, bundle)? {
            Source::Guest => {}
            Source::Memory(volume) => {
                mount
                    .set_source(Some(volume.guest_path()))
                    .set_typ(Some("bind".into()));
                memory.push(volume);
            }
            Source::Host(source) => host.push(from_host(mount, source)),
        }
    }
    Ok((host, memory))
}

/// Points `mount` at what the host provides for it.
fn from_host(mount: &mut Mount, source: HostSource) -> HostMount {
    let options = mount.options().clone().unwrap_or_default();
    let readonly = read_only(&options);
    let name = name_of(&(&source, readonly));
    let guest = Path::new(SHARE_DIR).join(VOLUMES_DIR).join(&name);
    match &source {
        HostSource::Filesystem { .. } => {
            mount.set_options(Some(vec!["rbind".into()]));
        }
        // A mount of the host below it becomes one of the guest when it is first looked into, with the
        // attributes of the one that it lies on. There, read-only is kept by the host alone.
        HostSource::Bind { path, .. } if readonly == ReadOnly::Top && has_mounts_below(path) => {
            let writable = |o: &String| if o == "ro" { "rw".into() } else { o.clone() };
            mount.set_options(Some(options.iter().map(writable).collect()));
        }
        HostSource::Bind { .. } => {}
    }
    mount.set_source(Some(guest)).set_typ(Some("bind".into()));
    HostMount {
        name,
        source,
        readonly,
    }
}

/// What the last of several options says counts.
fn read_only(options: &[String]) -> ReadOnly {
    let said = options.iter().rev().find_map(|o| match o.as_str() {
        "rro" => Some(ReadOnly::Recursive),
        "ro" => Some(ReadOnly::Top),
        "rw" | "rrw" => Some(ReadOnly::No),
        _ => None,
    });
    said.unwrap_or(ReadOnly::No)
}

fn is_private(options: &[String]) -> bool {
    let said = options.iter().rev().find_map(|o| match o.as_str() {
        "private" | "rprivate" | "unbindable" | "runbindable" => Some(true),
        "slave" | "rslave" | "shared" | "rshared" => Some(false),
        _ => None,
    });
    said.unwrap_or(false)
}

/// Whether something is mounted below `path` now.
fn has_mounts_below(path: &Path) -> bool {
    let Ok(path) = path.canonicalize() else {
        return false;
    };
    let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    let mut points = points.map(crate::mount::unescape);
    points.any(|point| point != path && point.starts_with(&path))
}

/// A name that is the same for the same thing.
pub(super) fn name_of(thing: &(impl Hash + ?Sized)) -> String {
    let mut hasher = std::hash::DefaultHasher::new();
    thing.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}

/// Who provides a mount.
enum Source {
    /// The guest, by itself.
    Guest,
    /// The guest, once it has made the volume.
    Memory(MemoryVolume),
    /// The host.
    Host(HostSource),
}

/// Who provides what `mount` shows. Where the guest does it alone its source may have been changed to a
/// guest path.
fn source(mount: &mut Mount, bundle: &Path) -> Result<Source, Error> {
    let options = mount.options().clone().unwrap_or_default();
    let has = |name: &str| options.iter().any(|o| o == name);
    let fstype = mount.typ().clone().unwrap_or_default();
    let is_bind = matches!(fstype.as_str(), "bind" | "rbind") || has("bind") || has("rbind");
    if !is_bind {
        if GUEST_TYPES.contains(&fstype.as_str()) {
            return Ok(Source::Guest);
        }
        return Ok(Source::Host(HostSource::Filesystem {
            fstype,
            source: mount
                .source()
                .clone()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            options,
        }));
    }
    let destination = mount.destination().clone();
    let Some(source) = mount.source().clone() else {
        return Err(Error::Value {
            field: format!("mounts[{destination:?}].source"),
            found: String::new(),
            allowed: "a path on the host".into(),
        });
    };
    let path = bundle.join(source);
    if is_guests_own(&path) || path == Path::new(SANDBOX_SHM_DIR) {
        return Ok(Source::Guest);
    }
    let unusable = |e: std::io::Error| Error::Value {
        field: format!("mounts[{destination:?}].source"),
        found: path.display().to_string(),
        allowed: format!("a path that exists on the host ({e})"),
    };
    let metadata = fs::metadata(&path).map_err(unusable)?;
    if is_pod_shm(&destination, &path) {
        mount.set_source(Some(SANDBOX_SHM_DIR.into()));
        return Ok(Source::Guest);
    }
    if let Some(volume) = memory::find(&path).map_err(unusable)? {
        return Ok(Source::Memory(volume));
    }
    let kind = metadata.file_type();
    if kind.is_char_device() || kind.is_block_device() {
        return Err(Error::Unsupported(format!(
            "Mount {destination:?} binds the host's device {}: a device reaches a VM by `linux.devices`",
            path.display()
        )));
    }
    Ok(Source::Host(HostSource::Bind {
        path,
        is_dir: metadata.is_dir(),
        recursive: has("rbind") || fstype == "rbind",
        private: is_private(&options),
    }))
}

/// The kernel's own trees: the guest has its own, and the host's would be the wrong ones.
fn is_guests_own(path: &Path) -> bool {
    ["/proc", "/sys", "/dev"]
        .iter()
        .any(|own| path.starts_with(own))
}

/// `/dev/shm` of a pod: containerd and docker bind a host tmpfs named `shm`, the guest has one of its own
/// that all containers of the pod share.
fn is_pod_shm(destination: &Path, source: &Path) -> bool {
    destination == Path::new("/dev/shm")
        && source.file_name().is_some_and(|n| n == "shm")
        && statfs::statfs(source).is_ok_and(|s| s.filesystem_type() == statfs::TMPFS_MAGIC)
}

/// Size of the shared memory that a pod brings by a tmpfs of the host (`docker run --shm-size`), bytes.
#[must_use]
pub fn pod_shm_bytes(spec: &Spec) -> Option<u64> {
    let mut mounts = spec.mounts().iter().flatten();
    let source = mounts.find_map(|m| {
        let source = m.source().as_ref()?;
        is_pod_shm(m.destination(), source).then_some(source)
    })?;
    let space = statvfs(source).ok()?;
    Some(space.blocks().saturating_mul(space.fragment_size()))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{MountBuilder, SpecBuilder};

    use super::*;

    fn one(typ: &str, source: &str, destination: &str, options: &[&str]) -> Spec {
        let options: Vec<String> = options.iter().map(|o| (*o).into()).collect();
        let mount = MountBuilder::default()
            .typ(typ)
            .source(source)
            .destination(destination)
            .options(options)
            .build()
            .expect("mount");
        SpecBuilder::default()
            .mounts([mount])
            .build()
            .expect("spec")
    }

    #[test]
    fn a_volume_is_bound_below_the_share() {
        let dir = tempfile::tempdir().expect("tempdir");
        let source = dir.path().to_string_lossy().into_owned();
        let mut spec = one("bind", &source, "/data", &["rbind", "ro"]);
        let (host, _) = translate(&mut spec, Path::new("/b")).expect("translate");
        let [volume] = host.as_slice() else {
            panic!("one volume, not {host:?}");
        };
        assert_eq!(volume.readonly, ReadOnly::Top);
        let source = HostSource::Bind {
            path: dir.path().into(),
            is_dir: true,
            recursive: true,
            private: false,
        };
        assert_eq!(volume.source, source);
        let mounts = spec.mounts().clone().expect("mounts");
        let guest = format!("/run/sealpod/share/@volumes/{}", volume.name);
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new(&guest)));
    }

    #[test]
    fn containers_that_want_the_same_volume_use_one_mount() {
        let name = |source: &str, options: &[&str]| {
            let host = translate(&mut one("bind", source, "/data", options), Path::new("/b"));
            host.expect("translate").0[0].name.clone()
        };
        assert_eq!(
            name("/usr", &["rbind", "rw"]),
            name("/usr", &["rbind", "rslave"])
        );
        for other in ["ro", "rro", "rprivate"] {
            assert_ne!(name("/usr", &["rbind"]), name("/usr", &["rbind", other]));
        }
        assert_ne!(name("/usr", &["rbind"]), name("/bin", &["rbind"]));
    }

    #[test]
    fn the_guest_mounts_its_own_kernel_file_systems() {
        for (typ, source) in [
            ("proc", "proc"),
            ("tmpfs", "tmpfs"),
            ("bind", "/sys/fs/cgroup"),
            ("bind", "/dev/fuse"),
        ] {
            let mut spec = one(typ, source, "/x", &[]);
            let (host, memory) = translate(&mut spec, Path::new("/b")).expect("translate");
            assert!(host.is_empty() && memory.is_empty(), "{typ} {source}");
        }
    }

    #[test]
    fn a_source_that_is_not_there_is_named() {
        let mut spec = one("bind", "/nowhere/at/all", "/data", &["rbind"]);
        let e = translate(&mut spec, Path::new("/b"))
            .expect_err("missing")
            .to_string();
        assert!(e.contains("/nowhere/at/all") && e.contains("/data"), "{e}");
    }
}
