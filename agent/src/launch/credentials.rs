//! Who the process is: limits, groups, ids, capabilities. Runs in the child, in the order in which the
//! functions stand here.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::resource::setrlimit;
use nix::sys::stat::{Mode, fstat, umask};
use nix::unistd::{Gid, Uid, fchown, setgroups, setresgid, setresuid};

use super::{LaunchError, Step};
use crate::container::plan::ProcessPlan;
use crate::sys;

/// For [`super::program::enter_working_directory`]: the process still has the agent's privileges.
pub(super) const PRIVILEGED: bool = true;

/// Keeps the container's processes from looking into this one, which still holds a copy of the agent,
/// once it has joined them. execve undoes it.
pub(super) fn hide() -> Result<(), LaunchError> {
    sys::prctl(libc::PR_SET_DUMPABLE, 0, 0)
        .map(drop)
        .step(|| "make the process undumpable".into())
}

/// Becomes user and group 0 of the user namespace, which owns all that is set up from here on.
pub(super) fn become_namespace_root() -> Result<(), LaunchError> {
    let (root, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(group, group, group)
        .and_then(|()| setresuid(root, root, root))
        .step(|| "become root of the user namespace".into())
}

/// All that needs privileges but no longer the container's construction: limits, scheduling, umask,
/// owner of the standard streams.
pub(super) fn settle(plan: &ProcessPlan) -> Result<(), LaunchError> {
    for (resource, soft, hard) in &plan.rlimits {
        setrlimit(*resource, *soft, *hard)
            .step(|| format!("set limit {resource:?} to {soft}:{hard}"))?;
    }
    if let Some(value) = plan.ioprio {
        sys::set_ioprio(value).step(|| format!("set I/O priority {value:#x}"))?;
    }
    if let Some(attr) = &plan.scheduler {
        sys::sched_setattr(attr).step(|| format!("set scheduling policy {}", attr.policy))?;
    }
    if let Some(cpus) = &plan.cpus {
        set_affinity(cpus)?;
    }
    if let Some(domain) = plan.personality {
        nix::sys::personality::set(nix::sys::personality::Persona::from_bits_retain(
            domain as libc::c_int,
        ))
        .step(|| format!("set personality {domain:#x}"))?;
    }
    umask(Mode::from_bits_truncate(plan.umask));
    own_standard_streams(plan.uid);
    Ok(())
}

fn set_affinity(list: &str) -> Result<(), LaunchError> {
    let bad = || LaunchError::text(format!("Invalid CPU list {list:?}"));
    let mut set = nix::sched::CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().map_err(|_| bad())?;
        let last: usize = last.trim().parse().map_err(|_| bad())?;
        if last >= nix::sched::CpuSet::count() {
            return Err(bad());
        }
        for cpu in first..=last {
            set.set(cpu).map_err(|_| bad())?;
        }
    }
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &set)
        .step(|| format!("set CPU affinity {list:?}"))
}

/// Gives the process its standard streams, so that it can open `/dev/stdout` again as its own user.
/// Best effort: a stream may be of a kind that has no owner to change.
fn own_standard_streams(uid: u32) {
    let (stdin, stdout, stderr) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
        let Ok(stat) = fstat(stream) else { continue };
        let null =
            stat.st_mode & libc::S_IFMT == libc::S_IFCHR && stat.st_rdev == libc::makedev(1, 3);
        if !null && stat.st_uid != uid {
            let _ = fchown(stream, Some(Uid::from_raw(uid)), None);
        }
    }
}

/// Becomes the process's user with exactly its capabilities.
pub(super) fn assume(plan: &ProcessPlan) -> Result<(), LaunchError> {
    for capability in 0..64 {
        if plan.bounding & (1 << capability) != 0 {
            continue;
        }
        match sys::prctl(libc::PR_CAPBSET_DROP, capability, 0) {
            Ok(_) => {}
            Err(Errno::EINVAL) => break, // past the last one that this kernel knows
            Err(errno) => {
                return Err(errno).step(|| format!("drop capability {capability}"));
            }
        }
    }
    sys::prctl(libc::PR_SET_KEEPCAPS, 1, 0).step(|| "keep capabilities".into())?;
    let groups: Vec<_> = plan.groups.iter().copied().map(Gid::from_raw).collect();
    match setgroups(&groups) {
        // A user namespace may forbid setgroups; without groups to set that is no loss.
        Err(Errno::EPERM) if groups.is_empty() => {}
        result => result.step(|| format!("set supplementary groups {:?}", plan.groups))?,
    }
    let gid = Gid::from_raw(plan.gid);
    setresgid(gid, gid, gid).step(|| format!("set group {}", plan.gid))?;
    let uid = Uid::from_raw(plan.uid);
    setresuid(uid, uid, uid).step(|| format!("set user {}", plan.uid))?;
    sys::prctl(libc::PR_SET_KEEPCAPS, 0, 0).step(|| "keep capabilities".into())?;
    sys::capset(&plan.caps).step(|| format!("set capabilities {:x?}", plan.caps))?;
    for capability in 0..64 {
        if plan.ambient & (1 << capability) != 0 {
            sys::prctl(
                libc::PR_CAP_AMBIENT,
                libc::PR_CAP_AMBIENT_RAISE as u64,
                capability,
            )
            .step(|| format!("raise ambient capability {capability}"))?;
        }
    }
    if plan.no_new_privileges {
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0).step(|| "set no_new_privs".into())?;
    }
    Ok(())
}
