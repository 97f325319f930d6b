//! The one thread that makes children. It lives until the process ends, because the kernel sends
//! `PR_SET_PDEATHSIG` when the thread that made a child ends, not the process. A child is made with
//! `clone3` (for the pidfd and the namespaces in one step) and tells over a pipe what failed.

#![expect(
    unsafe_code,
    reason = "clone3 has no safe wrapper: the child is a copy of a process with threads"
)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    PidfdFlags, Signal, WaitId, WaitIdOptions, getpid, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use super::exec::{self, Plan, Report};
use super::{ChildError, Command};
use crate::host_cgroup::Entrance;

/// The thread makes system calls only, and so does the child, on a copy of its stack.
const STACK: usize = 256 << 10;
/// How long it may take from fork to exec: a program on a network file system that hangs must not
/// keep all later children from starting.
const EXEC_PATIENCE: Duration = Duration::from_secs(10);
/// linux/sched.h: all handlers back to their defaults (Linux 5.5). `libc` has it too narrow.
const CLONE_CLEAR_SIGHAND: u64 = 1 << 32;
/// linux/sched.h: in the cgroup (v2) of a descriptor (Linux 5.7).
const CLONE_INTO_CGROUP: u64 = 1 << 33;
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A child whose program runs.
#[derive(Debug)]
pub(super) struct Spawned {
    pub(super) pid: u32,
    pub(super) pidfd: OwnedFd,
    /// Reading end of its standard output and error.
    pub(super) output: OwnedFd,
}

type Job = (Command, oneshot::Sender<Result<Spawned, ChildError>>);

/// Has the thread start `command`; returns once its program runs.
pub(super) async fn spawn(command: Command) -> Result<Spawned, ChildError> {
    static THREAD: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let name = command.name.clone();
    let thread = THREAD.get_or_init(start_thread);
    let (reply, answer) = oneshot::channel();
    // Fails only when the thread could not be made.
    let _ = thread.send((command, reply));
    answer.await.unwrap_or_else(|_| {
        Err(ChildError::Stage {
            name,
            stage: "the thread that makes children is not running".into(),
            source: io::ErrorKind::Other.into(),
        })
    })
}

fn start_thread() -> mpsc::Sender<Job> {
    let (jobs, queue) = mpsc::channel::<Job>();
    let thread = std::thread::Builder::new()
        .name("spawner".into())
        .stack_size(STACK);
    // When this fails the queue is dropped, and every job's caller is told.
    let _ = thread.spawn(move || {
        for (command, reply) in queue {
            // A caller that no longer listens drops the child: its pidfd is closed by the send's
            // error value, and the process must not outlive that.
            if let Err(Ok(orphan)) = reply.send(start(command)) {
                end(&orphan.pidfd);
            }
        }
    });
    jobs
}

/// Registers `pidfd`, which becomes readable when its process ends.
pub(crate) fn watch(pidfd: Arc<OwnedFd>) -> io::Result<AsyncFd<Arc<OwnedFd>>> {
    // SAFETY: the `Arc` in the result keeps the one descriptor open, and gives out no other.
    let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    Ok(watched?)
}

fn end(pidfd: &OwnedFd) {
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
    let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
}

