//! Mounts on the host, all of them in the shim's own mount namespace: they end with it.
//! Every one is below the pod's share.
//!
//! Source: mount(2), mount_setattr(2), containerd's mount options.

mod bind;
mod options;

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    thread,
};

use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};

use crate::spec::{HostMount, HostSource, ReadOnly};
use bind::{Bind, create_place};
use options::parse_options;

/// mount(2) takes one page of options.
const OPTIONS_MAX: usize = 4096 - 1;

/// A mount that could not be made or undone.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// mount(2) and friends.
    #[error("Could not mount {fstype} {origin:?} on {target:?}")]
    Mount {
        /// File system type, or "bind".
        fstype: String,
        /// What.
        origin: String,
        /// Where.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Creating the place for it.
    #[error("Could not create {path:?}")]
    Create {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Too many options.
    #[error("Mount options of {target:?} are {bytes} bytes; at most {OPTIONS_MAX}")]
    Options {
        /// Where.
        target: PathBuf,
        /// How long.
        bytes: usize,
    },
    /// umount2(2).
    #[error("Could not unmount {target:?}")]
    Unmount {
        /// Where.
        target: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// A root file system layer as containerd names it in a `CreateTaskRequest`.
#[derive(Debug, Clone, Default)]
pub struct RootMount {
    /// Type: overlay, bind, erofs, ….
    pub fstype: String,
    /// Device or directory.
    pub source: String,
    /// Below the root, mostly empty.
    pub target: String,
    /// fstab-style.
    pub options: Vec<String>,
}

/// Makes this process's mounts its own: what the host mounts later still arrives, what is mounted here
/// stays here and goes with the process. Must run before there are threads.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn private_namespace() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)?;
    Ok(())
}

/// Mounts a container's root on `target`: `layers` in order, or a bind of `bundle_root` when there are
/// none. `stage` is a place outside the share.
///
/// # Errors
/// [`Error`] names what was mounted where; nothing stays mounted.
pub fn root(
    layers: &[RootMount],
    bundle_root: &Path,
    target: &Path,
    stage: &Path,
) -> Result<(), Error> {
    create_dir(target)?;
    if layers.is_empty() {
        let bundle = Bind {
            source: bundle_root,
            recursive: true,
            private: false,
            readonly: ReadOnly::No,
        };
        return bundle.place(stage, target);
    }
    let done = layers.iter().try_for_each(|layer| {
        let at = target.join(layer.target.trim_start_matches('/'));
        filesystem(&layer.fstype, &layer.source, &layer.options, &at, stage)
    });
    if done.is_err() {
        let _ = detach(target);
    }
    done
}

/// Mounts one volume of a container on `dir/name`. `stages` is a folder outside the share, for what is
/// not to be seen there half made.
///
/// # Errors
/// [`Error`].
pub fn volume(volume: &HostMount, dir: &Path, stages: &Path) -> Result<(), Error> {
    create_dir(dir)?;
    let target = dir.join(&volume.name);
    let stage = stages.join(&volume.name);
    match &volume.source {
        HostSource::Bind {
            path,
            is_dir,
            recursive,
            private,
        } => {
            create_place(&target, *is_dir)?;
            let bound = Bind {
                source: path,
                recursive: *recursive,
                private: *private,
                readonly: volume.readonly,
            };
            bound.place(&stage, &target)
        }
        HostSource::Filesystem {
            fstype,
            source,
            options,
        } => {
            create_dir(&target)?;
            filesystem(fstype, source, options, &target, &stage)
        }
    }
}

/// Takes away everything that is mounted on or below `target`. Idempotent.
///
/// # Errors
/// [`Error::Unmount`].
pub fn detach(target: &Path) -> Result<(), Error> {
    let failed = |source: io::Error| Error::Unmount {
        target: target.into(),
        source,
    };
    for point in points(target).map_err(failed)?.into_iter().rev() {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
    Ok(())
}

/// Mount points at and below `target`, in the order in which they were made.
fn points(target: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/thread-self/mountinfo")?;
    let below = |line: &str| -> Option<PathBuf> {
        let path = unescape(line.split(' ').nth(4)?);
        path.starts_with(target).then_some(path)
    };
    Ok(table.lines().filter_map(below).collect())
}

/// `\040` and friends of mountinfo.
pub(crate) fn unescape(field: &str) -> PathBuf {
    let mut out = String::new();
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let code = rest
            .get(at + 1..at + 4)
            .and_then(|o| u8::from_str_radix(o, 8).ok());
        match code {
            Some(c) => {
                out.push(char::from(c));
                rest = &rest[at + 4..];
            }
            None => {
                out.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    out.push_str(rest);
    out.into()
}

fn create_dir(path: &Path) -> Result<(), Error> {
    let made = fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path);
    made.map_err(|source| Error::Create {
        path: path.into(),
        source,
    })
}

fn filesystem(
    fstype: &str,
    source: &str,
    options: &[String],
    target: &Path,
    stage: &Path,
) -> Result<(), Error> {
    let (flags, propagation, data) = parse_options(options);
    if fstype == "bind" || fstype == "rbind" || flags.contains(MsFlags::MS_BIND) {
        let recursive = fstype == "rbind" || flags.contains(MsFlags::MS_REC);
        let layer = Bind {
            source: Path::new(source),
            recursive,
            private: false,
            readonly: match flags.contains(MsFlags::MS_RDONLY) {
                true => ReadOnly::Top,
                false => ReadOnly::No,
            },
        };
        layer.place(stage, target)?;
    } else if fstype == "overlay" && data.len() > OPTIONS_MAX {
        overlay_relative(source, &data, flags, target)?;
    } else if data.len() > OPTIONS_MAX {
        return Err(Error::Options {
            target: target.into(),
            bytes: data.len(),
        });
    } else {
        raw(fstype, source, target, flags, &data)?;
    }
    if propagation.is_empty() {
        return Ok(());
    }
    raw("propagation", "", target, propagation, "")
}

/// Many layers: names relative to the folder that all lower directories share, in a thread of its own
/// because it needs a working directory of its own.
fn overlay_relative(source: &str, data: &str, flags: MsFlags, target: &Path) -> Result<(), Error> {
    let too_long = |bytes| Error::Options {
        target: target.into(),
        bytes,
    };
    let lower = data.split(',').find_map(|o| o.strip_prefix("lowerdir="));
    let lower = lower.ok_or_else(|| too_long(data.len()))?;
    let mut base = lower.split(':').next().unwrap_or_default();
    while !base.is_empty() && !lower.split(':').all(|d| d.starts_with(&format!("{base}/"))) {
        base = base.rsplit_once('/').map_or("", |(b, _)| b);
    }
    let prefix = format!("{base}/");
    let short: Vec<&str> = lower
        .split(':')
        .map(|d| d.strip_prefix(&prefix).unwrap_or(d))
        .collect();
    let data = data.replacen(lower, &short.join(":"), 1);
    if base.is_empty() || data.len() > OPTIONS_MAX {
        return Err(too_long(data.len()));
    }
    let run = || -> Result<(), Error> {
        let chdir = || -> io::Result<()> {
            unshare(CloneFlags::CLONE_FS)?;
            nix::unistd::chdir(base)?;
            Ok(())
        };
        chdir().map_err(|e| Error::Mount {
            fstype: "overlay".into(),
            origin: base.into(),
            target: target.into(),
            source: e,
        })?;
        raw("overlay", source, target, flags, &data)
    };
    thread::scope(|s| s.spawn(run).join()).unwrap_or_else(|_| Err(too_long(data.len())))
}

fn raw(fstype: &str, source: &str, target: &Path, flags: MsFlags, data: &str) -> Result<(), Error> {
    let none = |s: &'_ str| -> Option<String> { (!s.is_empty()).then(|| s.to_owned()) };
    let made = mount(
        none(source).as_deref(),
        target,
        Some(fstype),
        flags,
        none(data).as_deref(),
    );
    made.map_err(|e| Error::Mount {
        fstype: fstype.into(),
        origin: source.into(),
        target: target.into(),
        source: e.into(),
    })
}

#[cfg(test)]
mod tests;
