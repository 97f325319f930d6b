//! A bundle's `config.json`: reading it, what role its container has in a pod, and its translation into
//! what the guest is told. Reads files and asks the kernel what a path is; changes nothing.
//!
//! Source: OCI runtime specification 1.2, containerd's CRI annotations.

mod devices;
mod memory;
mod mounts;
mod translate;

use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};

pub use devices::BlockDevice;
pub use memory::{Folder, MemoryVolume};
pub use mounts::{HostMount, HostSource, ReadOnly, VOLUMES_DIR, pod_shm_bytes};
pub use translate::{GuestSpec, PidNamespace, translate, translate_update};

/// Largest `config.json` that is read. What reaches the guest is bounded by [`translate::SPEC_MAX`].
const CONFIG_MAX: u64 = 16 << 20;

const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
/// The pod's uid in Kubernetes.
pub(crate) const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";

/// A specification that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not there, or not readable.
    #[error("Could not read {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Larger than what is read.
    #[error("{path:?} is larger than {CONFIG_MAX} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// Not an OCI specification.
    #[error("{path:?} is not an OCI runtime specification")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and what.
        source: serde_json::Error,
    },
    /// A part that a container cannot do without.
    #[error("The specification has no `{0}`")]
    Missing(&'static str),
    /// A part that has a value it cannot have.
    #[error("`{field}` of the specification is {found:?}; allowed: {allowed}")]
    Value {
        /// Which part, as in config.json.
        field: String,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: String,
    },
    /// Something that exists on a host but not for a VM.
    #[error("{0}")]
    Unsupported(String),
    /// Too large for one request to the guest.
    #[error("The specification is {bytes} bytes; at most {max} fit into one request to the guest")]
    TooLargeForGuest {
        /// Encoded size.
        bytes: usize,
        /// Limit.
        max: usize,
    },
}

/// What a task is in its pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A container that is a pod by itself (`ctr run`, docker, nerdctl).
    Single,
    /// The CRI's sandbox ("pause") container.
    Sandbox,
    /// A container in the pod of that sandbox.
    Member {
        /// Id of the sandbox.
        sandbox_id: String,
    },
}

/// The role that the annotations of `spec` give its container.
///
/// # Errors
/// [`Error::Value`] for a container type that is not known, [`Error::Missing`] for a member that names no
/// sandbox.
pub fn role(annotations: &HashMap<String, String>) -> Result<Role, Error> {
    match annotations.get(CONTAINER_TYPE).map(String::as_str) {
        None => Ok(Role::Single),
        Some("sandbox") => Ok(Role::Sandbox),
        Some("container") => match annotations.get(SANDBOX_ID) {
            Some(id) if sealpod_protocol::valid_id(id) => Ok(Role::Member {
                sandbox_id: id.clone(),
            }),
            Some(id) => Err(Error::Value {
                field: format!("annotations[{SANDBOX_ID:?}]"),
                found: id.clone(),
                allowed: "a containerd id".into(),
            }),
            None => Err(Error::Missing(
                "annotations[\"io.kubernetes.cri.sandbox-id\"]",
            )),
        },
        Some(other) => Err(Error::Value {
            field: format!("annotations[{CONTAINER_TYPE:?}]"),
            found: other.into(),
            allowed: "sandbox, container".into(),
        }),
    }
}

/// Marks annotations as a sandbox's, for a pod whose sandbox has no container.
pub fn mark_sandbox(annotations: &mut HashMap<String, String>) {
    annotations.insert(CONTAINER_TYPE.into(), "sandbox".into());
}

/// Reads `<bundle>/config.json`.
///
/// # Errors
/// [`Error`] names the file and what was wrong with it.
pub fn load(bundle: &Path) -> Result<Spec, Error> {
    let path = bundle.join("config.json");
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(&path)?
            .take(CONFIG_MAX + 1)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().map_err(|source| Error::Read {
        path: path.clone(),
        source,
    })?;
    if bytes.len() as u64 > CONFIG_MAX {
        return Err(Error::TooLarge { path });
    }
    serde_json::from_slice(&bytes).map_err(|source| Error::Parse { path, source })
}

/// The specification's annotations; empty where it has none.
#[must_use]
pub fn annotations(spec: &Spec) -> HashMap<String, String> {
    spec.annotations().clone().unwrap_or_default()
}

/// The namespace of `kind` that the specification asks for: `None` for the host's, `Some(None)` for a
/// new one, `Some(Some(path))` for an existing one.
#[must_use]
pub fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
    let all = spec.linux().as_ref()?.namespaces().as_ref()?;
    let found = all.iter().find(|n| n.typ() == kind)?;
    Some(found.path().clone().filter(|p| !p.as_os_str().is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect()
    }

    #[test]
    fn the_role_comes_from_the_cri_annotations() -> Result<(), Error> {
        assert_eq!(role(&with(&[]))?, Role::Single);
        assert_eq!(role(&with(&[(CONTAINER_TYPE, "sandbox")]))?, Role::Sandbox);
        let member = with(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p1")]);
        assert_eq!(
            role(&member)?,
            Role::Member {
                sandbox_id: "p1".into()
            }
        );
        for bad in [
            with(&[(CONTAINER_TYPE, "other")]),
            with(&[(CONTAINER_TYPE, "container")]),
            with(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "../x")]),
        ] {
            assert!(role(&bad).is_err(), "{bad:?}");
        }
        Ok(())
    }

    #[test]
    fn a_broken_config_is_named() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let text = |e: Error| crate::error::chain(&e);
        let missing = load(dir.path()).map_err(text).expect_err("missing");
        assert!(
            missing.contains("config.json") && missing.contains("No such file"),
            "{missing}"
        );
        std::fs::write(
            dir.path().join("config.json"),
            r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"warp"}]}}"#,
        )?;
        let unknown = load(dir.path())
            .map_err(text)
            .expect_err("unknown namespace");
        assert!(
            unknown.contains("warp") && unknown.contains("network"),
            "{unknown}"
        );
        Ok(())
    }
}
