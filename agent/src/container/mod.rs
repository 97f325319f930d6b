//! Containers and their processes: what exists, in which state, and what may be done with it. The
//! service above translates requests; the launcher and cgroups below do the work.
//!
//! ```text
//! (reserved) ──create──▶ Created ──start──▶ Running ◀──pause/resume──▶ Paused
//!                           └───────┬──────────┴──────────────────────────┘
//!                              init ends: stopped (told by the process, not kept here) ──delete──▶ gone
//! ```
//! No lock is held over an await: the table is locked to look something up, a container's state to
//! change it.

mod capabilities;
mod error;
pub mod guest_devices;
mod mount_options;
mod pause;
pub mod plan;
mod process;
pub mod spec;

pub use error::ContainerError;
pub use process::{Ended, Process};

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;
use sealpod_protocol::SHARE_DIR;
use sealpod_protocol::agent::{CreateContainerRequest, ExecRequest, PidNamespace};

use crate::cgroup::oom::{Events, OomWatch};
use crate::cgroup::{self, Cgroup};
use crate::io::Declared;
use crate::launch::{self, AgentChannel, JoinTarget, LaunchError};
use crate::reaper::Reaper;
use process::Making;

/// How long processes may take to die or to freeze.
const SETTLE: Duration = Duration::from_secs(10);
/// Most containers of a pod, and most execs of a container, at once.
const COUNT_MAX: usize = 4096;
/// Why an exec is refused once its container's init has ended.
const STOPPED: &str = "cannot exec in a stopped container";

/// All containers of the guest.
#[derive(Debug)]
pub struct Containers {
    table: Mutex<HashMap<String, Option<Arc<Container>>>>,
    reaper: Reaper,
    events: Events,
    pod_pids: pause::PodPids,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    cgroup: Cgroup,
    init: Arc<Process>,
    init_handle: OwnedFd,
    seccomp: Option<OwnedFd>,
    user_namespace: bool,
    oom: OomWatch,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    /// `None`: being made.
    execs: HashMap<String, Option<Arc<Process>>>,
}

#[derive(Debug)]
enum Phase {
    Created(AgentChannel),
    Running,
    Paused,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which streams, and the size of the terminal if there is one.
fn streams(request: (bool, bool, bool, bool)) -> Declared {
    let (terminal, stdin, stdout, stderr) = request;
    Declared {
        stdin,
        stdout,
        stderr: stderr && !terminal,
    }
}

impl Containers {
    /// None yet. OOM events go to `events`.
    #[must_use]
    pub fn new(reaper: Reaper, events: Events) -> Self {
        Self {
            table: Mutex::default(),
            reaper,
            events,
            pod_pids: pause::PodPids::default(),
        }
    }

    /// Makes a container up to the point where its init waits for the start; returns init's pid.
    ///
    /// # Errors
    /// [`ContainerError`]; nothing of the container is left then.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<i32, ContainerError> {
        let id = request.container_id.clone();
        {
            let mut table = lock(&self.table);
            if table.contains_key(&id) {
                return Err(ContainerError::Exists(format!("container {id}")));
            }
            if table.len() >= COUNT_MAX {
                return Err(ContainerError::Argument("too many containers".into()));
            }
            table.insert(id.clone(), None);
        }
        match self.build(request).await {
            Ok(container) => {
                let container = Arc::new(container);
                let pid = container.init.pid;
                lock(&self.table).insert(id, Some(container));
                Ok(pid)
            }
            Err(error) => {
                lock(&self.table).remove(&id);
                Err(error)
            }
        }
    }

    async fn build(&self, request: CreateContainerRequest) -> Result<Container, ContainerError> {
        let id = &request.container_id;
        let relative = Path::new(&request.rootfs);
        let below = |c: Component<'_>| matches!(c, Component::Normal(_));
        if request.rootfs.is_empty() || !relative.components().all(below) {
            return Err(ContainerError::Argument(format!(
                "rootfs {:?} is not a path below the share",
                request.rootfs
            )));
        }
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let terminal = (size(request.console_width), size(request.console_height));
        let rootfs = Path::new(SHARE_DIR).join(relative);
        let mut plan = spec::container(
            id,
            &request.spec,
            rootfs,
            request.terminal.then_some(terminal),
        )?;
        guest_devices::check(&mut plan, request.skip_missing_devices)?;
        guest_devices::add_block_devices(&mut plan, &request.block_devices).await?;

        let pids = request.pid_namespace.enum_value_or_default();
        let holder = match pids {
            PidNamespace::PID_POD => Some(self.pod_pids.holder(&self.reaper)?),
            PidNamespace::PID_PRIVATE | PidNamespace::PID_GUEST => None,
        };
        let cgroup = Cgroup::create(id, &plan.resources)?;
        let declared = streams((
            request.terminal,
            request.stdin,
            request.stdout,
            request.stderr,
        ));
        let made = Making::start(&self.reaper, declared, request.terminal, |stdio| {
            let pids = match (&holder, pids) {
                (Some(holder), _) => launch::PidNamespace::Of(holder.as_fd()),
                (None, PidNamespace::PID_GUEST) => launch::PidNamespace::Agent,
                (None, _) => launch::PidNamespace::New,
            };
            launch::spawn_init(&plan, stdio, cgroup.handle(), pids)
        });
        let mut making = match made {
            Ok(making) => making,
            Err(error) => {
                let _ = cgroup.remove(SETTLE).await;
                return Err(error);
            }
        };
        if let Err(error) = making.follow(true).await {
            let _ = cgroup.remove(SETTLE).await;
            return Err(error);
        }
        let (init, launched, seccomp) = making.finish();
        let init = Arc::new(init);
        if pids != PidNamespace::PID_PRIVATE {
            tokio::spawn(end_with_init(init.clone(), cgroup.path().to_owned()));
        }
        Ok(Container {
            oom: OomWatch::start(id, cgroup.path(), self.events.clone()),
            cgroup,
            init,
            init_handle: launched.pidfd,
            seccomp,
            user_namespace: plan.id_maps.is_some(),
            state: Mutex::new(State {
                phase: Phase::Created(launched.channel),
                execs: HashMap::new(),
            }),
        })
    }

