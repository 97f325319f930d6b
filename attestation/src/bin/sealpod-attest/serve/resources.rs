//! The resource store: files `<repository>/<type>/<tag>` below one folder. A name is letters, digits
//! and `._-` and does not begin with a dot; the kernel keeps every look-up below the folder, links
//! included, so that a Kubernetes secret can be the store.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags};

/// Longest resource.
const MAX_RESOURCE: u64 = 1 << 20;
/// Longest name.
const MAX_NAME: usize = 128;

/// Why there is no resource.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResourceError {
    /// A name that no resource has.
    #[error("A resource is named by three parts of letters, digits and ._-, none with a dot first")]
    Name,
    /// Not there.
    #[error("There is no resource of this name")]
    Absent,
    /// There, but not to be given out.
    #[error("Resource is not a file of at most {MAX_RESOURCE} bytes")]
    Kind,
    /// The store failed.
    #[error("Resource store failed")]
    Store(#[from] std::io::Error),
}

/// A folder of resources.
#[derive(Debug)]
pub(crate) struct Resources(File);

impl Resources {
    /// Opens the folder.
    pub(crate) fn open(folder: &Path) -> std::io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(folder, flags, Mode::empty())?;
        Ok(Self(fd.into()))
    }

    /// Reads the resource of a path `<repository>/<type>/<tag>`.
    pub(crate) fn read(&self, path: &str) -> Result<Vec<u8>, ResourceError> {
        if path.split('/').count() != 3 || !path.split('/').all(is_name) {
            return Err(ResourceError::Name);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let opened = rustix::fs::openat2(self.0.as_fd(), path, flags, Mode::empty(), resolve);
        let file = match opened {
            Ok(fd) => File::from(fd),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
                return Err(ResourceError::Absent);
            }
            // A link that leads out of the store.
            Err(rustix::io::Errno::XDEV | rustix::io::Errno::LOOP) => {
                return Err(ResourceError::Kind);
            }
            Err(error) => return Err(ResourceError::Store(error.into())),
        };
        let meta = file.metadata()?;
        if !meta.is_file() || meta.len() > MAX_RESOURCE {
            return Err(ResourceError::Kind);
        }
        let mut bytes = Vec::new();
        file.take(MAX_RESOURCE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_RESOURCE {
            return Err(ResourceError::Kind);
        }
        Ok(bytes)
    }
}

/// Whether a text may name a part of a resource.
pub(crate) fn is_name(text: &str) -> bool {
    let ok = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=MAX_NAME).contains(&text.len()) && !text.starts_with('.') && text.bytes().all(ok)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn store() -> (tempfile::TempDir, Resources) {
        let folder = tempfile::tempdir().unwrap();
        let store = folder.path().join("store");
        std::fs::create_dir_all(store.join("default/key")).unwrap();
        std::fs::write(store.join("default/key/one"), b"secret").unwrap();
        std::fs::write(folder.path().join("outside"), b"not yours").unwrap();
        let resources = Resources::open(&store).unwrap();
        (folder, resources)
    }

    #[test]
    fn a_resource_is_read() {
        assert_eq!(store().1.read("default/key/one").unwrap(), b"secret");
    }

    #[test]
    fn no_name_leads_out_of_the_store() {
        let (folder, resources) = store();
        for path in [
            "../outside",
            "default/../../outside",
            "default/key/../one",
            "default/key",
            "default//one",
            "/default/key/one",
            "default/key/one/",
            "default/key/.hidden",
            "default/key/a b",
            "default/key/%2e%2e",
            "default/key/one\0",
        ] {
            let read = resources.read(path);
            assert!(matches!(read, Err(ResourceError::Name)), "{path:?}");
        }
        let key = folder.path().join("store/default/key");
        symlink("../../../outside", key.join("up")).unwrap();
        symlink(folder.path().join("outside"), key.join("absolute")).unwrap();
        symlink("one", key.join("beside")).unwrap();
        for name in ["up", "absolute"] {
            let read = resources.read(&format!("default/key/{name}"));
            assert!(matches!(read, Err(ResourceError::Kind)), "{name}");
        }
        assert_eq!(resources.read("default/key/beside").unwrap(), b"secret");
    }

    #[test]
    fn what_is_no_file_or_too_large_is_not_given_out() {
        let (folder, resources) = store();
        let key = folder.path().join("store/default/key");
        std::fs::create_dir(key.join("folder")).unwrap();
        let large = File::create(key.join("large")).unwrap();
        large.set_len(MAX_RESOURCE + 1).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, key.join("fifo"), Mode::RUSR).unwrap();
        for name in ["folder", "large", "fifo"] {
            let read = resources.read(&format!("default/key/{name}"));
            assert!(matches!(read, Err(ResourceError::Kind)), "{name}");
        }
        let read = resources.read("default/key/two");
        assert!(matches!(read, Err(ResourceError::Absent)));
    }
}
