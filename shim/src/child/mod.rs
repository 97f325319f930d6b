//! The shim's children (the VMM, virtiofsd): how they start, that they die with the shim, and how
//! their end is seen. Nothing here knows what they are.
//!
//! - A child gets exactly the descriptors it was given, numbered from 3, of the environment `PATH` and what
//!   it was given, `/dev/null` as input, and a pipe as output: its first lines are in the shim's log, its
//!   last are kept for error messages.
//! - It is in its cgroup, its network namespace and its [`Jail`] before its program runs.
//! - The kernel kills it when the shim ends, however the shim ends. `PR_SET_PDEATHSIG` fires when
//!   the *thread* that made the child ends, so one thread that lives as long as the process makes
//!   them all ([`spawner`]).
//! - It is reaped as soon as it ends, whether or not anyone waits. Nothing else in the process may
//!   wait for all children (`waitpid(-1)`).

mod enter;
mod exec;
mod jail;
mod socket;
mod spawner;
mod tail;

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::host_cgroup::Entrance;
use crate::ledger::{EntryId, Ledger, LedgerError, Resource};

pub use jail::Jail;
pub use socket::connected;
pub(crate) use spawner::watch as watch_pidfd;
pub use tail::Tail;

/// Lines and bytes kept of what a child writes.
const OUTPUT_LINES: usize = 32;
const OUTPUT_LINE_BYTES: usize = 512;
/// And told to the shim's own log: a child that runs wild does not fill it.
const OUTPUT_LOGGED: usize = 64;
/// How long the end of a child may wait for the last of its output to be read.
const DRAIN: Duration = Duration::from_millis(200);

/// Why a child did not start.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The program is not there or not a file that can be run.
    #[error("Program {program} of {name} cannot be run")]
    Program {
        /// What it is for.
        name: String,
        /// Its path.
        program: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A step between fork and exec failed.
    #[error("{name} could not be started: {stage}")]
    Stage {
        /// What was started.
        name: String,
        /// The step.
        stage: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A path or an argument holds a NUL byte.
    #[error("{name} could not be started: {what} holds a NUL byte")]
    Nul {
        /// What was started.
        name: String,
        /// Which text.
        what: String,
    },
    /// The ledger could not be written; then nothing is started.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// Variable that gives threads of a Rust program, which say nothing else, stacks of 512 KiB. Those of
/// 2 MiB that they have by default can be a huge page each, all of it in memory from its first use, where
/// huge pages are for everybody (`transparent_hugepage/enabled` is `always`).
pub const SMALL_STACKS: (&str, &str) = ("RUST_MIN_STACK", "524288");

/// A child to be.
#[derive(Debug)]
pub struct Command {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(&'static str, &'static str)>,
    fds: Vec<OwnedFd>,
    cgroup: Entrance,
    jail: Option<Jail>,
    user: Option<(u32, u32)>,
    capabilities: u64,
    rlimits: Vec<(libc::__rlimit_resource_t, u64)>,
}

impl Command {
    /// `program` is an absolute path; `name` is what people call it.
    #[must_use]
    pub fn new(name: &str, program: &Path) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            fds: Vec::new(),
            cgroup: Entrance::default(),
            jail: None,
            user: None,
            capabilities: 0,
            rlimits: Vec::new(),
        }
    }

    /// Adds an argument.
    pub fn arg(&mut self, arg: impl Into<OsString>) -> &mut Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item: Into<OsString>>>(&mut self, args: I) -> &mut Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment.
    pub fn env(&mut self, (name, value): (&'static str, &'static str)) -> &mut Self {
        self.env.push((name, value));
        self
    }

    /// Hands `fd` to the child; returns its number there.
    pub fn fd(&mut self, fd: OwnedFd) -> RawFd {
        self.fds.push(fd);
        // 0 to 2 are the standard streams; a child is given a handful.
        2 + RawFd::try_from(self.fds.len()).unwrap_or(RawFd::MAX - 2)
    }

    /// The child's cgroup.
    pub fn cgroup(&mut self, cgroup: Entrance) -> &mut Self {
        self.cgroup = cgroup;
        self
    }

    /// The file system that the child sees; it gets mount, PID, IPC, UTS and network namespaces of its
    /// own, the last with nothing in it: whatever connections it has, it was given.
    pub fn jail(&mut self, jail: Jail) -> &mut Self {
        self.jail = Some(jail);
        self
    }

    /// User and group ids; all supplementary groups are dropped.
    pub fn user(&mut self, uid: u32, gid: u32) -> &mut Self {
        self.user = Some((uid, gid));
        self
    }

    /// The capabilities (numbers of linux/capability.h) that a child which stays root keeps. All
    /// others leave its bounding set; by default all do.
    pub fn capabilities(&mut self, keep: &[u32]) -> &mut Self {
        self.capabilities = keep.iter().fold(0, |mask, c| mask | 1u64 << (c & 63));
        self
    }

    /// Sets a resource limit (`RLIMIT_*`), soft and hard.
    pub fn rlimit(&mut self, resource: libc::__rlimit_resource_t, value: u64) -> &mut Self {
        self.rlimits.push((resource, value));
        self
    }
}