    /// The container `id`.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`], also while it is being made.
    pub fn get(&self, id: &str) -> Result<Arc<Container>, ContainerError> {
        let found = lock(&self.table).get(id).cloned().flatten();
        found.ok_or_else(|| ContainerError::NotFound(format!("container {id}")))
    }

    /// A process of the container `id`: its init when `exec_id` is empty.
    ///
    /// # Errors
    /// [`ContainerError::NotFound`].
    pub fn process(
        &self,
        id: &str,
        exec_id: &str,
    ) -> Result<(Arc<Container>, Arc<Process>), ContainerError> {
        let container = self.get(id)?;
        let process = container.process(exec_id)?;
        Ok((container, process))
    }

    /// Starts a further process in the container; returns its pid once it executes its program.
    ///
    /// # Errors
    /// [`ContainerError`]; the process does not exist then.
    pub async fn exec(&self, request: ExecRequest) -> Result<i32, ContainerError> {
        let container = self.get(&request.container_id)?;
        let id = request.exec_id.clone();
        container.reserve(&id)?;
        let made = container.run(&self.reaper, request).await;
        let mut state = lock(&container.state);
        match made {
            Ok(process) => {
                let pid = process.pid;
                state.execs.insert(id, Some(Arc::new(process)));
                Ok(pid)
            }
            Err(error) => {
                state.execs.remove(&id);
                Err(error)
            }
        }
    }

    /// Kills what is left of a container and forgets it. Idempotent.
    ///
    /// # Errors
    /// When a process of it does not die; the container stays then.
    pub async fn delete(&self, id: &str) -> Result<(), ContainerError> {
        let container = match self.get(id) {
            Ok(container) => container,
            // Never made, or deleted before.
            Err(_) if !lock(&self.table).contains_key(id) => return Ok(()),
            Err(_) => {
                return Err(ContainerError::State(format!(
                    "container {id} is being made"
                )));
            }
        };
        container.cgroup.remove(SETTLE).await?;
        container.init.exit().await;
        lock(&self.table).remove(id);
        crate::share::forget(id);
        Ok(())
    }

    /// Kills every container, for the end of the guest.
    pub fn kill_all(&self) {
        for container in lock(&self.table).values().flatten() {
            let _ = container.cgroup.kill();
        }
    }
}

/// Without a PID namespace of its own a container's processes outlive its init, unless ended here.
async fn end_with_init(init: Arc<Process>, cgroup: std::path::PathBuf) {
    init.exit().await;
    // The group may be gone already.
    let _ = std::fs::write(cgroup.join("cgroup.kill"), "1");
}

