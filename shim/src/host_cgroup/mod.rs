//! The pod's cgroup on the host: shim, VM and helpers live in it, so that the limits which kubelet
//! or an operator sets above it hold for all of them, and so that one place names every process of
//! the pod. No limit is set here. Cgroup v1, v2 and both at once ("hybrid") are served alike: the
//! same path is made in every mounted hierarchy.
//!
//! A hierarchy that cannot be written (read-only, no permission) degrades: one warning, and the pod
//! runs without it, unless `strict`.

mod entrance;
mod path;
mod remove;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, setxattr};

use crate::ledger::{EntryId, Ledger, LedgerError, Resource};

pub use entrance::Entrance;
pub use path::relative_path;
pub use remove::{kill_all, remove};

/// Marks a directory that was made here, so that an empty parent can be told from one that
/// belongs to someone else. Any pod's end removes it once it is empty.
const MARK: &str = "trusted.sealpod";
/// Tries to make a path while others remove its empty parents.
const MKDIR_TRIES: u32 = 16;

/// Why a pod's cgroup could not be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `spec.linux.cgroupsPath` is not one.
    #[error(
        "Cgroup path {path:?} is refused: {reason}; allowed are /a/b/c and slice.slice:prefix:name"
    )]
    Path {
        /// As given.
        path: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A directory could not be made or joined, and `strict` was asked for.
    #[error("Cgroup {path} cannot be {action}")]
    Io {
        /// Directory.
        path: PathBuf,
        /// `made`, `joined`, `emptied` or `removed`.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Something would not go.
    #[error("Cgroup {path} still has {count} processes after SIGKILL")]
    Busy {
        /// Directory.
        path: PathBuf,
        /// Processes that are left.
        count: usize,
    },
    /// The ledger could not be written; then nothing is taken.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// A pod's cgroup, in every hierarchy that could be written.
#[derive(Debug)]
pub struct HostCgroup {
    dirs: Vec<PathBuf>,
    degraded: Vec<String>,
    ledger: Ledger,
    entry: EntryId,
}

impl HostCgroup {
    /// Makes the cgroup named by `spec.linux.cgroupsPath` (cgroupfs form `/a/b/c`, systemd form
    /// `slice:prefix:name`, or empty for `/sealpod/<id>`) in every hierarchy.
    ///
    /// # Errors
    /// [`CgroupError::Path`] for a path that is not one; [`CgroupError::Io`] only when `strict`.
    pub fn create(
        cgroups_path: &str,
        id: &str,
        ledger: &Ledger,
        strict: bool,
    ) -> Result<Self, CgroupError> {
        let relative = relative_path(cgroups_path, id)?;
        let roots = hierarchies();
        let wanted: Vec<PathBuf> = roots.iter().map(|r| r.join(&relative)).collect();
        let entry = ledger.record(Resource::Cgroup {
            paths: wanted.clone(),
        })?;
        let mut made = Self {
            dirs: Vec::new(),
            degraded: Vec::new(),
            ledger: ledger.clone(),
            entry,
        };
        if roots.is_empty() {
            made.degraded.push("no cgroup hierarchy is mounted".into());
        }
        for (root, dir) in roots.iter().zip(wanted) {
            match make(root, &dir) {
                Ok(()) => made.dirs.push(dir),
                Err(source) if strict => {
                    let action = "made";
                    let path = dir;
                    return Err(CgroupError::Io {
                        path,
                        action,
                        source,
                    });
                }
                Err(e) => made.degraded.push(format!("{}: {e}", dir.display())),
            }
        }
        if !made.degraded.is_empty() {
            tracing::warn!(
                "The pod runs outside of part of its cgroup: {}",
                made.degraded.join("; ")
            );
        }
        Ok(made)
    }

    /// The directories that were made.
    #[must_use]
    pub fn dirs(&self) -> &[PathBuf] {
        &self.dirs
    }

    /// What could not be done, one sentence for each hierarchy. Empty when all is well.
    #[must_use]
    pub fn degraded(&self) -> &[String] {
        &self.degraded
    }

    /// Where a child comes in.
    ///
    /// # Errors
    /// [`CgroupError::Io`] when a directory or its `cgroup.procs` cannot be opened.
    pub fn entrance(&self) -> Result<Entrance, CgroupError> {
        Entrance::of(&self.dirs)
    }

    /// Moves the caller out (to the hierarchy's root), kills whatever is left inside and removes
    /// the directories. Idempotent.
    ///
    /// # Errors
    /// The first directory that would not go; the ledger then still names it.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut first = Ok(());
        for dir in &self.dirs {
            let root = hierarchies().into_iter().find(|r| dir.starts_with(r));
            if let Some(root) = root.filter(|_| dir.exists()) {
                // Fails only where the shim is not inside, or the root refuses: then `remove` says.
                let _ = write(&root.join("cgroup.procs"), "0");
            }
            first = first.and(remove(dir));
        }
        first?;
        Ok(self.ledger.release(self.entry)?)
    }
}

/// Moves process `pid` (0: the caller), with all its threads, into a cgroup's directories.
///
/// # Errors
/// [`CgroupError::Io`] for the first hierarchy that refuses; the others are joined all the same.
pub fn join(dirs: &[PathBuf], pid: u32) -> Result<(), CgroupError> {
    let mut first = Ok(());
    for dir in dirs {
        let joined = write(&dir.join("cgroup.procs"), &pid.to_string());
        first = first.and(joined.map_err(|source| CgroupError::Io {
            path: dir.clone(),
            action: "joined",
            source,
        }));
    }
    first
}

/// Mount points of all cgroup hierarchies, v1 (co-mounted controllers once) and v2.
fn hierarchies() -> Vec<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    parse_mountinfo(&text)
}

/// proc_pid_mountinfo(5): the mount point is field 5; the type follows the field `-`.
fn parse_mountinfo(text: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let kind = right.split(' ').next();
        let Some(point) = left.split(' ').nth(4) else {
            continue;
        };
        let ours =
            matches!(kind, Some("cgroup" | "cgroup2")) && point.starts_with("/sys/fs/cgroup");
        if ours && !found.iter().any(|p| p == Path::new(point)) {
            found.push(point.into());
        }
    }
    found
}

/// Makes `dir` and the missing ones between `root` and it.
fn make(root: &Path, dir: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match make_once(root, dir) {
            // Another pod's end has just removed an empty parent.
            Err(e) if e.kind() == io::ErrorKind::NotFound && tries < MKDIR_TRIES => tries += 1,
            other => return other,
        }
    }
}

fn make_once(root: &Path, dir: &Path) -> io::Result<()> {
    let mut at = root.to_path_buf();
    for name in dir.strip_prefix(root).map_err(io::Error::other)? {
        at.push(name);
        match std::fs::create_dir(&at) {
            Ok(()) => {
                // Without the mark an empty parent stays behind, nothing worse.
                let _ = setxattr(&at, MARK, b"1", XattrFlags::empty());
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        fill_cpuset(&at)?;
    }
    Ok(())
}

/// A new cpuset of v1 is empty, and then nothing can join it: it gets its parent's.
fn fill_cpuset(dir: &Path) -> io::Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let (own, v1) = (dir.join(name), dir.join("cpuset.memory_migrate"));
        if !v1.exists() || !std::fs::read_to_string(&own)?.trim().is_empty() {
            continue;
        }
        if let Some(parent) = dir.parent() {
            write(&own, std::fs::read_to_string(parent.join(name))?.trim())?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let mut file: File = OpenOptions::new().write(true).open(path)?;
    file.write_all(text.as_bytes())
}

#[cfg(test)]
mod tests;
