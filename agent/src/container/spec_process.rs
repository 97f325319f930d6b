//! The process object of the OCI runtime specification, of a container's init and of an exec.
//! Translation only.

use std::ffi::CString;

use nix::sys::resource::Resource;
use oci_spec::runtime::{
    IOPriorityClass, LinuxSchedulerFlag, LinuxSchedulerPolicy, PosixRlimitType, Process, Scheduler,
};

use super::capabilities;
use super::plan::ProcessPlan;
use super::spec::{SpecError, capped, unsupported};
use crate::sys::SchedAttr;

/// Umask where the specification names none.
const UMASK: u32 = 0o022;

pub(super) fn process(
    process: &Process,
    terminal: Option<(u16, u16)>,
) -> Result<ProcessPlan, SpecError> {
    let args = strings(
        "process argument",
        process.args().as_deref().unwrap_or_default(),
    )?;
    if args.is_empty() || args[0].is_empty() {
        return Err(SpecError::Missing("process arguments"));
    }
    let cwd = process.cwd();
    if !cwd.is_absolute() || cwd.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(SpecError::Path {
            what: "working directory (it must be absolute)",
            path: cwd.clone(),
        });
    }
    let user = process.user();
    let groups = user.additional_gids().clone().unwrap_or_default();
    capped("number of groups", &groups)?;
    let (bounding, ambient, caps) = capabilities::sets(process.capabilities().as_ref());
    let mut rlimits = Vec::new();
    for limit in process.rlimits().as_deref().unwrap_or_default() {
        if limit.soft() > limit.hard() {
            return Err(unsupported(format!(
                "Resource limit {}: soft {} is above hard {}",
                limit.typ(),
                limit.soft(),
                limit.hard()
            )));
        }
        rlimits.push((resource(limit.typ()), limit.soft(), limit.hard()));
    }
    let cpus = process.exec_cpu_affinity().as_ref();
    let cpus = cpus.and_then(|a| a.cpu_affinity_final().as_ref().or(a.initial().as_ref()));
    Ok(ProcessPlan {
        args,
        env: strings(
            "environment variable",
            process.env().as_deref().unwrap_or_default(),
        )?,
        cwd: cwd.clone(),
        uid: user.uid(),
        gid: user.gid(),
        groups,
        umask: user.umask().unwrap_or(UMASK) & 0o777,
        bounding,
        ambient,
        caps,
        rlimits,
        no_new_privileges: process.no_new_privileges() == Some(true),
        oom_score_adj: process
            .oom_score_adj()
            .map(|adj| match adj {
                -1000..=1000 => Ok(adj),
                _ => Err(unsupported(format!(
                    "oomScoreAdj {adj} is not in -1000 to 1000"
                ))),
            })
            .transpose()?,
        ioprio: process.io_priority().as_ref().map(|p| {
            let class = match p.class() {
                IOPriorityClass::IoprioClassRt => 1,
                IOPriorityClass::IoprioClassBe => 2,
                IOPriorityClass::IoprioClassIdle => 3,
            };
            (class << 13) | (p.priority().clamp(0, 7) as i32)
        }),
        scheduler: process.scheduler().as_ref().map(scheduler).transpose()?,
        personality: None,
        cpus: cpus.cloned(),
        terminal: terminal.map(|size| match size {
            (0, 0) => console_size(process),
            told => told,
        }),
    })
}

/// Columns and rows that the specification gives the terminal; 0 where it gives none.
fn console_size(process: &Process) -> (u16, u16) {
    let number = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
    let size = process.console_size();
    size.map_or((0, 0), |s| (number(s.width()), number(s.height())))
}

fn strings(what: &'static str, list: &[String]) -> Result<Vec<CString>, SpecError> {
    list.iter()
        .map(|s| CString::new(s.as_str()).map_err(|_| SpecError::Nul(what)))
        .collect()
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    }
}

fn scheduler(s: &Scheduler) -> Result<SchedAttr, SpecError> {
    let policy = match s.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(unsupported("Scheduling policy SCHED_ISO is not in Linux"));
        }
    };
    let mut flags = 0;
    for flag in s.flags().as_deref().unwrap_or_default() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
            LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
        };
    }
    Ok(SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: policy as u32,
        flags,
        nice: s.nice().unwrap_or_default(),
        priority: s
            .priority()
            .unwrap_or_default()
            .try_into()
            .unwrap_or_default(),
        runtime: s.runtime().unwrap_or_default(),
        deadline: s.deadline().unwrap_or_default(),
        period: s.period().unwrap_or_default(),
    })
}
