//! Mounts on the host, all of them in the shim's own mount namespace: they end with it.
//! Every one is below the pod's share.
//!
//! Source: mount(2), mount_setattr(2), containerd's mount options.

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

use crate::spec::{HostMount, HostSource};
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
/// none.
///
/// # Errors
/// [`Error`] names what was mounted where; nothing stays mounted.
pub fn root(layers: &[RootMount], bundle_root: &Path, target: &Path) -> Result<(), Error> {
    create_dir(target)?;
    if layers.is_empty() {
        return bind(bundle_root, target, true, false);
    }
    let done = layers.iter().try_for_each(|layer| {
        let at = target.join(layer.target.trim_start_matches('/'));
        filesystem(&layer.fstype, &layer.source, &layer.options, &at)
    });
    if done.is_err() {
        let _ = detach(target);
    }
    done
}

/// Mounts one volume of a container on `dir/name`.
///
/// # Errors
/// [`Error`].
pub fn volume(volume: &HostMount, dir: &Path) -> Result<(), Error> {
    create_dir(dir)?;
    let target = dir.join(&volume.name);
    match &volume.source {
        HostSource::Bind {
            path,
            is_dir,
            recursive,
        } => {
            if *is_dir {
                create_dir(&target)?;
            } else {
                fs::File::create(&target).map_err(|source| Error::Create {
                    path: target.clone(),
                    source,
                })?;
            }
            bind(path, &target, *recursive, volume.readonly)
        }
        HostSource::Filesystem {
            fstype,
            source,
            options,
        } => {
            create_dir(&target)?;
            filesystem(fstype, source, options, &target)
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
    let table = fs::read_to_string("/proc/thread-self/mountinfo").map_err(failed)?;
    let below = |line: &str| -> Option<PathBuf> {
        let path = unescape(line.split(' ').nth(4)?);
        path.starts_with(target).then_some(path)
    };
    let mut points: Vec<PathBuf> = table.lines().filter_map(below).collect();
    points.reverse();
    for point in points {
        match umount2(&point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
            Err(e) => return Err(failed(e.into())),
        }
    }
    Ok(())
}

/// `\040` and friends of mountinfo.
fn unescape(field: &str) -> PathBuf {
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

fn bind(source: &Path, target: &Path, recursive: bool, readonly: bool) -> Result<(), Error> {
    let recurse = if recursive {
        MsFlags::MS_REC
    } else {
        MsFlags::empty()
    };
    let source = source.to_string_lossy();
    raw("bind", &source, target, MsFlags::MS_BIND | recurse, "")?;
    if readonly {
        // Fails where the source carries locked flags (nosuid, …); keep those then.
        let kept = nix::sys::statvfs::statvfs(target).map_or(MsFlags::empty(), |s| {
            MsFlags::from_bits_truncate(s.flags().bits()) & MsFlags::from_bits_truncate(0xf | 0x400)
        });
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY | kept;
        raw("bind", &source, target, flags, "")?;
    }
    Ok(())
}

fn filesystem(fstype: &str, source: &str, options: &[String], target: &Path) -> Result<(), Error> {
    let (flags, propagation, data) = parse_options(options);
    if fstype == "bind" || fstype == "rbind" || flags.contains(MsFlags::MS_BIND) {
        let recursive = fstype == "rbind" || flags.contains(MsFlags::MS_REC);
        bind(
            Path::new(source),
            target,
            recursive,
            flags.contains(MsFlags::MS_RDONLY),
        )?;
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
mod tests {
    use super::*;

    #[test]
    fn mountinfo_paths_are_unescaped() {
        assert_eq!(unescape("/a\\040b\\134c"), PathBuf::from("/a b\\c"));
        assert_eq!(unescape("/a\\x"), PathBuf::from("/a\\x"));
    }

    /// Runs in a thread with a mount namespace of its own.
    fn isolated(test: impl FnOnce() + Send + 'static) {
        let run = move || {
            if let Err(e) = unshare(CloneFlags::CLONE_FS)
                .map_err(io::Error::from)
                .and_then(|()| private_namespace())
            {
                eprintln!("SKIPPED: mounts need root: {e}");
                return;
            }
            test();
        };
        thread::spawn(run).join().expect("test thread");
    }

    #[test]
    fn an_overlay_of_a_hundred_long_layers_is_mounted_and_detached() {
        isolated(|| {
            let dir = tempfile::tempdir().expect("tempdir");
            // overlayfs needs an upper directory that is not an overlay itself.
            mount(
                Some("t"),
                dir.path(),
                Some("tmpfs"),
                MsFlags::empty(),
                None::<&str>,
            )
            .expect("tmpfs");
            let base = dir
                .path()
                .join("snapshots-of-a-folder-with-a-long-name-to-fill-the-page");
            let lower: Vec<String> = (0..100)
                .map(|i| {
                    let d = base.join(format!("{i}/fs"));
                    fs::create_dir_all(&d).expect("layer");
                    fs::write(d.join(format!("f{i}")), "x").expect("file");
                    d.to_string_lossy().into_owned()
                })
                .collect();
            let target = dir.path().join("root");
            let layer = RootMount {
                fstype: "overlay".into(),
                source: "overlay".into(),
                options: vec![format!("lowerdir={}", lower.join(":"))],
                ..Default::default()
            };
            assert!(layer.options[0].len() > OPTIONS_MAX);
            root(&[layer], Path::new("/none"), &target).expect("root");
            assert!(target.join("f0").exists() && target.join("f99").exists());
            detach(&target).expect("detach");
            assert!(!target.join("f0").exists());
        });
    }

    #[test]
    fn a_read_only_volume_of_one_file_cannot_be_written() {
        isolated(|| {
            let dir = tempfile::tempdir().expect("tempdir");
            let file = dir.path().join("f");
            fs::write(&file, "x").expect("file");
            let v = HostMount {
                name: "0".into(),
                source: HostSource::Bind {
                    path: file,
                    is_dir: false,
                    recursive: true,
                },
                readonly: true,
            };
            let at = dir.path().join("mounts");
            volume(&v, &at).expect("volume");
            let e = fs::write(at.join("0"), "y").expect_err("read-only");
            assert_eq!(e.raw_os_error(), Some(nix::libc::EROFS));
            detach(dir.path()).expect("detach");
        });
    }
}
