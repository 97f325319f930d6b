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
mod eject;
mod error;
pub mod guest_devices;
mod mount_options;
mod one;
mod pause;
pub mod plan;
mod process;
pub mod spec;
mod spec_process;

pub use error::ContainerError;
pub use one::Container;
pub use process::{Ended, Process};

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::path::{Component, Path};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sealpod_protocol::SHARE_DIR;
use sealpod_protocol::agent::{CreateContainerRequest, ExecRequest, PidNamespace};

use crate::attest::device::Live;
use crate::cgroup::Cgroup;
use crate::cgroup::oom::{Events, OomWatch};
use crate::io::Declared;
use crate::launch;
use crate::reaper::Reaper;
use one::{Phase, State};
use process::Making;

/// How long processes may take to die or to freeze.
const SETTLE: Duration = Duration::from_secs(10);
/// Most containers of a pod, and most execs of a container, at once.
const COUNT_MAX: usize = 4096;

/// All containers of the guest.
#[derive(Debug)]
pub struct Containers {
    table: Mutex<HashMap<String, Option<Arc<Container>>>>,
    reaper: Reaper,
    events: Events,
    pod_pids: pause::PodPids,
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

/// Columns and rows of a terminal.
fn console_size(width: u32, height: u32) -> (u16, u16) {
    let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
    (size(width), size(height))
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
    pub async fn create(
        &self,
        request: CreateContainerRequest,
        admitted: Vec<(String, Live)>,
    ) -> Result<i32, ContainerError> {
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
        match self.build(request, admitted).await {
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

    async fn build(
        &self,
        request: CreateContainerRequest,
        admitted: Vec<(String, Live)>,
    ) -> Result<Container, ContainerError> {
        let id = &request.container_id;
        let relative = Path::new(&request.rootfs);
        let below = |c: Component<'_>| matches!(c, Component::Normal(_));
        if request.rootfs.is_empty() || !relative.components().all(below) {
            return Err(ContainerError::Argument(format!(
                "rootfs {:?} is not a path below the share",
                request.rootfs
            )));
        }
        let terminal = console_size(request.console_width, request.console_height);
        let rootfs = Path::new(SHARE_DIR).join(relative);
        let mut plan = spec::container(
            id,
            &request.spec,
            rootfs,
            request.terminal.then_some(terminal),
        )?;
        crate::memory::provide(&request.memory_volumes)?;
        crate::share::look_into(&plan.mounts);
        guest_devices::check(&mut plan, request.skip_missing_devices)?;
        guest_devices::add_block_devices(&mut plan, &request.block_devices).await?;
        guest_devices::add_admitted(&mut plan, &admitted)?;

        let pids = request.pid_namespace.enum_value_or_default();
        let holder = match pids {
            PidNamespace::PID_POD => Some(self.pod_pids.holder(&self.reaper)?),
            PidNamespace::PID_CONTAINER => Some(self.get(&request.pid_namespace_of)?.handle()?),
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
            disks: request
                .block_devices
                .iter()
                .map(|d| d.serial.clone())
                .collect(),
            has_admitted_devices: !admitted.is_empty(),
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
        eject::eject(container.disks.clone()).await;
        lock(&self.table).remove(id);
        Ok(())
    }

    /// Stops every container, or every one that has an admitted device, if it does not stand still already;
    /// one that does not stop dies.
    pub async fn freeze(&self, with_devices: bool) {
        let all: Vec<_> = lock(&self.table).values().flatten().cloned().collect();
        let meant = |c: &&Arc<Container>| c.has_admitted_devices || !with_devices;
        for container in all.iter().filter(meant).filter(|c| !c.is_paused()) {
            if container.pause().await.is_err() && container.cgroup.kill().is_err() {
                crate::log!("a container neither stops nor dies");
            }
        }
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
