//! A container's first process: forked into its namespaces and cgroup, it builds the container around
//! itself, says so, and waits for the start.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::unistd::{sethostname, setsid};

use super::channel::{self, Child};
use super::{ChildStdio, LaunchError, Launched, Step};
use super::{credentials, hooks, mounts, program, rootfs, seccomp, terminal};
use crate::container::plan::ContainerPlan;
use crate::sys;

/// Where the new PID namespace comes from.
#[derive(Debug, Clone, Copy)]
pub enum PidNamespace<'a> {
    /// A new one, whose first process this is.
    New,
    /// That of the process with this pidfd.
    Of(BorrowedFd<'a>),
    /// The agent's.
    Agent,
}

/// Forks the first process of a container; it reports on the channel of what is returned.
///
/// # Errors
/// When the process could not be made at all; nothing is left then.
pub fn spawn(
    plan: &ContainerPlan,
    stdio: &ChildStdio,
    cgroup: BorrowedFd<'_>,
    pids: PidNamespace<'_>,
) -> Result<Launched, LaunchError> {
    let (agent, ours) = channel::pair().step(|| "channel to the container's init".into())?;
    let mut flags = libc::CLONE_NEWNS | plan.namespaces;
    let target = match pids {
        PidNamespace::New => {
            flags |= libc::CLONE_NEWPID;
            None
        }
        PidNamespace::Of(pidfd) => Some(pidfd),
        PidNamespace::Agent => None,
    };
    let fork = in_pid_namespace(target, || sys::fork(flags, Some(cgroup)))
        .step(|| "fork into the container's namespaces".into())?;
    let (pid, pidfd) = match fork {
        sys::Fork::Child => super::child(&ours, || run(plan, stdio, &ours)),
        sys::Fork::Parent { pid, pidfd } => (pid, pidfd),
    };
    let launched = Launched {
        pid,
        pidfd,
        channel: agent,
    };
    prepare(plan, &launched).inspect_err(|_| {
        // Reaped like any other child; it holds nothing yet.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(pid),
            nix::sys::signal::Signal::SIGKILL,
        );
    })?;
    Ok(launched)
}

/// What only a process outside the container's user namespace may do for it.
fn prepare(plan: &ContainerPlan, launched: &Launched) -> Result<(), LaunchError> {
    let pid = launched.pid;
    if let Some((uids, gids)) = &plan.id_maps {
        for (file, map) in [("uid_map", uids), ("gid_map", gids)] {
            fs::write(format!("/proc/{pid}/{file}"), map)
                .step(|| format!("write {file} {map:?}"))?;
        }
        launched
            .channel
            .mapped()
            .step(|| "release the container's init".into())?;
    }
    set_oom_score(pid, plan.process.oom_score_adj)
}

/// Sets the OOM score of a child, from outside: lowering it needs a capability that it may not have.
pub(super) fn set_oom_score(pid: i32, score: Option<i32>) -> Result<(), LaunchError> {
    let Some(score) = score else { return Ok(()) };
    fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string())
        .step(|| format!("set oom_score_adj {score}"))
}

/// Forks with the children's PID namespace switched to that of `target`, then back. Nothing of the
/// agent itself changes: setns with a PID namespace concerns children only (pid_namespaces(7)).
pub(super) fn in_pid_namespace(
    target: Option<BorrowedFd<'_>>,
    fork: impl FnOnce() -> nix::Result<sys::Fork>,
) -> nix::Result<sys::Fork> {
    let Some(target) = target else { return fork() };
    let own = fs::File::open("/proc/self/ns/pid")
        .map_err(|e| nix::errno::Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    sys::setns(target, libc::CLONE_NEWPID)?;
    let forked = fork();
    if !matches!(forked, Ok(sys::Fork::Child)) {
        sys::setns(own.as_fd(), libc::CLONE_NEWPID)?;
    }
    forked
}

/// The child, from the fork to execve.
fn run(
    plan: &ContainerPlan,
    stdio: &ChildStdio,
    channel: &Child,
) -> Result<std::convert::Infallible, LaunchError> {
    let mut keep: Vec<_> = stdio.descriptors().map(|fd| fd.as_raw_fd()).collect();
    keep.push(channel.as_fd().as_raw_fd());
    sys::close_all_but(&mut keep).step(|| "close the agent's descriptors".into())?;
    credentials::hide()?;
    sys::reset_signals();
    sys::set_name(c"sealpod:init");
    if plan.id_maps.is_some() {
        channel
            .wait_mapped()
            .step(|| "wait for the user namespace's maps".into())?;
        credentials::become_namespace_root()?;
    }
    setsid().step(|| "setsid".into())?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)
        .step(|| "new cgroup namespace".into())?;
    if let Some(name) = &plan.hostname {
        sethostname(name).step(|| format!("set host name {name:?}"))?;
    }
    if let Some(name) = &plan.domainname {
        sys::setdomainname(name).step(|| format!("set domain name {name:?}"))?;
    }
    stdio.install()?;
    let filter = compile_filter(plan, channel)?;

    rootfs::enter(plan)?;
    for (path, value) in &plan.sysctls {
        let file = std::path::Path::new("/proc/sys").join(path);
        fs::write(&file, value).step(|| format!("write sysctl {}={value:?}", path.display()))?;
    }
    if let Some(size) = plan.process.terminal {
        let master = terminal::open(size, plan.process.uid)?;
        terminal::mount_console()?;
        channel
            .terminal(master.as_fd())
            .step(|| "hand over the terminal".into())?;
    }
    let process = &plan.process;
    program::make_working_directory(&process.cwd);
    mounts::protect(plan)?;
    credentials::settle(process)?;
    let entered = program::enter_working_directory(process, credentials::PRIVILEGED)?;
    let load = |filter: &Option<seccomp::Program>| filter.as_ref().map_or(Ok(()), |f| f.load());
    if !process.no_new_privileges {
        load(&filter)?; // needs CAP_SYS_ADMIN, which the next step may drop
    }
    credentials::assume(process)?;
    if !entered {
        program::enter_working_directory(process, !credentials::PRIVILEGED)?;
    }
    let program = program::Program::find(process)?;

    channel.ready().step(|| "report readiness".into())?;
    channel.wait_go().step(|| "wait for the start".into())?;
    hooks::run(plan)?;
    if process.no_new_privileges {
        load(&filter)?;
    }
    program.execute()
}

/// Compiles the container's seccomp profile, here rather than in the agent: it takes memory and time
/// that the agent does not have. The agent keeps the result for execs.
fn compile_filter(
    plan: &ContainerPlan,
    channel: &Child,
) -> Result<Option<seccomp::Program>, LaunchError> {
    let Some(profile) = &plan.seccomp else {
        return Ok(None);
    };
    let (program, file) = seccomp::compile(profile)?;
    channel
        .seccomp(file.as_fd())
        .step(|| "hand over the seccomp program".into())?;
    Ok(Some(program))
}
