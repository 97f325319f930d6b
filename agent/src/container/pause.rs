//! The pod's PID namespace, for containers that share one: made at first use and held by a process of
//! the agent's that only collects orphans there.

use std::os::fd::OwnedFd;
use std::sync::Mutex;

use nix::sys::signal::{SigSet, Signal};

use super::ContainerError;
use crate::launch::LaunchError;
use crate::reaper::{ExitWatch, Reaper};
use crate::sys;

/// The namespace, once it exists.
#[derive(Debug, Default)]
pub(super) struct PodPids(Mutex<Option<(OwnedFd, ExitWatch)>>);

impl PodPids {
    /// A pidfd of the process that holds the namespace.
    pub(super) fn holder(&self, reaper: &Reaper) -> Result<OwnedFd, ContainerError> {
        let mut holder = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let lost = holder
            .as_ref()
            .is_none_or(|(_, exit)| exit.borrow().is_some());
        if lost {
            let fork = sys::fork(libc::CLONE_NEWPID, None).map_err(|errno| LaunchError::Step {
                what: "make the pod's PID namespace".into(),
                errno,
            })?;
            match fork {
                sys::Fork::Child => collect_orphans(),
                sys::Fork::Parent { pid, pidfd } => *holder = Some((pidfd, reaper.watch(pid))),
            }
        }
        let held = holder.as_ref().map(|(pidfd, _)| pidfd.try_clone());
        held.transpose()
            .map_err(ContainerError::Streams)?
            .ok_or(ContainerError::Gone)
    }
}

/// PID 1 of the namespace, for ever.
fn collect_orphans() -> ! {
    let _ = sys::close_all_but(&mut []);
    sys::reset_signals();
    sys::set_name(c"pause");
    let mut orphans = SigSet::empty();
    orphans.add(Signal::SIGCHLD);
    // Blocked, so that one which ends between the two steps below stays pending.
    let _ = orphans.thread_block();
    loop {
        while sys::reap().is_some() {}
        let _ = orphans.wait();
    }
}
