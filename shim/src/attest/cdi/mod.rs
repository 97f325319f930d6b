//! Specifications of the Container Device Interface (github.com/cncf-tags/container-device-interface, SPEC.md),
//! as JSON or YAML: which host node a device is made of, and what the container gets with it. A specification is
//! written for containers of the host's kernel; in a VM there is a device only if it can be passed in, so that
//! everything else that one can ask for is refused by name instead of left out.

mod form;
#[cfg(test)]
mod tests;

use std::{
    error::Error,
    io,
    path::{Component, Path, PathBuf},
};

use serde::Deserialize;

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
    #[error("{path} is no CDI specification in {form}")]
    Form {
        /// Which.
        path: PathBuf,
        /// JSON or YAML.
        form: &'static str,
        /// Where it is not, and what may be there.
        source: Box<dyn Error + Send + Sync>,
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
    device(form::read(file)?, name).map_err(|reason| CdiError::Content {
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