fn start(command: Command) -> Result<Spawned, ChildError> {
    let name = command.name.clone();
    let stage = |stage: &str, source: io::Error| ChildError::Stage {
        name: name.clone(),
        stage: stage.into(),
        source,
    };
    let program = std::fs::metadata(&command.program);
    if let Err(source) = program {
        return Err(ChildError::Program {
            name,
            program: command.program,
            source,
        });
    }
    let (output, output_end) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| stage("make its output pipe", e.into()))?;
    let (report, report_end) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|e| stage("make its report pipe", e.into()))?;
    let null = File::open("/dev/null").map_err(|e| stage("open /dev/null", e))?;
    let parent = pidfd_open(getpid(), PidfdFlags::empty())
        .map_err(|e| stage("open its parent's pidfd", e.into()))?;
    let jail_root = jail_root(&command)?;
    let mut streams: Vec<RawFd> = vec![
        null.as_raw_fd(),
        output_end.as_raw_fd(),
        output_end.as_raw_fd(),
    ];
    streams.extend(command.fds.iter().map(AsRawFd::as_raw_fd));
    let text = |what: &str, bytes: &[u8]| {
        CString::new(bytes).map_err(|_| ChildError::Nul {
            name: name.clone(),
            what: what.into(),
        })
    };
    let path = text("its path", command.program.as_os_str().as_bytes())?;
    let mut args = vec![path.clone()];
    for (n, arg) in command.args.iter().enumerate() {
        args.push(text(&format!("argument {}", n + 1), arg.as_bytes())?);
    }
    let mut env = vec![text("PATH", PATH.as_bytes())?];
    for (name, value) in &command.env {
        env.push(text(name, format!("{name}={value}").as_bytes())?);
    }
    let mut plan = Plan::new(path, args, env, streams);
    plan.parent = parent.as_raw_fd();
    match &command.cgroup {
        Entrance::Born(dir) => plan.born_in = Some(dir.as_raw_fd()),
        Entrance::Joins(procs) => plan.joins = procs.iter().map(AsRawFd::as_raw_fd).collect(),
    }
    plan.jail = jail_root;
    plan.steps = command.jail.as_ref().map_or(&[], |j| &j.steps);
    plan.user = command.user;
    plan.capabilities = command.capabilities;
    plan.rlimits = &command.rlimits;

    let cloning = match plan.born_in {
        Some(_) => "clone into its cgroup",
        None => "clone",
    };
    let (pid, pidfd) = clone(&mut plan, report_end.as_raw_fd()).map_err(|e| stage(cloning, e))?;
    drop(report_end);
    match read_report(report) {
        Ok(None) => Ok(Spawned { pid, pidfd, output }),
        Ok(Some(report)) => {
            end(&pidfd);
            let source = io::Error::from_raw_os_error(report.errno);
            if report.stage == exec::Stage::Exec as u32 {
                let program = command.program.clone();
                return Err(ChildError::Program {
                    name,
                    program,
                    source,
                });
            }
            Err(stage(&exec::describe(&report, plan.steps), source))
        }
        Err(e) => {
            end(&pidfd);
            Err(stage("it did not run its program", e))
        }
    }
}

fn jail_root(command: &Command) -> Result<Option<CString>, ChildError> {
    let Some(jail) = &command.jail else {
        return Ok(None);
    };
    let root = CString::new(jail.root.as_os_str().as_bytes());
    root.map(Some).map_err(|_| ChildError::Nul {
        name: command.name.clone(),
        what: "the path of its root".into(),
    })
}

/// Makes the child, which carries `plan` out. Returns its pid and pidfd.
fn clone(plan: &mut Plan<'_>, report: RawFd) -> io::Result<(u32, OwnedFd)> {
    let mut flags = libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND;
    if plan.jail.is_some() {
        let spaces = libc::CLONE_NEWNS
            | libc::CLONE_NEWPID
            | libc::CLONE_NEWIPC
            | libc::CLONE_NEWUTS
            | libc::CLONE_NEWNET;
        flags |= u64::from(spaces.cast_unsigned());
    }
    let mut pidfd: RawFd = -1;
    // SAFETY: all bytes zero is the documented "nothing asked for" of clone_args.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags;
    args.exit_signal = libc::SIGCHLD as u64;
    args.pidfd = &raw mut pidfd as u64;
    if let Some(dir) = plan.born_in {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(dir.cast_unsigned());
    }
    // No handler of this process may run in the child: all signals wait until it has none.
    // SAFETY: the sets are plain data that live on this stack frame.
    let mut before: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: as above; sigfillset and pthread_sigmask only write to them.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, &raw mut before);
    }
    // SAFETY: without CLONE_VM the child has a copy of all memory, and this thread's stack in it.
    // It runs `exec::run` only, which makes system calls on memory prepared here, and never returns.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of_val(&args)) };
    if pid == 0 {
        // SAFETY: this is the child, single-threaded, and nothing else runs in it.
        unsafe { exec::run(plan, report) }
    }
    let error = io::Error::last_os_error();
    // SAFETY: restores the mask saved above.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
    }
    if pid < 0 {
        return Err(error);
    }
    // SAFETY: the kernel has put a new descriptor there, which nobody else knows of.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok((u32::try_from(pid).map_err(io::Error::other)?, pidfd))
}

/// What the child reports: nothing but the end of the pipe when its program runs.
fn read_report(pipe: OwnedFd) -> io::Result<Option<Report>> {
    let patience = Timespec {
        tv_sec: EXEC_PATIENCE.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    loop {
        match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&patience)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => break,
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let mut bytes = Vec::new();
    File::from(pipe)
        .take(Report::SIZE as u64)
        .read_to_end(&mut bytes)?;
    Ok(Report::decode(&bytes))
}
