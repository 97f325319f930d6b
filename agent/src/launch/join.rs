//! A further process in a running container: forked into its PID namespace and cgroup, it joins the
//! other namespaces of the container's init and executes its program at once.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::unistd::setsid;

use super::channel::{self, Child};
use super::{ChildStdio, LaunchError, Launched, Step};
use super::{credentials, init, program, seccomp, terminal};
use crate::container::plan::ProcessPlan;
use crate::sys;

/// The container that a process joins.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// Its init.
    pub init: BorrowedFd<'a>,
    /// Whether it has a user namespace of its own.
    pub user_namespace: bool,
    /// Its seccomp program.
    pub seccomp: Option<BorrowedFd<'a>>,
    /// Folder of the cgroup that the process is born in.
    pub cgroup: BorrowedFd<'a>,
}

/// Forks a process into a container; it reports on the channel of what is returned.
///
/// # Errors
/// When the process could not be made at all; nothing is left then.
pub fn spawn(
    plan: &ProcessPlan,
    stdio: &ChildStdio,
    target: Target<'_>,
) -> Result<Launched, LaunchError> {
    let (agent, ours) = channel::pair().step(|| "channel to the process".into())?;
    let fork = init::in_pid_namespace(Some(target.init), || sys::fork(0, Some(target.cgroup)))
        .step(|| "fork into the container".into())?;
    let (pid, pidfd) = match fork {
        sys::Fork::Child => super::child(&ours, || run(plan, stdio, target, &ours)),
        sys::Fork::Parent { pid, pidfd } => (pid, pidfd),
    };
    init::set_oom_score(pid, plan.oom_score_adj)?;
    Ok(Launched {
        pid,
        pidfd,
        channel: agent,
    })
}

/// The child, from the fork to execve.
fn run(
    plan: &ProcessPlan,
    stdio: &ChildStdio,
    target: Target<'_>,
    channel: &Child,
) -> Result<std::convert::Infallible, LaunchError> {
    let mut keep: Vec<_> = stdio.descriptors().map(|fd| fd.as_raw_fd()).collect();
    keep.extend([channel.as_fd().as_raw_fd(), target.init.as_raw_fd()]);
    keep.extend(target.seccomp.map(|fd| fd.as_raw_fd()));
    sys::close_all_but(&mut keep).step(|| "close the agent's descriptors".into())?;
    credentials::hide()?;
    sys::reset_signals();
    stdio.install()?;
    let filter = target.seccomp.map(seccomp::Program::read).transpose()?;

    let mut namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS | libc::CLONE_NEWCGROUP;
    if target.user_namespace {
        namespaces |= libc::CLONE_NEWUSER;
    }
    sys::setns(target.init, namespaces).step(|| "join the container's namespaces".into())?;
    if target.user_namespace {
        credentials::become_namespace_root()?;
    }
    setsid().step(|| "setsid".into())?;
    if let Some(size) = plan.terminal {
        let master = terminal::open(size, plan.uid)?;
        channel
            .terminal(master.as_fd())
            .step(|| "hand over the terminal".into())?;
    }
    credentials::settle(plan)?;
    let entered = program::enter_working_directory(plan, credentials::PRIVILEGED)?;
    let load = || filter.as_ref().map_or(Ok(()), seccomp::Program::load);
    if !plan.no_new_privileges {
        load()?;
    }
    credentials::assume(plan)?;
    if !entered {
        program::enter_working_directory(plan, !credentials::PRIVILEGED)?;
    }
    let program = program::Program::find(plan)?;
    if plan.no_new_privileges {
        load()?;
    }
    program.execute()
}