impl Container {
    fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = lock(&self.state).execs.get(exec_id).cloned().flatten();
        found.ok_or_else(|| ContainerError::NotFound(format!("process {exec_id}")))
    }

    /// Lets its init execute its program.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it has been started or has ended; what the program's execution
    /// says.
    pub async fn start(&self) -> Result<(), ContainerError> {
        let channel = {
            let mut state = lock(&self.state);
            if self.init.exited().is_some() {
                return Err(ContainerError::State(
                    "cannot start a container that has stopped".into(),
                ));
            }
            match std::mem::replace(&mut state.phase, Phase::Running) {
                Phase::Created(channel) => channel,
                other => {
                    state.phase = other;
                    return Err(ContainerError::State(
                        "cannot start an already running container".into(),
                    ));
                }
            }
        };
        channel
            .go()
            .map_err(|e| ContainerError::Launch(format!("release the container's init: {e}")))?;
        match channel.next().await {
            launch::Report::Failed(text) => {
                self.init.exit().await;
                Err(ContainerError::Launch(text))
            }
            _ => Ok(()),
        }
    }

    fn reserve(&self, exec_id: &str) -> Result<(), ContainerError> {
        let mut state = lock(&self.state);
        if self.init.exited().is_some() {
            return Err(ContainerError::State(STOPPED.into()));
        }
        if matches!(state.phase, Phase::Paused) {
            return Err(ContainerError::State(
                "cannot exec in a paused container".into(),
            ));
        }
        if state.execs.contains_key(exec_id) {
            return Err(ContainerError::Exists(format!("process {exec_id}")));
        }
        if state.execs.len() >= COUNT_MAX {
            return Err(ContainerError::Argument("too many processes".into()));
        }
        state.execs.insert(exec_id.into(), None);
        Ok(())
    }

    async fn run(&self, reaper: &Reaper, request: ExecRequest) -> Result<Process, ContainerError> {
        let plan = spec::exec(&request.process, request.terminal.then_some((0, 0)))?;
        let declared = streams((
            request.terminal,
            request.stdin,
            request.stdout,
            request.stderr,
        ));
        let fork = |stdio: &launch::ChildStdio| {
            let target = JoinTarget {
                init: self.init_handle.as_fd(),
                user_namespace: self.user_namespace,
                seccomp: self.seccomp.as_ref().map(AsFd::as_fd),
                cgroup: self.cgroup.handle(),
            };
            match launch::spawn_exec(&plan, stdio, target) {
                Err(LaunchError::Step { errno, .. }) if cgroup::is_not_a_leaf(errno) => {
                    let beside = self.cgroup.handle_of(self.init.pid);
                    let beside = beside.map_err(|e| LaunchError::Step {
                        what: "find the cgroup of the container's init".into(),
                        errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::ESRCH)),
                    })?;
                    let target = JoinTarget {
                        cgroup: beside.as_fd(),
                        ..target
                    };
                    launch::spawn_exec(&plan, stdio, target)
                }
                other => other,
            }
        };
        let stopped = |error| match self.init.exited() {
            // It ended while it was being joined.
            Some(_) => ContainerError::State(STOPPED.into()),
            None => error,
        };
        let mut making = Making::start(reaper, declared, request.terminal, |stdio| {
            match fork(stdio) {
                // It has ended, and is about to be collected.
                Err(LaunchError::Step {
                    errno: Errno::ESRCH,
                    ..
                }) => Err(ContainerError::State(STOPPED.into())),
                other => Ok(other?),
            }
        })?;
        making.follow(false).await.map_err(stopped)?;
        Ok(making.finish().0)
    }

    /// Forgets a process that has ended. Idempotent.
    ///
    /// # Errors
    /// [`ContainerError::State`] while it runs.
    pub fn delete_process(&self, exec_id: &str) -> Result<(), ContainerError> {
        let mut state = lock(&self.state);
        match state.execs.get(exec_id) {
            None => Ok(()),
            Some(Some(process)) if process.exited().is_some() => {
                state.execs.remove(exec_id);
                Ok(())
            }
            Some(_) => Err(ContainerError::State(
                "cannot delete a running process".into(),
            )),
        }
    }

    /// Queues an OOM event that belongs before an exit that is about to be told.
    pub fn check_oom(&self) {
        self.oom.check();
    }

    /// Sends a signal to every process of the container.
    ///
    /// # Errors
    /// [`ContainerError::Finished`] when there is none.
    pub fn signal_all(&self, signal: i32) -> Result<(), ContainerError> {
        let pids = self.cgroup.pids()?;
        if pids.is_empty() {
            return Err(ContainerError::Finished);
        }
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in pids {
            match crate::sys::kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(ContainerError::Signal { signal, errno }),
            }
        }
        Ok(())
    }

    /// Pids of the container, each with the exec that it is the process of, if it is one.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn pids(&self) -> Result<Vec<(i32, String)>, ContainerError> {
        let all = self.cgroup.pids()?;
        let state = lock(&self.state);
        let exec = |pid: i32| {
            let mut execs = state.execs.iter();
            let found = execs.find(|(_, p)| p.as_ref().is_some_and(|p| p.pid == pid));
            found.map_or_else(String::new, |(id, _)| id.clone())
        };
        Ok(all.into_iter().map(|pid| (pid, exec(pid))).collect())
    }

    /// Stops all its processes.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it does not run.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        if self.init.exited().is_some() || !matches!(lock(&self.state).phase, Phase::Running) {
            return Err(ContainerError::State(
                "cannot pause a container that does not run".into(),
            ));
        }
        if let Err(error) = self.cgroup.freeze(true, SETTLE).await {
            let _ = self.cgroup.freeze(false, SETTLE).await;
            return Err(error.into());
        }
        lock(&self.state).phase = Phase::Paused;
        Ok(())
    }

    /// Lets its processes go on.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it is not paused.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        if !matches!(lock(&self.state).phase, Phase::Paused) {
            return Err(ContainerError::State(
                "cannot resume a container that is not paused".into(),
            ));
        }
        self.cgroup.freeze(false, SETTLE).await?;
        lock(&self.state).phase = Phase::Running;
        Ok(())
    }

    /// Changes its limits.
    ///
    /// # Errors
    /// The first limit that is refused.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        Ok(self.cgroup.update(resources)?)
    }

    /// Where its counters are.
    #[must_use]
    pub fn cgroup_path(&self) -> &Path {
        self.cgroup.path()
    }
}
