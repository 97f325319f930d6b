//! What a child does between its making and its program: system calls only, on memory that was
//! prepared before. Nothing here may allocate, lock, or call into anything that might: the child is
//! a copy of one thread of a process whose other threads may have held any lock.
//!
//! Ids are changed by raw system calls: the C library's wrappers would signal threads that the
//! child does not have.

#![expect(
    unsafe_code,
    reason = "the code between clone and exec is system calls only"
)]

use std::ffi::{CString, c_char, c_int, c_long};
use std::os::fd::RawFd;
use std::ptr::{null, null_mut};

use super::enter::enter_jail;
use super::jail::Step;

/// The step that failed. `Jail` is followed by the number of the jail's step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Stage {
    Cgroup = 1,
    Root,
    Jail,
    Pivot,
    Fds,
    Limits,
    Capabilities,
    User,
    NoNewPrivs,
    Parent,
    Exec,
}

/// What is written to the report pipe on failure.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) stage: u32,
    pub(super) index: u32,
    pub(super) errno: i32,
}

impl Report {
    pub(super) const SIZE: usize = 12;

    fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..4].copy_from_slice(&self.stage.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.index.to_ne_bytes());
        bytes[8..].copy_from_slice(&self.errno.to_ne_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok();
        Some(Self {
            stage: u32::from_ne_bytes(word(0)?),
            index: u32::from_ne_bytes(word(4)?),
            errno: i32::from_ne_bytes(word(8)?),
        })
    }
}

/// The failed step, in words.
pub(super) fn describe(report: &Report, steps: &[Step]) -> String {
    const STAGES: [(Stage, &str); 9] = [
        (Stage::Cgroup, "join its cgroup"),
        (Stage::Root, "mount its root"),
        (Stage::Pivot, "change to its root"),
        (Stage::Fds, "number its descriptors (needs Linux 5.11)"),
        (Stage::Limits, "set its resource limits"),
        (Stage::Capabilities, "drop capabilities"),
        (Stage::User, "change to its user"),
        (Stage::NoNewPrivs, "set no_new_privs"),
        (Stage::Parent, "tie it to the shim's life"),
    ];
    if report.stage == Stage::Jail as u32 {
        let step = usize::try_from(report.index)
            .ok()
            .and_then(|i| steps.get(i));
        return step.map_or_else(|| "build its root".into(), Step::describe);
    }
    let named = STAGES.iter().find(|(s, _)| *s as u32 == report.stage);
    named.map_or("an unknown step", |(_, text)| text).into()
}

/// Everything the child needs, made before it.
#[derive(Debug)]
pub(super) struct Plan<'a> {
    program: CString,
    /// Keep the strings that the pointers below point to.
    _args: Vec<CString>,
    _env: Vec<CString>,
    argv: Vec<*const c_char>,
    envp: Vec<*const c_char>,
    /// Becomes descriptor 0, 1, 2, 3 and so on.
    fds: Vec<RawFd>,
    /// Room for their numbers on the way.
    moved: Vec<RawFd>,
    /// Pidfd of the parent: readable once that has ended.
    pub(super) parent: RawFd,
    /// Directory of the cgroup that it is made in.
    pub(super) born_in: Option<RawFd>,
    /// `cgroup.procs` files of those that it joins.
    pub(super) joins: Vec<RawFd>,
    pub(super) jail: Option<CString>,
    pub(super) steps: &'a [Step],
    pub(super) user: Option<(u32, u32)>,
    pub(super) capabilities: u64,
    pub(super) rlimits: &'a [(libc::__rlimit_resource_t, u64)],
}

impl Plan<'_> {
    pub(super) fn new(
        program: CString,
        args: Vec<CString>,
        env: Vec<CString>,
        fds: Vec<RawFd>,
    ) -> Self {
        let pointers = |texts: &[CString]| {
            let all = texts.iter().map(|t| t.as_ptr());
            all.chain([null()]).collect::<Vec<_>>()
        };
        Self {
            argv: pointers(&args),
            envp: pointers(&env),
            program,
            _args: args,
            _env: env,
            moved: vec![-1; fds.len()],
            fds,
            parent: -1,
            born_in: None,
            joins: Vec::new(),
            jail: None,
            steps: &[],
            user: None,
            capabilities: 0,
            rlimits: &[],
        }
    }
}

/// A failed step, with the number of the jail's step.
pub(super) struct Failed(pub(super) Stage, pub(super) usize);

/// The child. Carries `plan` out; on failure writes a [`Report`] to `report` and exits.
///
/// # Safety
/// Only in a process just cloned, with all signals blocked, whose other threads are not there.
pub(super) unsafe fn run(plan: &mut Plan<'_>, report: RawFd) -> ! {
    let mut report = report;
    // SAFETY: forwarded from the caller.
    let Failed(stage, index) = unsafe { carry_out(plan, &mut report) };
    let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    let text = Report {
        stage: stage as u32,
        index: u32::try_from(index).unwrap_or(u32::MAX),
        errno,
    }
    .encode();
    // SAFETY: plain system calls; `text` lives until they are done.
    unsafe {
        libc::write(report, text.as_ptr().cast(), text.len());
        libc::_exit(127)
    }
}

