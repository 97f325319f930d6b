//! Undoing what a pod's ledger says it holds. Called by `delete` and by a new start, in a process
//! that is not the pod's own; may be called any number of times, by several at once.

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{Entry, LedgerError, Resource, check_folder, read, remove_tree, start_time, undo_net};
use crate::attest::release;
use crate::host_cgroup;

/// How long a killed process may take to go. One that writes a core dump or waits for a dead
/// network file system takes longer, and is reported.
const KILL_PATIENCE: Duration = Duration::from_secs(5);
/// Where cgroup hierarchies are mounted; nothing elsewhere is taken for one.
const CGROUP_BASE: &str = "/sys/fs/cgroup";
/// Where PCI functions are; nothing elsewhere is taken for one.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
/// Longest name of a network link (`IFNAMSIZ` less the NUL).
const IFNAME_MAX: usize = 15;

/// What [`clean`] did.
#[derive(Debug, Default)]
pub struct CleanReport {
    /// What was undone, or found gone, in words.
    pub undone: Vec<String>,
    /// What could not be undone, and why.
    pub failed: Vec<String>,
    /// Lines of the ledger that a crash had torn.
    pub torn: usize,
}

impl CleanReport {
    /// Whether nothing is left of the pod.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failed.is_empty()
    }

    fn note(&mut self, what: impl Display, result: Result<(), impl Display>) {
        match result {
            Ok(()) => self.undone.push(what.to_string()),
            Err(e) => self.failed.push(format!("{what}: {e}")),
        }
    }
}

/// Undoes everything that the ledger of the pod folder `dir` holds, then removes the folder. First
/// all processes go, so that nothing is taken apart under a running one (the first taken, which is
/// the shim itself, goes first: with it go those that would be started meanwhile), then the rest,
/// last taken first. A folder that is not there is clean. When something fails the folder stays,
/// for another try. The calling process is spared.
#[must_use]
pub fn clean(dir: &Path) -> CleanReport {
    let mut report = CleanReport::default();
    match std::fs::symlink_metadata(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return report,
        _ => {}
    }
    let contents = match check_folder(dir)
        .map_err(|reason| LedgerError::Folder {
            path: dir.into(),
            reason,
        })
        .and_then(|()| read(dir))
    {
        Ok(contents) => contents,
        Err(e) => {
            report.note(dir.display(), Err(e));
            return report;
        }
    };
    report.torn = contents.torn;
    let held: Vec<&Entry> = contents.entries.iter().filter(|e| !e.released).collect();
    for entry in &held {
        if let (Resource::Process { name }, Some((pid, started))) = (&entry.resource, entry.process)
        {
            report.note(format!("process {name} ({pid})"), kill(pid, started));
        }
    }
    for entry in &held {
        if let Resource::Cgroup { paths } = &entry.resource {
            for path in paths.iter().filter(|p| below(p, Path::new(CGROUP_BASE), 2)) {
                let killed = host_cgroup::kill_all(path);
                if let Err(e) = killed {
                    report.note(format!("processes of {}", path.display()), Err(e));
                }
            }
        }
    }
    for entry in held.iter().rev() {
        undo(dir, &entry.resource, &mut report);
    }
    if report.is_clean() {
        report.note(format!("folder {}", dir.display()), remove_tree(dir));
    }
    report
}

