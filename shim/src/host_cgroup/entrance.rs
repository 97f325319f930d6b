//! How a child comes into its pod's cgroup.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::fstatfs;

use super::CgroupError;

/// linux/magic.h.
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;

/// See the file's head.
#[derive(Debug)]
pub enum Entrance {
    /// The child is made in this directory, the one hierarchy (v2) that there is. A process that joins later
    /// waits until every processor has been told: 8 to 20 ms.
    Born(OwnedFd),
    /// The child writes `0` to each of these open `cgroup.procs` files.
    Joins(Vec<OwnedFd>),
}

impl Default for Entrance {
    /// It stays where its parent is.
    fn default() -> Self {
        Self::Joins(Vec::new())
    }
}

impl Entrance {
    pub(super) fn of(dirs: &[PathBuf]) -> Result<Self, CgroupError> {
        let failed = |dir: &Path| {
            let path = dir.to_owned();
            move |source| CgroupError::Io {
                path,
                action: "joined",
                source,
            }
        };
        if let [only] = dirs {
            let dir = File::open(only).map_err(failed(only))?;
            let found = fstatfs(&dir).map_err(|e| failed(only)(e.into()))?;
            if found.f_type.cast_unsigned() == CGROUP2_SUPER_MAGIC {
                return Ok(Self::Born(dir.into()));
            }
        }
        let open = |dir: &PathBuf| {
            let procs = OpenOptions::new()
                .write(true)
                .open(dir.join("cgroup.procs"));
            procs.map(OwnedFd::from).map_err(failed(dir))
        };
        Ok(Self::Joins(
            dirs.iter().map(open).collect::<Result<_, _>>()?,
        ))
    }

    /// The same with descriptors of its own.
    ///
    /// # Errors
    /// There are too many.
    pub fn try_clone(&self) -> io::Result<Self> {
        let copy = |fd: &OwnedFd| fd.as_fd().try_clone_to_owned();
        Ok(match self {
            Self::Born(dir) => Self::Born(copy(dir)?),
            Self::Joins(procs) => Self::Joins(procs.iter().map(copy).collect::<Result<_, _>>()?),
        })
    }
}
