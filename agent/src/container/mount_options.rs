//! OCI mount options, sorted into mount attributes, propagation and options of the file system.
//! Translation only.

use std::ffi::CString;
use std::path::{Component, Path, PathBuf};

use oci_spec::runtime::Mount;

use super::plan::{MountKind, MountPlan};
use super::spec::SpecError;

// linux/mount.h
const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME: u64 = 0x70;
const RELATIME: u64 = 0x0;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x20_0000;

/// Longest option list of one mount.
const OPTIONS_MAX: usize = 256;

/// An attribute by its option name: what to set and what to clear.
fn attribute(name: &str) -> Option<(u64, u64)> {
    Some(match name {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" => (0, NODEV),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        // Kernel rule: the access time field is changed as a whole.
        "relatime" => (RELATIME, ATIME),
        "noatime" => (NOATIME, ATIME),
        "strictatime" => (STRICTATIME, ATIME),
        "atime" | "norelatime" | "nostrictatime" => (RELATIME, ATIME),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        "nosymfollow" => (NOSYMFOLLOW, 0),
        "symfollow" => (0, NOSYMFOLLOW),
        _ => return None,
    })
}

fn propagation(name: &str) -> Option<(u64, bool)> {
    let (name, recursive) = match name.strip_prefix('r') {
        Some(rest) => (rest, true),
        None => (name, false),
    };
    let flag = match name {
        "private" => libc::MS_PRIVATE,
        "shared" => libc::MS_SHARED,
        "slave" => libc::MS_SLAVE,
        "unbindable" => libc::MS_UNBINDABLE,
        _ => return None,
    };
    Some((flag, recursive))
}

/// `path` as an absolute path without `.` and `..`, which cannot lead above the root.
///
/// # Errors
/// [`SpecError::Path`] for an empty one or one with a NUL.
pub(super) fn normalize(what: &'static str, path: &Path) -> Result<PathBuf, SpecError> {
    if path.as_os_str().is_empty() || path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(SpecError::Path {
            what,
            path: path.into(),
        });
    }
    let mut out = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    Ok(out)
}

fn c_string(what: &'static str, text: &str) -> Result<CString, SpecError> {
    CString::new(text).map_err(|_| SpecError::Nul(what))
}

