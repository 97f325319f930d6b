//! Every process that ends is collected here, and only here. The agent is PID 1, so its own children
//! and the orphans of all containers arrive; whoever started a process learns its exit from
//! [`Reaper::watch`].
//!
//! There is no race between a fork and this: the agent has one thread, a child is watched in the same
//! step that forks it, and the loop below runs only when that step has given way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::sys;

/// How and when a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// CLOCK_REALTIME, nanoseconds.
    pub at_unix_ns: i64,
    /// Whether a SIGKILL ended it, which is what the OOM killer sends.
    pub killed: bool,
}

/// `None` until the process has ended.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// The collector.
#[derive(Debug, Clone, Default)]
pub struct Reaper(Arc<Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>>);

impl Reaper {
    /// Watches a child; to be called in the step that has forked it.
    #[must_use]
    pub fn watch(&self, pid: i32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.watched().insert(pid, sender);
        receiver
    }

    fn watched(&self) -> std::sync::MutexGuard<'_, HashMap<i32, watch::Sender<Option<Exit>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects what ends, for ever.
    ///
    /// # Errors
    /// When SIGCHLD cannot be handled.
    pub async fn run(self) -> std::io::Result<()> {
        let mut ended = signal(SignalKind::child())?;
        loop {
            self.collect();
            ended.recv().await;
        }
    }

    /// Collects all that has ended by now.
    fn collect(&self) {
        loop {
            let Some((pid, raw)) = sys::reap() else {
                return;
            };
            let (status, killed) = match libc::WIFSIGNALED(raw) {
                true => (
                    128 + libc::WTERMSIG(raw),
                    libc::WTERMSIG(raw) == libc::SIGKILL,
                ),
                false => (libc::WEXITSTATUS(raw), false),
            };
            let exit = Exit {
                status: status as u32,
                at_unix_ns: now_unix_ns(),
                killed,
            };
            if let Some(watch) = self.watched().remove(&pid) {
                watch.send_replace(Some(exit));
            }
        }
    }
}

fn now_unix_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
