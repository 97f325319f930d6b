//! Emptying and removing cgroup directories, from within the pod or long after it, by path alone.

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::getxattr;
use rustix::process::{Pid, Signal, kill_process};

use super::{CgroupError, MARK, hierarchies, write};

/// How long processes may take to go after SIGKILL.
const PATIENCE: Duration = Duration::from_secs(5);
/// Pause between looks: neither version tells when a cgroup of v1 is empty.
const PAUSE: Duration = Duration::from_millis(2);
/// Deepest tree that is followed.
const DEPTH_MAX: usize = 16;

/// Kills every process in `dir` and below it, but not the caller, and waits until they are gone.
/// A directory that is not there is empty.
///
/// # Errors
/// [`CgroupError::Busy`] when some would not go, [`CgroupError::Io`] when it cannot be read.
pub fn kill_all(dir: &Path) -> Result<(), CgroupError> {
    let io = |source| CgroupError::Io {
        path: dir.into(),
        action: "emptied",
        source,
    };
    let until = Instant::now() + PATIENCE;
    let freezer = dir.join("freezer.state");
    loop {
        let pids = strangers(dir).map_err(io)?;
        if pids.is_empty() {
            return Ok(());
        }
        if Instant::now() > until {
            let count = pids.len();
            let path = dir.into();
            return Err(CgroupError::Busy { path, count });
        }
        // v2 since 5.14 kills all at once, forks in flight included.
        let inside = pids_of(dir).map_err(io)?.contains(&std::process::id());
        if inside || write(&dir.join("cgroup.kill"), "1").is_err() {
            // v1: frozen processes cannot fork while each is sent its signal.
            if !inside {
                let _ = write(&freezer, "FROZEN");
            }
            for pid in pids {
                if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                    let _ = kill_process(pid, Signal::KILL);
                }
            }
        }
        let _ = write(&freezer, "THAWED");
        std::thread::sleep(PAUSE);
    }
}

/// Empties `dir` as [`kill_all`] does and removes it, what is below it, and each parent that was
/// made for a pod and is empty now. A directory that is not there is removed.
///
/// # Errors
/// As [`kill_all`]; `EBUSY` when the caller itself stays inside.
pub fn remove(dir: &Path) -> Result<(), CgroupError> {
    kill_all(dir)?;
    let until = Instant::now() + PATIENCE;
    loop {
        match remove_below(dir, DEPTH_MAX) {
            Ok(()) => break,
            // A dead process leaves its cgroup a moment after it can be waited for; and a thread of the
            // caller that was ending when the caller moved out is left behind until it has ended.
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && Instant::now() < until => {
                std::thread::sleep(PAUSE);
            }
            Err(e) => return Err(failed(dir, e)),
        }
    }
    let roots = hierarchies();
    for parent in dir.ancestors().skip(1) {
        let is_root = roots.iter().any(|r| r == parent);
        if is_root || !marked(parent) || std::fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

fn failed(dir: &Path, source: io::Error) -> CgroupError {
    CgroupError::Io {
        path: dir.into(),
        action: "removed",
        source,
    }
}

fn marked(dir: &Path) -> bool {
    let mut value = [0u8; 8];
    getxattr(dir, MARK, &mut value).is_ok()
}

fn remove_below(dir: &Path, depth: usize) -> io::Result<()> {
    for child in children(dir)? {
        if depth == 0 {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        remove_below(&child, depth - 1)?;
    }
    match std::fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn children(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let folders = entries.filter_map(|e| {
        let e = e.ok()?;
        e.file_type().ok()?.is_dir().then(|| e.path())
    });
    Ok(folders.collect())
}

/// All processes in `dir` and below, without the caller.
fn strangers(dir: &Path) -> io::Result<Vec<u32>> {
    let mut all = Vec::new();
    collect(dir, DEPTH_MAX, &mut all)?;
    all.retain(|p| *p != std::process::id());
    Ok(all)
}

fn collect(dir: &Path, depth: usize, all: &mut Vec<u32>) -> io::Result<()> {
    all.extend(pids_of(dir)?);
    if depth > 0 {
        for child in children(dir)? {
            collect(&child, depth - 1, all)?;
        }
    }
    Ok(())
}

fn pids_of(dir: &Path) -> io::Result<Vec<u32>> {
    match std::fs::read_to_string(dir.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|l| l.parse().ok()).collect()),
        // ENODEV: removed while open.
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ENODEV) => {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}
