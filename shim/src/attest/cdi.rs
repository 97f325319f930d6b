//! Specifications of the Container Device Interface (github.com/cncf-tags/container-device-interface, SPEC.md),
//! as JSON: which host node a device is made of, and what the container gets with it. A specification is
//! written for containers of the host's kernel; in a VM there is a device only if it can be passed in, so that
//! everything else that one can ask for is refused by name instead of left out.

use std::{
    fs::File,
    io::{self, Read},
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

/// Largest file, bytes.
const SIZE_MAX: u64 = 1 << 20;
/// Most variables that a device sets.
const ENV_MAX: usize = 64;

/// A specification that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// The file.
    #[error("Cannot read {path}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its form.
    #[error("{path} is no CDI specification in JSON")]
    Json {
        /// Which.
        path: PathBuf,
        /// Where it is not.
        source: serde_json::Error,
    },
    /// Its content.
    #[error("{path}: {reason}")]
    Content {
        /// Which.
        path: PathBuf,
        /// What about it.
        reason: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Specification {
    cdi_version: String,
    kind: String,
    #[serde(default, rename = "annotations")]
    _annotations: serde_json::Value,
    devices: Vec<Device>,
    #[serde(default)]
    container_edits: Edits,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default, rename = "annotations")]
    _annotations: serde_json::Value,
    container_edits: Edits,
}

/// What is not listed here is unknown, and refused as such.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Edits {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    mounts: Vec<serde_json::Value>,
    hooks: Vec<serde_json::Value>,
    net_devices: Vec<serde_json::Value>,
    #[serde(rename = "additionalGids")]
    additional_gids: Vec<u32>,
    intel_rdt: Option<serde_json::Value>,
}

/// What a node's number and owner are on the host says nothing about the guest's.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Node {
    path: PathBuf,
    #[serde(default)]
    host_path: Option<PathBuf>,
    #[serde(default, rename = "type")]
    _type: serde_json::Value,
    #[serde(default, rename = "major")]
    _major: serde_json::Value,
    #[serde(default, rename = "minor")]
    _minor: serde_json::Value,
    #[serde(default, rename = "fileMode")]
    _file_mode: serde_json::Value,
    #[serde(default, rename = "permissions")]
    _permissions: serde_json::Value,
    #[serde(default, rename = "uid")]
    _uid: serde_json::Value,
    #[serde(default, rename = "gid")]
    _gid: serde_json::Value,
}

/// A device of a specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct CdiDevice {
    /// Its node on the host.
    pub(super) host: PathBuf,
    /// Its node in the container.
    pub(super) path: PathBuf,
    /// Variables that the container gets, `NAME=value`.
    pub(super) env: Vec<String>,
}

/// The device with this CDI name in the specification at `file`.
pub(super) fn read(file: &Path, name: &str) -> Result<CdiDevice, CdiError> {
    let failed = |source| CdiError::Read {
        path: file.into(),
        source,
    };
    let mut text = Vec::new();
    let read = File::open(file).and_then(|f| f.take(SIZE_MAX + 1).read_to_end(&mut text));
    if read.map_err(failed)? as u64 > SIZE_MAX {
        let long = format!("larger than {SIZE_MAX} bytes");
        return Err(failed(io::Error::other(long)));
    }
    let specification = serde_json::from_slice(&text).map_err(|source| CdiError::Json {
        path: file.into(),
        source,
    })?;
    device(specification, name).map_err(|reason| CdiError::Content {
        path: file.into(),
        reason,
    })
}

fn device(specification: Specification, name: &str) -> Result<CdiDevice, String> {
    if !matches!(specification.cdi_version.split('.').next(), Some("0" | "1")) {
        let version: String = specification.cdi_version.chars().take(32).collect();
        return Err(format!(
            "version {version:?} is not known; known are 0.x and 1.x"
        ));
    }
    let (kind, id) = name.split_once('=').unwrap_or((name, ""));
    if specification.kind != kind {
        let other: String = specification.kind.chars().take(128).collect();
        return Err(format!("is about {other:?}, not {kind:?}"));
    }
    let mut found = specification.devices.into_iter().filter(|d| d.name == id);
    let (Some(device), None) = (found.next(), found.next()) else {
        return Err(format!("has not exactly one device {id:?}"));
    };
    let all = [specification.container_edits, device.container_edits];
    let mut env = Vec::new();
    let mut nodes = Vec::new();
    for edits in all {
        edits.possible()?;
        env.extend(edits.env);
        nodes.extend(edits.device_nodes);
    }
    let named = |v: &String| v.split_once('=').is_some_and(|(name, _)| !name.is_empty());
    if env.len() > ENV_MAX || !env.iter().all(|v| named(v) && !v.contains('\0')) {
        return Err(format!("env is not at most {ENV_MAX} of NAME=value"));
    }
    // The node that every user of VFIO opens is no device.
    nodes.retain(|n| n.path != Path::new(super::wanted::CONTROL));
    let [node] = nodes.as_slice() else {
        let count = nodes.len();
        return Err(format!(
            "device {id:?} has {count} nodes; a VM is given one"
        ));
    };
    let host = node.host_path.as_ref().unwrap_or(&node.path);
    for path in [host, &node.path] {
        let plain = path
            .components()
            .all(|c| !matches!(c, Component::ParentDir));
        if !path.is_absolute() || !plain {
            return Err(format!("node {path:?} is no absolute path"));
        }
    }
    Ok(CdiDevice {
        host: host.clone(),
        path: node.path.clone(),
        env,
    })
}