fn undo(dir: &Path, resource: &Resource, report: &mut CleanReport) {
    let outside = |path: &Path| format!("not below {}: {}", dir.display(), path.display());
    match resource {
        Resource::Process { .. } => {}
        Resource::Mount { target } => {
            let result = if below(target, dir, 1) {
                unmount_all(target).map_err(|e| e.to_string())
            } else {
                Err(outside(target))
            };
            report.note(format!("mount {}", target.display()), result);
        }
        Resource::Netns { path } => {
            let result = if below(path, dir, 1) {
                unmount_all(path)
                    .and_then(|()| remove_tree(path))
                    .map_err(|e| e.to_string())
            } else {
                Err(outside(path))
            };
            report.note(format!("network namespace {}", path.display()), result);
        }
        Resource::Link { netns, name } => {
            let result = ifname(name).and_then(|()| undo_net::delete_link(netns, name));
            report.note(format!("link {name}"), result);
        }
        Resource::Qdisc {
            netns,
            ifname: name,
        } => {
            let result = ifname(name).and_then(|()| undo_net::delete_ingress(netns, name));
            report.note(format!("qdisc of {name}"), result);
        }
        Resource::Cgroup { paths } => {
            for path in paths {
                let result = if below(path, Path::new(CGROUP_BASE), 2) {
                    host_cgroup::remove(path).map_err(|e| e.to_string())
                } else {
                    Err(format!("not a cgroup below {CGROUP_BASE}"))
                };
                report.note(format!("cgroup {}", path.display()), result);
            }
        }
        Resource::VfioFunction { function } => {
            let result = if below(function, Path::new(PCI_DEVICES), 1) {
                release::give_back(function).map_err(|e| e.to_string())
            } else {
                Err(format!("not below {PCI_DEVICES}: {}", function.display()))
            };
            report.note(format!("VFIO function {}", function.display()), result);
        }
        Resource::Path { path } => {
            let result = if below(path, dir, 1) {
                remove_tree(path).map_err(|e| e.to_string())
            } else {
                Err(outside(path))
            };
            report.note(format!("path {}", path.display()), result);
        }
    }
}

/// Whether `path` is at least `depth` plain components below `base`, by its text alone.
fn below(path: &Path, base: &Path, depth: usize) -> bool {
    let Ok(rest) = path.strip_prefix(base) else {
        return false;
    };
    base.is_absolute()
        && rest.components().count() >= depth
        && rest.components().all(|c| matches!(c, Component::Normal(_)))
}

fn ifname(name: &str) -> Result<(), String> {
    let ok = |b: u8| b.is_ascii_graphic() && b != b'/';
    if (1..=IFNAME_MAX).contains(&name.len()) && name.bytes().all(ok) {
        Ok(())
    } else {
        Err("not a link's name".into())
    }
}

/// Kills process `pid` if it is the one that started at `started`, and waits until it is gone.
fn kill(pid: u32, started: u64) -> Result<(), String> {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Err("not a pid".into());
    };
    if pid == std::process::id() {
        return Ok(());
    }
    // The pidfd pins the process; the start time read after that is of the same one.
    let fd: OwnedFd = match pidfd_open(id, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(Errno::SRCH) => return Ok(()),
        Err(e) => return Err(e.to_string()),
    };
    if start_time(pid) != Some(started) {
        return Ok(());
    }
    match pidfd_send_signal(&fd, Signal::KILL) {
        Ok(()) => {}
        Err(Errno::SRCH) => return Ok(()),
        Err(e) => return Err(e.to_string()),
    }
    let patience = Timespec {
        tv_sec: KILL_PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    loop {
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)) {
            Ok(0) => return Err(format!("still there {KILL_PATIENCE:?} after SIGKILL")),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
}

/// Unmounts all that is stacked on `target`. Nothing mounted there is success.
fn unmount_all(target: &PathBuf) -> io::Result<()> {
    loop {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_paths_below_the_base_count() {
        let base = Path::new("/run/sealpod/0123");
        for good in ["/run/sealpod/0123/a", "/run/sealpod/0123/a/b"] {
            assert!(below(Path::new(good), base, 1), "{good}");
        }
        for bad in [
            "/run/sealpod/0123",
            "/run/sealpod/0123/../x",
            "/run/sealpod/0124/a",
            "run/sealpod/0123/a",
            "/etc",
            "",
        ] {
            assert!(!below(Path::new(bad), base, 1), "{bad}");
        }
        assert!(!below(Path::new("a/b"), Path::new(""), 1));
        assert!(!below(
            Path::new("/sys/fs/cgroup/cpu"),
            Path::new(CGROUP_BASE),
            2
        ));
    }
}
