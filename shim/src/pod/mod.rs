//! A pod: the VM that its containers share, and which containers it has. What is slow or touches the
//! VM is done by one task that owns the [`machine`]; what everybody reads is a snapshot here.
//!
//! ```text
//! Empty ── first create: boot ──▶ Up ── VM ends, or stop ──▶ Ended ── shutdown ──▶ finished
//! ```
//! The VM's end ends every process that was in it, once, with the status of SIGKILL.

mod boot;
mod first;
mod gate;
mod machine;
pub(crate) mod protect;
mod sandbox;
mod stand_in;
mod tasks;
mod template;
mod timeline;
mod volumes;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use tokio::sync::watch;

use crate::{
    bootstrap::Place,
    clock,
    container::{Exit, Handle},
    error::{Error, Kind, Result},
    events::Publisher,
    guest::Guest,
    io::Stdio,
    ledger::{Ledger, LedgerError},
    owner::Owner,
    podfile::PodFile,
    spec, virtiofs,
    vm::template::Learning,
};
use boot::BootRequest;
use machine::Machine;
pub use sandbox::{SandboxRequest, SandboxStatus};
pub(crate) use stand_in::StandIn;
use timeline::{Mark, Timeline};
pub(crate) use volumes::Volumes;

/// Who a pod is.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// Id of the sandbox, or of the only container.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its folder.
    pub place: Place,
}

/// What everybody may know of the VM.
#[derive(Debug, Default)]
struct View {
    guest: Option<Guest>,
    pid: u32,
    created_ns: Option<i64>,
    info: HashMap<String, String>,
}

/// See the module.
#[derive(Debug)]
pub struct Pod {
    identity: Identity,
    publisher: Publisher,
    /// `None`: the id is taken, the container is being made.
    containers: Mutex<HashMap<String, Option<Handle>>>,
    sandbox: Mutex<Option<SandboxRequest>>,
    volumes: Volumes,
    view: Mutex<View>,
    machine: Owner<Machine>,
    /// A container or sandbox was asked for.
    asked: watch::Sender<bool>,
    /// Set when the VM has started.
    attested: OnceLock<gate::Attested>,
    /// Told when a container has been made, or could not be.
    made: watch::Sender<()>,
    /// The VM has ended.
    ended: watch::Sender<Option<Exit>>,
    /// The process may end.
    finished: watch::Sender<bool>,
    timeline: Timeline,
    /// To be done when the first container runs.
    learning: Mutex<Option<Learning>>,
}