/// A mount of the specification.
///
/// # Errors
/// Names the mount and what is wrong with it.
pub(super) fn plan(mount: &Mount) -> Result<MountPlan, SpecError> {
    let destination = normalize("mount destination", mount.destination())?;
    let refuse = |why: &str| SpecError::Mount {
        destination: destination.clone(),
        why: why.into(),
    };
    if mount.uid_mappings().as_ref().is_some_and(|m| !m.is_empty()) {
        return Err(refuse("idmapped mounts are not supported"));
    }
    let options = mount.options().clone().unwrap_or_default();
    if options.len() > OPTIONS_MAX {
        return Err(refuse("more than 256 options"));
    }
    let (mut set, mut clear, mut set_recursive, mut clear_recursive) = (0, 0, 0, 0);
    let mut spread = Vec::new();
    let mut bind = None;
    let mut rest = Vec::new();
    for option in &options {
        match option.as_str() {
            "" | "defaults" => {}
            "bind" => bind = Some(bind.unwrap_or(false)),
            "rbind" => bind = Some(true),
            "idmap" | "ridmap" => return Err(refuse("idmapped mounts are not supported")),
            other => {
                if let Some((s, c)) = attribute(other) {
                    set = set & !c | s;
                    clear = clear & !s | c;
                } else if let Some(p) = propagation(other) {
                    spread.push(p);
                } else if let Some((s, c)) = other.strip_prefix('r').and_then(attribute) {
                    set_recursive = set_recursive & !c | s;
                    clear_recursive = clear_recursive & !s | c;
                } else {
                    rest.push(other);
                }
            }
        }
    }
    let fs = mount.typ().clone().unwrap_or_default();
    if fs == "bind" {
        bind = Some(bind.unwrap_or(false));
    }
    let source = mount.source().clone().unwrap_or_default();
    let kind = if let Some(recursive) = bind {
        if !source.is_absolute() {
            return Err(refuse(
                "the source of a bind mount must be an absolute path",
            ));
        }
        MountKind::Bind { source, recursive }
    } else {
        // On cgroup v2 both names mean the one hierarchy.
        let fs = if fs == "cgroup" { "cgroup2" } else { &fs };
        if fs.is_empty() {
            return Err(refuse("neither a type nor a bind mount"));
        }
        let mut options = Vec::new();
        for option in rest {
            if fs == "cgroup2" {
                continue; // v1 hierarchies' names; the v2 mount has nothing to choose
            }
            options.push(match option.split_once('=') {
                Some((key, value)) => (
                    c_string("mount option", key)?,
                    Some(c_string("mount option", value)?),
                ),
                None => (c_string("mount option", option)?, None),
            });
        }
        let source = source
            .to_str()
            .ok_or_else(|| refuse("source is not UTF-8"))?;
        let source = (!source.is_empty())
            .then(|| c_string("mount source", source))
            .transpose()?;
        MountKind::New {
            fs: c_string("mount type", fs)?,
            source,
            options,
        }
    };
    Ok(MountPlan {
        destination,
        kind,
        set,
        clear,
        set_recursive,
        clear_recursive,
        propagation: spread,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(json: serde_json::Value) -> Result<MountPlan, SpecError> {
        plan(&serde_json::from_value(json).expect("a mount"))
    }

    #[test]
    fn tmpfs_options_are_told_apart_from_mount_attributes() {
        let m = mount(
            serde_json::json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k", "noswap"]}),
        )
        .expect("valid");
        assert_eq!((m.set, m.clear), (NOSUID | STRICTATIME, ATIME));
        let MountKind::New {
            fs,
            source,
            options,
        } = m.kind
        else {
            panic!("a new file system")
        };
        assert_eq!(
            (fs.as_c_str(), source.as_deref()),
            (c"tmpfs", Some(c"tmpfs"))
        );
        let names: Vec<_> = options
            .iter()
            .map(|(k, v)| (k.to_bytes(), v.is_some()))
            .collect();
        assert_eq!(
            names,
            [(&b"mode"[..], true), (b"size", true), (b"noswap", false)]
        );
    }

    #[test]
    fn recursive_read_only_and_propagation_are_not_confused() {
        let m = mount(
            serde_json::json!({"destination": "/v", "type": "bind", "source": "/s",
            "options": ["rbind", "rro", "rslave", "rw"]}),
        )
        .expect("valid");
        assert_eq!((m.set, m.set_recursive, m.clear), (0, RDONLY, RDONLY));
        assert_eq!(m.propagation, [(libc::MS_SLAVE, true)]);
        assert_eq!(
            m.kind,
            MountKind::Bind {
                source: "/s".into(),
                recursive: true
            }
        );
    }

    #[test]
    fn destinations_cannot_climb_out_of_the_root() {
        let m = mount(serde_json::json!({"destination": "../../etc/../x/./y", "type": "tmpfs"}));
        assert_eq!(m.expect("valid").destination, PathBuf::from("/x/y"));
    }

    #[test]
    fn a_mount_without_type_or_with_a_relative_source_is_refused() {
        for bad in [
            serde_json::json!({"destination": "/x"}),
            serde_json::json!({"destination": "/x", "type": "bind", "source": "rel"}),
            serde_json::json!({"destination": "", "type": "tmpfs"}),
            serde_json::json!({"destination": "/x", "type": "bind", "source": "/s", "options": ["idmap"]}),
        ] {
            assert!(mount(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn cgroup_v1_mounts_become_the_v2_hierarchy() {
        let m = mount(
            serde_json::json!({"destination": "/sys/fs/cgroup", "type": "cgroup",
            "source": "cgroup", "options": ["nosuid", "ro", "name=x"]}),
        )
        .expect("valid");
        let MountKind::New { fs, options, .. } = m.kind else {
            panic!("new")
        };
        assert_eq!(fs.as_c_str(), c"cgroup2");
        assert!(options.is_empty());
    }
}
