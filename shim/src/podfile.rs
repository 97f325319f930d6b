//! `<pod dir>/pod.json`: what a pod tells other programs on the host about itself. Written by the
//! pod's shim, read by `sealpod list`. For people and tools; nothing is cleaned up by it (that is the
//! ledger's job).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

/// Name of the file in the pod's folder.
pub const FILE_NAME: &str = "pod.json";
/// Largest file that is read, bytes.
const SIZE_MAX: u64 = 64 << 10;

/// A pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PodFile {
    /// containerd's namespace.
    pub namespace: String,
    /// Sandbox id, or the container's where it is a pod of its own.
    pub id: String,
    /// The serving shim.
    pub shim_pid: u32,
    /// The VM; 0 as long as there is none.
    pub vm_pid: u32,
    /// Seconds since 1970.
    pub created_unix: u64,
    /// What executes the guest's instructions: `kvm`, `tcg`.
    pub accelerator: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Guest memory, MiB.
    pub memory_mib: u64,
}

/// Why the file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PodFileError {
    /// The file system.
    #[error("Pod file {path} cannot be {action}")]
    Io {
        /// The file.
        path: PathBuf,
        /// `read` or `written`.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// Something else than a pod.
    #[error("Pod file {path} does not describe a pod")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
}

impl PodFile {
    /// Writes the file of the pod folder `dir`, at once and whole, readable by root only.
    ///
    /// # Errors
    /// [`PodFileError::Io`].
    pub fn write(&self, dir: &Path) -> Result<(), PodFileError> {
        let path = dir.join(FILE_NAME);
        let new = dir.join(".pod.json.new");
        let write = || {
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&new)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            std::fs::rename(&new, &path)
        };
        write().map_err(|source| PodFileError::Io {
            path: path.clone(),
            action: "written",
            source,
        })
    }

    /// Reads the file of the pod folder `dir`.
    ///
    /// # Errors
    /// [`PodFileError`].
    pub fn read(dir: &Path) -> Result<Self, PodFileError> {
        let path = dir.join(FILE_NAME);
        let mut text = Vec::new();
        let read = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .and_then(|file| file.take(SIZE_MAX).read_to_end(&mut text));
        match read {
            Ok(_) => {
                serde_json::from_slice(&text).map_err(|source| PodFileError::Parse { path, source })
            }
            Err(source) => Err(PodFileError::Io {
                path,
                action: "read",
                source,
            }),
        }
    }
}

/// The pods of a state folder, by namespace and id. A folder without a readable pod file is left out:
/// its pod is just beginning or just ending.
///
/// # Errors
/// When the state folder cannot be read; one that is not there has no pods.
pub fn list(state_dir: &Path) -> io::Result<Vec<PodFile>> {
    let entries = match std::fs::read_dir(state_dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut pods: Vec<_> = entries
        .filter_map(|e| PodFile::read(&e.ok()?.path()).ok())
        .collect();
    pods.sort_by(|a, b| (&a.namespace, &a.id).cmp(&(&b.namespace, &b.id)));
    Ok(pods)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_listed_and_half_made_folders_are_not() {
        let state = tempfile::tempdir().expect("tempdir");
        let pod = |id: &str| PodFile {
            namespace: "k8s.io".into(),
            id: id.into(),
            ..PodFile::default()
        };
        for id in ["b", "a"] {
            let dir = state.path().join(id);
            std::fs::create_dir(&dir).expect("mkdir");
            pod(id).write(&dir).expect("write");
        }
        std::fs::create_dir(state.path().join("half")).expect("mkdir");
        let torn = state.path().join("torn");
        std::fs::create_dir(&torn).expect("mkdir");
        std::fs::write(torn.join(FILE_NAME), "{\"id\":").expect("write");
        assert_eq!(list(state.path()).expect("list"), [pod("a"), pod("b")]);
        assert!(list(&state.path().join("gone")).expect("list").is_empty());
    }
}
