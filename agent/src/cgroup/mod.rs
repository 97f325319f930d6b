//! The cgroups of containers: `sealpod/<container id>` in the guest's cgroup v2 hierarchy, whatever
//! path the specification names (that one is the host's). Making, filling, freezing, emptying, removing.

mod devices;
mod limits;
pub mod oom;
pub mod stats;

pub use devices::DeviceFilter;
pub use limits::{Setting, settings};

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use nix::sys::uio::pread;
use oci_spec::runtime::LinuxResources;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::sys;

/// Where the hierarchy is mounted.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// Folder of all containers, below [`MOUNT`].
pub const ROOT: &str = "/sys/fs/cgroup/sealpod";
/// Most that is read of one file; the largest, memory.stat, has a few kilobytes.
const FILE_MAX: u64 = 1 << 20;
/// How deep a container may nest groups and still be listed.
const DEPTH_MAX: usize = 32;

/// A failure on a cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A limit that cannot be expressed.
    #[error("Invalid resources: {0}")]
    Invalid(String),
    /// The kernel refused a value.
    #[error("Write {value:?} to cgroup file {file}: {source}")]
    Write {
        /// Which.
        file: String,
        /// What.
        value: String,
        /// Why not.
        source: io::Error,
    },
    /// Anything else on a cgroup's folder or files.
    #[error("{what} cgroup {path:?}: {source}")]
    Folder {
        /// What was attempted.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// An awaited state did not come.
    #[error("The container did not become {state} within {} s", limit.as_secs())]
    Timeout {
        /// Which state.
        state: &'static str,
        /// How long was waited.
        limit: Duration,
    },
}

/// Enables the controllers for containers. Called once, at boot.
///
/// # Errors
/// When the folder of all containers cannot be made. A controller that the kernel lacks is left out.
pub fn prepare() -> Result<(), CgroupError> {
    let at = Path::new(ROOT);
    match fs::create_dir(at) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
            return Err(folder("Make", at)(e));
        }
        _ => {}
    }
    for group in [Path::new(MOUNT), at] {
        let available = fs::read_to_string(group.join("cgroup.controllers")).unwrap_or_default();
        let all: String = available
            .split_whitespace()
            .map(|c| format!("+{c} "))
            .collect();
        if !all.is_empty() {
            write(&group.join("cgroup.subtree_control"), all.trim_end())?;
        }
    }
    Ok(())
}

fn folder(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::Folder { what, path, source }
}

fn write(file: &Path, value: &str) -> Result<(), CgroupError> {
    // One write(2): the kernel takes a value as a whole. Not created where it is missing: cgroupfs would
    // refuse that with EACCES.
    let written = OpenOptions::new()
        .write(true)
        .open(file)
        .and_then(|mut f| f.write_all(value.as_bytes()));
    written.map_err(|source| CgroupError::Write {
        file: file
            .strip_prefix(ROOT)
            .unwrap_or(file)
            .display()
            .to_string(),
        value: value.into(),
        source,
    })
}

/// A container's cgroup. Removing it is explicit.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    handle: OwnedFd,
    devices: Mutex<Option<DeviceFilter>>,
}

impl Cgroup {
    /// Makes a container's cgroup with its limits.
    ///
    /// # Errors
    /// Nothing is left behind then.
    pub fn create(id: &str, resources: &LinuxResources) -> Result<Self, CgroupError> {
        let path = Path::new(ROOT).join(id);
        fs::create_dir(&path).map_err(folder("Make", &path))?;
        let made = Self::fill(path.clone(), resources);
        if made.is_err() {
            let _ = fs::remove_dir(&path);
        }
        made
    }