/// `Ok` for a system call that did not return -1.
pub(super) fn check(result: impl Into<c_long>, stage: Stage, index: usize) -> Result<(), Failed> {
    if result.into() == -1 {
        Err(Failed(stage, index))
    } else {
        Ok(())
    }
}

/// Returns only what failed.
///
/// # Safety
/// As [`run`].
unsafe fn carry_out(plan: &mut Plan<'_>, report: &mut RawFd) -> Failed {
    // SAFETY: forwarded from `run`.
    match unsafe { prepare(plan, report) } {
        Err(failed) => failed,
        Ok(()) => {
            // SAFETY: the strings and the NULL-ended arrays live in `plan`.
            unsafe {
                libc::execve(
                    plan.program.as_ptr(),
                    plan.argv.as_ptr(),
                    plan.envp.as_ptr(),
                );
            }
            Failed(Stage::Exec, 0)
        }
    }
}

/// All that comes before the program: cgroup, namespaces, jail, descriptors, limits, capabilities, user.
///
/// # Safety
/// As [`run`].
unsafe fn prepare(plan: &mut Plan<'_>, report: &mut RawFd) -> Result<(), Failed> {
    // SAFETY: system calls on memory of `plan`, in a process of one thread. The order matters: what
    // needs privileges or the old root comes before what takes them away.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::umask(0o022);
        libc::setsid();
        for fd in &plan.joins {
            check(
                libc::write(*fd, c"0".as_ptr().cast(), 1) as c_long,
                Stage::Cgroup,
                0,
            )?;
        }
        if let Some(root) = &plan.jail {
            enter_jail(root, plan.steps, plan.user)?;
        }
        number_fds(plan, report)?;
        for (resource, value) in plan.rlimits {
            let limit = libc::rlimit {
                rlim_cur: *value,
                rlim_max: *value,
            };
            check(
                libc::setrlimit(*resource, &raw const limit),
                Stage::Limits,
                0,
            )?;
        }
        drop_capabilities(plan.capabilities)?;
        if let Some((uid, gid)) = plan.user {
            let none: *const libc::gid_t = null();
            check(libc::syscall(libc::SYS_setgroups, 0, none), Stage::User, 0)?;
            check(
                libc::syscall(libc::SYS_setresgid, gid, gid, gid),
                Stage::User,
                0,
            )?;
            check(
                libc::syscall(libc::SYS_setresuid, uid, uid, uid),
                Stage::User,
                0,
            )?;
        }
        check(
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
            Stage::NoNewPrivs,
            0,
        )?;
        // Last, because a change of user clears it.
        check(
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL),
            Stage::Parent,
            0,
        )?;
        // The parent may have ended before that; its pidfd was moved with the others and tells.
        let mut ended = libc::pollfd {
            fd: plan.parent,
            events: libc::POLLIN,
            revents: 0,
        };
        if libc::poll(&raw mut ended, 1, 0) != 0 {
            return Err(Failed(Stage::Parent, 0));
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, null_mut());
    }
    Ok(())
}

/// Gives the descriptors their numbers and marks all others to be closed at exec. First all move
/// out of the way, so that none is overwritten before its turn.
///
/// # Safety
/// As [`run`].
unsafe fn number_fds(plan: &mut Plan<'_>, report: &mut RawFd) -> Result<(), Failed> {
    // A child is given a handful of descriptors.
    let count = c_int::try_from(plan.fds.len()).unwrap_or(c_int::MAX);
    let aside = |fd: RawFd| -> Result<RawFd, Failed> {
        // SAFETY: a system call on numbers.
        let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, count) };
        check(new, Stage::Fds, 0)?;
        Ok(new)
    };
    *report = aside(*report)?;
    plan.parent = aside(plan.parent)?;
    for (fd, moved) in plan.fds.iter().zip(&mut plan.moved) {
        *moved = aside(*fd)?;
    }
    for (number, moved) in (0..count).zip(&plan.moved) {
        // SAFETY: a system call on numbers; what had this number was moved, or is not wanted.
        check(unsafe { libc::dup2(*moved, number) }, Stage::Fds, 0)?;
    }
    let flags = c_long::from(libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: a system call on numbers; the ones below `count` are the child's own.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, count, u32::MAX, flags) };
    check(closed, Stage::Fds, 0)
}

/// Takes every capability that is not in the mask `keep` from the bounding set, so that exec does
/// not give it back to root.
fn drop_capabilities(keep: u64) -> Result<(), Failed> {
    for capability in (0..64u64).filter(|c| keep & (1 << c) == 0) {
        // SAFETY: a system call on numbers.
        unsafe {
            if libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) == 1 {
                let dropped = libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0);
                check(dropped, Stage::Capabilities, 0)?;
            }
        }
    }
    Ok(())
}