/// A running child, or one that has ended. Dropping it kills it.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    watch: Watch,
}

/// Sees how a child ends and what it writes, without keeping it alive.
#[derive(Debug, Clone)]
pub struct Watch {
    exit: watch::Receiver<Option<Exit>>,
    output: Arc<Mutex<Tail>>,
}

/// Starts `command`, written down in `ledger` for as long as it runs. Returns once its program runs.
/// Must be called in a tokio runtime with I/O and time.
///
/// # Errors
/// [`ChildError`]; then there is no child.
pub async fn spawn(command: Command, ledger: &Ledger) -> Result<Child, ChildError> {
    let name = command.name.clone();
    let entry = ledger.record(Resource::Process { name: name.clone() })?;
    let release = |e: ChildError| {
        // A record too many costs nothing when cleaning.
        let _ = ledger.release(entry);
        e
    };
    let spawned = spawner::spawn(command).await.map_err(release)?;
    let watched = ledger
        .started(entry, spawned.pid)
        .map_err(ChildError::from)
        .and_then(|()| watch_over(&name, spawned, ledger.clone(), entry));
    watched.map_err(release)
}

/// Sets the tasks up that read the child's output and reap it.
fn watch_over(
    name: &str,
    spawned: spawner::Spawned,
    ledger: Ledger,
    entry: EntryId,
) -> Result<Child, ChildError> {
    let pidfd = Arc::new(spawned.pidfd);
    let failed = |source| {
        let _ = pidfd_send_signal(&*pidfd, Signal::KILL);
        let _ = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        ChildError::Stage {
            name: name.into(),
            stage: "watch it".into(),
            source,
        }
    };
    let pipe = pipe::Receiver::from_owned_fd(spawned.output).map_err(failed)?;
    let ended = spawner::watch(Arc::clone(&pidfd)).map_err(failed)?;
    let output = Arc::new(Mutex::new(Tail::new(OUTPUT_LINES, OUTPUT_LINE_BYTES)));
    let mut reader = tokio::spawn(read_output(name.into(), pipe, Arc::clone(&output)));
    let (tell, exit) = watch::channel(None);
    tokio::spawn(async move {
        // An error here would mean that the reactor is gone, and this task with it.
        let _ = ended.readable().await;
        let exit = reap(ended.get_ref());
        if tokio::time::timeout(DRAIN, &mut reader).await.is_err() {
            reader.abort();
        }
        let _ = ledger.release(entry);
        tell.send_replace(Some(exit));
    });
    Ok(Child {
        pid: spawned.pid,
        pidfd,
        watch: Watch { exit, output },
    })
}

fn reap(pidfd: &OwnedFd) -> Exit {
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
    match status {
        Ok(Some(s)) => match (s.exit_status(), s.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.unwrap_or(0)),
        },
        // Somebody else has waited for it, against the rule above; it is gone all the same.
        _ => Exit::Code(255),
    }
}

async fn read_output(name: String, mut pipe: pipe::Receiver, output: Arc<Mutex<Tail>>) {
    let mut buffer = [0u8; 1024];
    let mut logged = 0;
    while let Ok(n @ 1..) = pipe.read(&mut buffer).await {
        let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
        output.push_telling(&buffer[..n], |line| {
            if logged < OUTPUT_LOGGED {
                tracing::info!("{name}: {line}");
            } else if logged == OUTPUT_LOGGED {
                tracing::info!("Further lines of {name} are not logged");
            }
            logged = logged.saturating_add(1);
        });
    }
}

impl Watch {
    /// Waits until it has ended and been reaped. Any number of callers, any number of times.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit::Code(255)),
            // The task that reaps never drops its end before it has told.
            Err(_) => Exit::Code(255),
        }
    }

    /// How it ended, if it has.
    #[must_use]
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// The last lines that it wrote to its standard output and error.
    #[must_use]
    pub fn output(&self) -> Vec<String> {
        self.output
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .lines()
    }
}

impl Child {
    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// A descriptor of the process (`pidfd_open(2)`).
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// Sends SIGKILL. Idempotent; nothing happens once it has ended.
    pub fn kill(&self) {
        let _ = pidfd_send_signal(&*self.pidfd, Signal::KILL);
    }

    /// To see how it ends.
    #[must_use]
    pub fn watch(&self) -> Watch {
        self.watch.clone()
    }

    /// Waits until it has ended and been reaped. Any number of callers, any number of times.
    pub async fn wait(&self) -> Exit {
        self.watch.wait().await
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

#[cfg(test)]
mod tests;
