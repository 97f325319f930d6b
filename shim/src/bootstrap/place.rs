//! Where a pod lives on the host: one folder, named after who it is, short enough for socket paths.

use std::{
    hash::Hasher,
    io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
};

/// A bundle's file that names its pod's folder, for `delete`, which is told nothing else.
const POINTER: &str = "sealpod-pod-dir";

/// A pod's folder and what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    dir: PathBuf,
}

impl Place {
    /// The folder of the pod `id` of `namespace` of the containerd at `address`, below `state_dir`.
    #[must_use]
    pub fn new(state_dir: &Path, address: &str, namespace: &str, id: &str) -> Self {
        // Not secret and not hostile: ids are unique within a containerd, names are checked.
        let mut hash = Fnv(0xcbf2_9ce4_8422_2325);
        for part in [address, namespace, id] {
            hash.write(part.as_bytes());
            hash.write(&[0]);
        }
        Self {
            dir: state_dir.join(format!("{:016x}", hash.finish())),
        }
    }

    /// The folder of the shim's socket that `start` named.
    #[must_use]
    pub fn of(socket: &Path) -> Self {
        let dir = socket.parent().unwrap_or(socket);
        Self { dir: dir.into() }
    }

    /// The folder that `start` noted in `bundle`, if it did.
    ///
    /// # Errors
    /// A note that cannot be read.
    pub fn noted_in(bundle: &Path) -> io::Result<Option<Self>> {
        match std::fs::read_to_string(bundle.join(POINTER)) {
            Ok(dir) if dir.starts_with('/') => Ok(Some(Self { dir: dir.into() })),
            Ok(other) => Err(io::Error::new(io::ErrorKind::InvalidData, other)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Notes the folder in `bundle`.
    ///
    /// # Errors
    /// Writing.
    pub fn note_in(&self, bundle: &Path) -> io::Result<()> {
        std::fs::write(bundle.join(POINTER), self.dir.to_string_lossy().as_bytes())
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The shim's ttrpc socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("shim.sock")
    }

    /// The same, as containerd wants it.
    #[must_use]
    pub fn address(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Id of the task that the pod belongs to, as far as its shim came to write it down.
    #[must_use]
    pub fn owner(&self) -> Option<String> {
        crate::podfile::PodFile::read(&self.dir).ok().map(|p| p.id)
    }

    /// Whether a shim answers there.
    #[must_use]
    pub fn answers(&self) -> bool {
        UnixStream::connect(self.socket()).is_ok()
    }
}

/// FNV-1a, 64 bits: the same name in every build, which std's hasher does not promise.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_short_stable_and_its_own() {
        let place = |a, n, i| Place::new(Path::new("/run/sealpod"), a, n, i);
        let longest = "x".repeat(76);
        let p = place("/c.sock", "ns", &longest);
        assert!(p.dir().join("vsock.sock_1024").as_os_str().len() < 60);
        assert_eq!(p, place("/c.sock", "ns", &longest));
        assert_ne!(place("/c", "a", "bc"), place("/c", "ab", "c"));
    }

    #[test]
    fn a_bundle_leads_back_to_its_pod() -> io::Result<()> {
        let bundle = tempfile::tempdir()?;
        assert_eq!(Place::noted_in(bundle.path())?, None);
        let place = Place::new(Path::new("/run/sealpod"), "a", "n", "i");
        place.note_in(bundle.path())?;
        assert_eq!(Place::noted_in(bundle.path())?, Some(place));
        Ok(())
    }
}