/// Of a pod's folder: what is being mounted and not in the share yet.
const STAGES_DIR: &str = "stages";

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can leave them half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pod {
    /// A pod without a VM. `events` is containerd's ttrpc socket.
    ///
    /// # Errors
    /// The ledger cannot be opened.
    pub fn new(identity: Identity, events: &str) -> std::result::Result<Arc<Self>, LedgerError> {
        let ledger = Ledger::open(identity.place.dir())?;
        let file = PodFile {
            namespace: identity.namespace.clone(),
            id: identity.id.clone(),
            shim_pid: std::process::id(),
            ..PodFile::default()
        };
        if let Err(e) = file.write(identity.place.dir()) {
            tracing::warn!("{}", crate::error::chain(&e));
        }
        let shim = ledger.record(crate::ledger::Resource::Process {
            name: "shim".into(),
        })?;
        ledger.started(shim, std::process::id())?;
        let share = identity.place.dir().join(virtiofs::SHARE_DIR);
        let stages = identity.place.dir().join(STAGES_DIR);
        let volumes = Volumes::new(share.join(spec::VOLUMES_DIR), stages);
        Ok(Arc::new(Self {
            publisher: Publisher::new(events, &identity.namespace),
            timeline: Timeline::new(identity.place.dir()),
            identity,
            containers: Mutex::default(),
            sandbox: Mutex::default(),
            volumes,
            view: Mutex::default(),
            machine: Owner::spawn(Machine::new(ledger)),
            asked: watch::Sender::new(false),
            attested: OnceLock::new(),
            made: watch::Sender::new(()),
            ended: watch::Sender::new(None),
            finished: watch::Sender::new(false),
            learning: Mutex::default(),
        }))
    }

    /// Id of the sandbox, or of the only container.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.identity.id
    }

    /// containerd's namespace.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.identity.namespace
    }

    /// Where events go.
    #[must_use]
    pub fn publisher(&self) -> &Publisher {
        &self.publisher
    }

    /// The pod's pid on the host, its stand-in's; 0 before its VM is there.
    #[must_use]
    pub fn pid(&self) -> u32 {
        lock(&self.view).pid
    }

    /// A stand-in for a container of the pod.
    ///
    /// # Errors
    /// The VM is not there (any more), or the thread could not be made.
    pub(crate) async fn stand_in(&self) -> Result<StandIn> {
        let made = self
            .machine
            .call(|m| Box::pin(async { m.stand_in().await }));
        made.await?
    }

    /// The agent.
    ///
    /// # Errors
    /// Where the VM is not there (any more).
    pub fn guest(&self) -> Result<Guest> {
        let guest = lock(&self.view).guest.clone();
        guest.ok_or_else(|| {
            Error::new(
                Kind::Unavailable,
                format!("The VM of pod {:?} is not running", self.id()),
            )
        })
    }

    /// The volumes that its containers share.
    pub(crate) fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    fn share_dir(&self) -> PathBuf {
        self.identity.place.dir().join(virtiofs::SHARE_DIR)
    }

    async fn boot(self: &Arc<Self>, request: BootRequest) -> Result<()> {
        let pod = Arc::clone(self);
        self.machine
            .call(|m| Box::pin(async move { m.boot(&pod, request).await }))
            .await?
    }

    /// What is told of the pod to those who ask for details.
    #[must_use]
    pub fn info(&self) -> HashMap<String, String> {
        lock(&self.view).info.clone()
    }

    /// Gives the guest the interfaces that appeared in the pod's network namespace since the boot.
    ///
    /// # Errors
    /// What the host or the guest refused.
    pub async fn connect_network(&self) -> Result<()> {
        let guest = self.guest()?;
        self.machine
            .call(|m| Box::pin(async move { m.connect_network(&guest).await }))
            .await?
    }

    /// Ends the VM, if it runs, and frees all that it took. Idempotent.
    pub async fn stop_vm(self: &Arc<Self>) {
        let pod = Arc::clone(self);
        if let Err(e) = self
            .machine
            .call(move |m| Box::pin(async move { m.stop(&pod).await }))
            .await
        {
            tracing::error!("{e}");
        }
    }

    /// [`Pod::stop_vm`] when `last` has happened; neither is waited for.
    pub(crate) fn stop_vm_after(self: &Arc<Self>, last: impl Future<Output = ()> + Send + 'static) {
        let pod = Arc::clone(self);
        tokio::spawn(async move {
            last.await;
            pod.stop_vm().await;
        });
    }

    /// Returns when the VM has ended.
    pub async fn wait_vm(&self) -> Exit {
        let mut ended = self.ended.subscribe();
        let exit = ended.wait_for(Option::is_some).await.ok().and_then(|e| *e);
        // `self` holds the sender.
        exit.unwrap_or(Exit {
            status: 0,
            at_ns: clock::unix_ns(),
        })
    }

    /// containerd has no more use for this process: ends it once no container is left, or `now`.
    pub async fn shutdown(self: &Arc<Self>, now: bool) {
        // A pod of the Sandbox API lives without containers, until its sandbox is shut down.
        let used = !lock(&self.containers).is_empty() || lock(&self.sandbox).is_some();
        if used && !now {
            return;
        }
        self.stop_vm().await;
        self.wait_vm().await;
        self.finished.send_replace(true);
    }

    /// Returns when a first container or a sandbox has been asked for.
    pub(crate) async fn asked(&self) {
        let mut asked = self.asked.subscribe();
        // `self` holds the sender.
        let _ = asked.wait_for(|a| *a).await;
    }

    #[cfg(test)]
    pub(crate) fn has_finished(&self) -> bool {
        *self.finished.borrow()
    }

    /// Returns when [`Pod::shutdown`] has ended the pod.
    pub async fn finished(&self) {
        let mut finished = self.finished.subscribe();
        // `self` holds the sender.
        let _ = finished.wait_for(|f| *f).await;
        // The folder goes last: with it goes the socket that a new start would look for. The share and
        // what is left in it are mounts of this process, which hold the folder until they are gone.
        let dir = self.identity.place.dir().to_owned();
        let removed = tokio::task::spawn_blocking(move || {
            crate::mount::detach(&dir).map_err(|e| crate::error::chain(&e))?;
            crate::ledger::remove_tree(&dir).map_err(|e| e.to_string())
        });
        if let Ok(Err(e)) = removed.await {
            tracing::warn!("Pod's folder not removed: {e}");
        }
    }

    /// Notes the start of the first container, and its first output.
    pub(crate) fn mark_started(self: &Arc<Self>, stdio: Option<&Stdio>) {
        self.timeline.mark(Mark::ContainerStarted);
        if let Some(learning) = lock(&self.learning).take() {
            tokio::task::spawn_blocking(|| learning.learn());
        }
        if let Some(stdio) = stdio {
            let pod = Arc::clone(self);
            let first = stdio.first_output();
            tokio::spawn(async move {
                first.await;
                pod.timeline.mark(Mark::FirstOutput);
            });
        }
    }

    /// Called once by the machine when the VM has ended, however it ended.
    async fn vm_ended(&self) {
        lock(&self.view).guest = None;
        self.close_gate().await;
        let exit = Exit {
            status: 128 + 9,
            at_ns: clock::unix_ns(),
        };
        let all: Vec<Handle> = lock(&self.containers).values().flatten().cloned().collect();
        for container in all {
            container.vm_ended().await;
        }
        self.ended.send_replace(Some(exit));
    }

    #[cfg(test)]
    pub(crate) fn for_test() -> Arc<Self> {
        let dir = tempfile::tempdir().expect("tempdir").keep();
        let identity = Identity {
            namespace: "test".into(),
            id: "p1".into(),
            bundle: dir.clone(),
            place: Place::new(&dir, "a", "n", "i"),
        };
        Self::new(identity, "/nowhere").expect("pod")
    }
}
