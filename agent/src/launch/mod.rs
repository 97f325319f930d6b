//! Making processes: the fork, what the child does with itself until execve, and the channel on which
//! it says how far it came. One fork makes a process, with all its namespaces and its cgroup at once.
//!
//! ```text
//! agent                                   child
//!   │── clone3(namespaces, cgroup) ─────────▶│
//!   │   (uid_map, gid_map written)           │
//!   │── M ──────────────────────────────────▶│  only with a user namespace
//!   │◀──────────────────────── P + terminal ─│  only with a terminal
//!   │◀───────────────── S + seccomp program ─│  only a container's init, only with a profile
//!   │◀──────────────────────────────────── R │  only a container's init: all is prepared
//!   │── G ──────────────────────────────────▶│  only a container's init: StartContainer
//!   │◀──────────────────── E text, or end ───│  failed, or execve has closed the channel
//! ```
//! The agent has one thread (it runs a current-thread runtime and no blocking pool), so the child of a
//! fork may use everything that it has copied. [`crate::sys::fork`] checks it.

mod channel;
mod credentials;
mod devices;
mod hooks;
mod init;
mod join;
mod mounts;
mod program;
mod rootfs;
mod seccomp;
mod terminal;

pub use channel::{Agent as AgentChannel, Report};
pub use init::{PidNamespace, spawn as spawn_init};
pub use join::{Target as JoinTarget, spawn as spawn_exec};
pub(crate) use mounts::{ensure_folder, open_inside};
pub use rootfs::STAGE;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::sys;

/// A step that failed: what was attempted, and the kernel's answer.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A system call failed.
    #[error("{what}: {}", describe(*errno))]
    Step {
        /// What was attempted, on what.
        what: String,
        /// The kernel's answer.
        errno: Errno,
    },
    /// A failure in words that clients know (the texts of runc).
    #[error("{0}")]
    Text(String),
}

impl LaunchError {
    fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }
}

/// The text of an error number as C and Go programs print it: lower case.
pub fn describe(errno: Errno) -> String {
    errno.desc().to_lowercase()
}

/// Names the step that a system call belongs to.
trait Step<T> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError> {
        self.map_err(|errno| LaunchError::Step {
            what: what(),
            errno,
        })
    }
}

impl<T> Step<T> for std::io::Result<T> {
    fn step(self, what: impl FnOnce() -> String) -> Result<T, LaunchError> {
        self.map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
            .step(what)
    }
}

/// The child's ends of its standard streams; where there is none it gets `/dev/null`. All absent with
/// a terminal.
#[derive(Debug, Default)]
pub struct ChildStdio {
    /// Read end.
    pub stdin: Option<OwnedFd>,
    /// Write end.
    pub stdout: Option<OwnedFd>,
    /// Write end.
    pub stderr: Option<OwnedFd>,
}

impl ChildStdio {
    fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [&self.stdin, &self.stdout, &self.stderr]
            .into_iter()
            .flatten()
            .map(AsFd::as_fd)
    }

    /// Makes them descriptors 0, 1 and 2.
    fn install(&self) -> Result<(), LaunchError> {
        let null = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .step(|| "open /dev/null".into())?;
        for (number, fd) in (0..).zip([&self.stdin, &self.stdout, &self.stderr]) {
            let fd = fd.as_ref().map_or(null.as_fd(), AsFd::as_fd);
            sys::make_standard(fd, number).step(|| format!("standard descriptor {number}"))?;
        }
        Ok(())
    }
}

/// A process that has been forked; its set-up goes on by itself.
#[derive(Debug)]
pub struct Launched {
    /// Pid in the guest.
    pub pid: i32,
    /// Handle of the process, for joining its namespaces.
    pub pidfd: OwnedFd,
    /// Where the child reports.
    pub channel: AgentChannel,
}

/// The child's whole life until execve. Ends the process with a report when `run` fails.
fn child(
    channel: &channel::Child,
    run: impl FnOnce() -> Result<std::convert::Infallible, LaunchError>,
) -> ! {
    let Err(error) = run();
    channel.failed(&error.to_string());
    sys::exit_now(1)
}