impl Edits {
    /// Refuses what has no meaning in a guest.
    fn possible(&self) -> Result<(), String> {
        for (name, asked) in [
            ("mounts", !self.mounts.is_empty()),
            ("hooks", !self.hooks.is_empty()),
            ("netDevices", !self.net_devices.is_empty()),
            ("additionalGids", !self.additional_gids.is_empty()),
            ("intelRdt", self.intel_rdt.is_some()),
        ] {
            if asked {
                return Err(format!(
                    "asks for {name}: files, programs and numbers of the host are not the guest's"
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str, name: &str) -> Result<CdiDevice, String> {
        let dir = tempfile::tempdir().expect("folder");
        let file = dir.path().join("cdi.json");
        std::fs::write(&file, text).expect("file");
        read(&file, name).map_err(|e| crate::error::chain(&e))
    }

    fn with(edits: &str) -> String {
        format!(
            r#"{{"cdiVersion":"0.6.0","kind":"nvidia.com/pgpu","devices":[
            {{"name":"0","containerEdits":{{"deviceNodes":[{{"path":"/dev/vfio/75"}}]}}}}],
            "containerEdits":{{"deviceNodes":[{{"path":"/dev/vfio/vfio"}}],{edits}}}}}"#
        )
    }

    #[test]
    fn a_device_is_one_node_with_the_variables_of_both_levels() {
        let text = with(r#""env":["NVIDIA_VISIBLE_DEVICES=void"]"#);
        assert_eq!(
            of(&text, "nvidia.com/pgpu=0"),
            Ok(CdiDevice {
                host: "/dev/vfio/75".into(),
                path: "/dev/vfio/75".into(),
                env: vec!["NVIDIA_VISIBLE_DEVICES=void".into()],
            })
        );
        let renamed = text.replace(
            r#"{"path":"/dev/vfio/75"}"#,
            r#"{"path":"/dev/gpu","hostPath":"/dev/vfio/75","type":"c","major":1,"permissions":"rw"}"#,
        );
        let found = of(&renamed, "nvidia.com/pgpu=0").expect("device");
        assert_eq!(
            (found.host, found.path),
            ("/dev/vfio/75".into(), "/dev/gpu".into())
        );
    }

    #[test]
    fn what_a_vm_cannot_be_given_is_refused_by_name() {
        let name = "nvidia.com/pgpu=0";
        for (edits, said) in [
            (
                r#""hooks":[{"hookName":"createContainer","path":"/x"}]"#,
                "hooks",
            ),
            (
                r#""mounts":[{"hostPath":"/a","containerPath":"/b"}]"#,
                "mounts",
            ),
            (r#""additionalGids":[1]"#, "additionalGids"),
            (r#""env":["novalue"]"#, "NAME=value"),
            (r#""somethingNew":[]"#, "somethingNew"),
        ] {
            let e = of(&with(edits), name).expect_err(edits);
            assert!(e.contains(said), "{edits}: {e}");
        }
        let good = with(r#""env":[]"#);
        for (from, to, said) in [
            ("nvidia.com/pgpu", "other.com/gpu", "is about"),
            (r#""name":"0""#, r#""name":"1""#, "exactly one device"),
            ("0.6.0", "2.0.0", "not known"),
            ("/dev/vfio/75", "/dev/../etc", "no absolute path"),
            (r#"{"path":"/dev/vfio/75"}"#, "", "0 nodes"),
            (
                r#"{"path":"/dev/vfio/75"}"#,
                r#"{"path":"/dev/a"},{"path":"/dev/b"}"#,
                "2 nodes",
            ),
            ("{", "", "no CDI specification"),
        ] {
            let e = of(&good.replacen(from, to, 1), name).expect_err(to);
            assert!(e.contains(said), "{to}: {e}");
        }
        assert!(read(Path::new("/does/not/exist"), name).is_err());
    }
}