    fn fill(path: PathBuf, resources: &LinuxResources) -> Result<Self, CgroupError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let handle =
            open(&path, flags, Mode::empty()).map_err(|e| folder("Open", &path)(e.into()))?;
        let cgroup = Self {
            path,
            handle,
            devices: Mutex::new(None),
        };
        cgroup.update(resources)?;
        Ok(cgroup)
    }

    /// Changes the limits that `resources` names; a device list replaces the one before.
    ///
    /// # Errors
    /// The first limit that the kernel refuses; those before it stay changed.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        for setting in settings(resources)? {
            self.apply(&setting)?;
        }
        if let Some(rules) = resources.devices() {
            let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            let filter = DeviceFilter::attach(self.handle.as_fd(), rules, devices.as_ref())
                .map_err(|e| folder("Filter devices of", &self.path)(e.into()))?;
            *devices = Some(filter);
        }
        Ok(())
    }

    fn apply(&self, setting: &Setting) -> Result<(), CgroupError> {
        let file = self.path.join(&setting.file);
        match write(&file, &setting.value) {
            // A controller that the guest does not have cannot restrict; where that is what the value
            // asks for anyway ("max", the default weight), nothing is lost.
            Err(CgroupError::Write { source, .. })
                if setting.optional && source.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other,
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// For a process that is to be born in it.
    #[must_use]
    pub fn handle(&self) -> BorrowedFd<'_> {
        self.handle.as_fd()
    }

    /// The cgroup that `pid` is in now, for a process that must be beside it: a container may have
    /// moved its processes down (systemd does), and then its own group takes no process.
    ///
    /// # Errors
    /// When `pid` is gone or outside this cgroup.
    pub fn handle_of(&self, pid: i32) -> io::Result<OwnedFd> {
        let file = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let line = file.lines().find_map(|l| l.strip_prefix("0::/"));
        let path = Path::new(MOUNT).join(line.unwrap_or_default());
        if !path.starts_with(&self.path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        Ok(open(&path, flags, Mode::empty())?)
    }

    /// All its processes, those of nested groups too.
    ///
    /// # Errors
    /// When the group cannot be read.
    pub fn pids(&self) -> Result<Vec<i32>, CgroupError> {
        let mut all = Vec::new();
        for group in self.groups() {
            match read_file(&group.join("cgroup.procs")) {
                Ok(text) => all.extend(text.lines().filter_map(|l| l.parse::<i32>().ok())),
                // Threaded groups list none; a nested group may go away at any time.
                Err(_) if group != self.path => {}
                Err(e) => return Err(folder("List", &self.path)(e)),
            }
        }
        Ok(all)
    }

    /// This group and those below it, parents first.
    fn groups(&self) -> Vec<PathBuf> {
        let mut all = vec![(self.path.clone(), 0)];
        let mut next = 0;
        while let Some((group, depth)) = all.get(next).cloned() {
            next += 1;
            if depth == DEPTH_MAX {
                continue;
            }
            for entry in fs::read_dir(&group).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|t| t.is_dir()) {
                    all.push((entry.path(), depth + 1));
                }
            }
        }
        all.into_iter().map(|(group, _)| group).collect()
    }

    /// Kills every process in it at once.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> Result<(), CgroupError> {
        write(&self.path.join("cgroup.kill"), "1")
    }

    /// Stops all its processes, or lets them go on, and waits until that is so.
    ///
    /// # Errors
    /// [`CgroupError::Timeout`] after `limit`.
    pub async fn freeze(&self, frozen: bool, limit: Duration) -> Result<(), CgroupError> {
        let (value, state) = if frozen {
            ("1", "paused")
        } else {
            ("0", "resumed")
        };
        write(&self.path.join("cgroup.freeze"), value)?;
        self.wait_event("frozen", value, state, limit).await
    }

    /// Kills what is left in it and removes it with all below. Idempotent.
    ///
    /// # Errors
    /// [`CgroupError::Timeout`] when a process does not die within `limit`.
    pub async fn remove(&self, limit: Duration) -> Result<(), CgroupError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        self.wait_event("populated", "0", "empty", limit).await?;
        for group in self.groups().iter().rev() {
            match fs::remove_dir(group) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(folder("Remove", group)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits until `cgroup.events` has a value.
    async fn wait_event(
        &self,
        key: &str,
        value: &str,
        state: &'static str,
        limit: Duration,
    ) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.events");
        let wait = async {
            let file = WatchedFile::open(&path)?;
            loop {
                if stats::flat(&file.read()?, key) == value.parse().ok() {
                    return Ok::<(), io::Error>(());
                }
                file.changed().await?;
            }
        };
        match timeout(limit, wait).await {
            Ok(done) => done.map_err(folder("Watch", &self.path)),
            Err(_) => Err(CgroupError::Timeout { state, limit }),
        }
    }
}

/// A file of which the kernel tells every change (POLLPRI), once it has been read.
struct WatchedFile(AsyncFd<OwnedFd>);

impl WatchedFile {
    fn open(path: &Path) -> io::Result<Self> {
        let file = open(path, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        sys::register(file, Interest::PRIORITY).map(Self)
    }

    fn read(&self) -> io::Result<String> {
        let mut text = [0; 1024]; // the files that are watched have a few short lines
        let length = pread(self.0.get_ref(), &mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..length]).into_owned())
    }

    async fn changed(&self) -> io::Result<()> {
        self.0.ready(Interest::PRIORITY).await?.clear_ready();
        Ok(())
    }
}

/// Reads a cgroup file, capped.
///
/// # Errors
/// As [`File::open`] and reading.
pub(crate) fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(FILE_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Whether an error says that a group takes no processes because it has groups with controllers below.
#[must_use]
pub fn is_not_a_leaf(errno: Errno) -> bool {
    matches!(errno, Errno::EBUSY | Errno::EOPNOTSUPP)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_controllers_file_is_not_made() {
        let dir = tempfile::tempdir().expect("folder");
        let error = write(&dir.path().join("memory.swap.max"), "0").expect_err("missing");
        let CgroupError::Write { source, .. } = error else {
            panic!("a write error")
        };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }
}
