//! The pod's network namespace: opening it, making one, running code inside it.
//! Nothing here knows about interfaces.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::statfs::fstatfs,
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use tokio::sync::oneshot;

/// `NSFS_MAGIC` of linux/magic.h: what a namespace file lives on.
const NSFS_MAGIC: libc::c_long = 0x6e73_6673;
/// The shim's own network namespace, which is containerd's, and that of the first process. Either
/// is what a pod may call the host's.
const HOSTS: [&str; 2] = ["/proc/self/ns/net", "/proc/1/ns/net"];

/// Why a network namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The pod asks for the host's network.
    #[error(
        "Host networking does not apply to a pod that runs in a virtual machine: \
         give the pod a network namespace of its own (Kubernetes: hostNetwork: false)"
    )]
    HostNetwork,
    /// The path cannot be opened.
    #[error("Network namespace {path} cannot be opened")]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The path is something else.
    #[error("{0} is not a network namespace")]
    NotANamespace(PathBuf),
    /// No new namespace.
    #[error("A network namespace cannot be made")]
    Create(#[source] io::Error),
    /// The thread that runs inside could not be started or did not finish.
    #[error("No thread could be run inside network namespace {path}")]
    Thread {
        /// Which namespace.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// An open network namespace. It exists at least as long as this value, or a clone of it.
#[derive(Debug, Clone)]
pub struct PodNetns {
    file: Arc<File>,
    given: Option<PathBuf>,
}

impl PodNetns {
    /// The namespace that an OCI specification asks for: the one at its path, or a new one where it
    /// has no path.
    ///
    /// # Errors
    /// [`NetnsError::HostNetwork`] where the specification has no network namespace or names the
    /// host's; else as [`PodNetns::open`] and [`PodNetns::create`].
    pub async fn from_spec(spec: &Spec) -> Result<Self, NetnsError> {
        let namespaces = spec.linux().as_ref().and_then(|l| l.namespaces().as_ref());
        let network = namespaces
            .into_iter()
            .flatten()
            .find(|n| n.typ() == LinuxNamespaceType::Network)
            .ok_or(NetnsError::HostNetwork)?;
        match network.path() {
            Some(path) if !path.as_os_str().is_empty() => Self::open(path).await,
            _ => Self::create().await,
        }
    }

    /// Opens the namespace at `path` (`/run/netns/…`, `/proc/<pid>/ns/net`).
    ///
    /// # Errors
    /// When it cannot be opened, is no network namespace, or is the host's.
    pub async fn open(path: &Path) -> Result<Self, NetnsError> {
        let open = |path: &Path| {
            // Not blocking: the path may turn out to be a FIFO.
            File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)
                .map_err(|source| NetnsError::Open {
                    path: path.into(),
                    source,
                })
        };
        let file = open(path)?;
        let on = fstatfs(&file).map_err(|e| NetnsError::Open {
            path: path.into(),
            source: e.into(),
        })?;
        if on.filesystem_type().0 != NSFS_MAGIC {
            return Err(NetnsError::NotANamespace(path.into()));
        }
        let identity = |f: &File| f.metadata().map(|m| (m.dev(), m.ino())).ok();
        let hosts = HOSTS.iter().filter_map(|p| open(Path::new(p)).ok());
        if hosts.into_iter().any(|h| identity(&h) == identity(&file)) {
            return Err(NetnsError::HostNetwork);
        }
        let netns = Self {
            file: Arc::new(file),
            given: Some(path.into()),
        };
        // Entering proves that it is a network namespace and not one of another kind.
        match netns.run(|| ()).await {
            Err(NetnsError::Thread { source, .. })
                if source.raw_os_error() == Some(libc::EINVAL) =>
            {
                Err(NetnsError::NotANamespace(path.into()))
            }
            Err(e) => Err(e),
            Ok(()) => Ok(netns),
        }
    }

    /// Makes a namespace that has no name: it goes when the last process and descriptor that hold
    /// it are gone, so nothing has to be cleaned up.
    ///
    /// # Errors
    /// [`NetnsError::Create`].
    pub async fn create() -> Result<Self, NetnsError> {
        let (done, made) = oneshot::channel();
        std::thread::Builder::new()
            .name("netns-create".into())
            .spawn(move || {
                let made = unshare(CloneFlags::CLONE_NEWNET)
                    .map_err(io::Error::from)
                    .and_then(|()| File::open("/proc/thread-self/ns/net"));
                let _ = done.send(made);
            })
            .map_err(NetnsError::Create)?;
        let file = made
            .await
            .map_err(|_| NetnsError::Create(io::ErrorKind::BrokenPipe.into()))?
            .map_err(NetnsError::Create)?;
        Ok(Self {
            file: Arc::new(file),
            given: None,
        })
    }

    /// A path that leads to the namespace for as long as this process lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.given.clone().unwrap_or_else(|| {
            let (pid, fd) = (std::process::id(), self.file.as_raw_fd());
            format!("/proc/{pid}/fd/{fd}").into()
        })
    }

    /// The path that the caller named; none where the namespace was made here.
    #[must_use]
    pub fn given_path(&self) -> Option<&Path> {
        self.given.as_deref()
    }

    /// Runs `f` inside the namespace, on a thread of its own that never does anything else, and
    /// gives back what it returns. Sockets made by `f` belong to the namespace for good.
    ///
    /// # Errors
    /// [`NetnsError::Thread`].
    pub async fn run<T: Send + 'static>(
        &self,
        f: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, NetnsError> {
        let failed = |source| NetnsError::Thread {
            path: self.path(),
            source,
        };
        let file = self.file.clone();
        let (done, result) = oneshot::channel();
        std::thread::Builder::new()
            .name("netns".into())
            .spawn(move || {
                let entered = setns(file.as_fd(), CloneFlags::CLONE_NEWNET);
                let _ = done.send(entered.map(|()| f()));
            })
            .map_err(failed)?;
        result
            .await
            .map_err(|_| failed(io::Error::other("the thread ended early")))?
            .map_err(|e| failed(e.into()))
    }
}

impl AsFd for PodNetns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn paths_that_are_no_network_namespace_are_refused() {
        let dir = tempfile::tempdir().expect("tempdir");
        let gone = dir.path().join("gone");
        assert!(matches!(
            PodNetns::open(&gone).await,
            Err(NetnsError::Open { .. })
        ));
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("write");
        let e = PodNetns::open(&file).await.expect_err("a file");
        assert_eq!(
            e.to_string(),
            format!("{} is not a network namespace", file.display())
        );
        let other = Path::new("/proc/self/ns/uts");
        assert!(PodNetns::open(other).await.is_err());
    }

    #[tokio::test]
    async fn host_network_is_refused_by_name() {
        let e = PodNetns::open(Path::new(HOSTS[0])).await.expect_err("own");
        assert!(e.to_string().starts_with("Host networking does not apply"));
        // Where a user may not look at the first process, nobody can join its namespace either.
        let e = PodNetns::open(Path::new(HOSTS[1])).await.expect_err("host");
        assert!(matches!(
            e,
            NetnsError::HostNetwork | NetnsError::Open { .. }
        ));
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","linux":{"namespaces":[{"type":"pid"}]}}"#,
        )
        .expect("spec");
        assert!(matches!(
            PodNetns::from_spec(&spec).await,
            Err(NetnsError::HostNetwork)
        ));
    }
}
