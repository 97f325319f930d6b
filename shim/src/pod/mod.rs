//! A pod: the VM that its containers share, and which containers it has. What is slow or touches the
//! VM is done by one task that owns the [`machine`]; what everybody reads is a snapshot here.
//!
//! ```text
//! Empty ── first create: boot ──▶ Up ── VM ends, or stop ──▶ Ended ── shutdown ──▶ finished
//! ```
//! The VM's end ends every process that was in it, once, with the status of SIGKILL.

mod boot;
mod machine;
mod sandbox;
mod timeline;
mod volumes;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::Spec;
use sealpod_protocol::cri::PodSandboxConfig;
use tokio::sync::watch;

use crate::{
    bootstrap::Place,
    clock,
    container::{CreateRequest, Exit, Handle, create, metrics_any},
    error::{Error, Kind, Result},
    events::Publisher,
    guest::Guest,
    io::Stdio,
    ledger::{Ledger, LedgerError},
    owner::Owner,
    podfile::PodFile,
    spec::{self, Role},
    virtiofs,
};
use boot::BootRequest;
use machine::Machine;
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

/// What the Sandbox service is asked for.
#[derive(Debug, Clone)]
pub struct SandboxRequest {
    /// Bundle of the sandbox.
    pub bundle: PathBuf,
    /// The pod's network namespace.
    pub netns: Option<PathBuf>,
    /// Annotations of the pod.
    pub annotations: HashMap<String, String>,
    /// Configuration file that the runtime's options name.
    pub config: Option<String>,
    /// What the CRI says of the pod.
    pub pod: Option<PodSandboxConfig>,
}

/// What the Sandbox service is told of the pod.
#[derive(Debug, Clone, Copy)]
pub struct SandboxStatus {
    /// The VM runs.
    pub ready: bool,
    /// When it was there.
    pub created_ns: Option<i64>,
    /// How it ended.
    pub exit: Option<Exit>,
}

/// What everybody may know of the VM.
#[derive(Debug, Default)]
struct View {
    guest: Option<Guest>,
    vm_pid: u32,
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
    /// Told when a container has been made, or could not be.
    made: watch::Sender<()>,
    /// The VM has ended.
    ended: watch::Sender<Option<Exit>>,
    /// The process may end.
    finished: watch::Sender<bool>,
    timeline: Timeline,
}

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
        let volumes = Volumes::new(share.join(spec::VOLUMES_DIR));
        Ok(Arc::new(Self {
            publisher: Publisher::new(events, &identity.namespace),
            timeline: Timeline::new(identity.place.dir()),
            identity,
            containers: Mutex::default(),
            sandbox: Mutex::default(),
            volumes,
            view: Mutex::default(),
            machine: Owner::spawn(Machine::new(ledger)),
            made: watch::Sender::new(()),
            ended: watch::Sender::new(None),
            finished: watch::Sender::new(false),
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

    /// Pid of the VM's process on the host, which is the pid of every task in it; 0 before it is there.
    #[must_use]
    pub fn vm_pid(&self) -> u32 {
        lock(&self.view).vm_pid
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

    /// The part of the pod's share that belongs to the container `id`.
    #[must_use]
    pub fn container_dir(&self, id: &str) -> PathBuf {
        self.share_dir().join(id)
    }

    /// The volumes that its containers share.
    pub(crate) fn volumes(&self) -> &Volumes {
        &self.volumes
    }

    fn share_dir(&self) -> PathBuf {
        self.identity.place.dir().join(virtiofs::SHARE_DIR)
    }

    /// The container `id`. Waits for one that is being made: who asks for it wants to know how it is,
    /// or to end it, not that it is not there yet.
    ///
    /// # Errors
    /// Not found.
    pub async fn container(&self, id: &str) -> Result<Handle> {
        let mut made = self.made.subscribe();
        loop {
            match lock(&self.containers).get(id) {
                Some(Some(handle)) => return Ok(handle.clone()),
                Some(None) => {}
                None => return Err(Error::not_found(format!("task {id:?} not found"))),
            }
            // `self` holds the sender.
            let _ = made.changed().await;
        }
    }

    /// Whether `id` is a container that is there, or being made.
    #[must_use]
    pub fn has(&self, id: &str) -> bool {
        lock(&self.containers).contains_key(id)
    }

    /// Makes a container, and the VM with the first one. Returns the task's pid.
    ///
    /// # Errors
    /// What was wrong with the request, its specification, this node or the guest.
    pub async fn create_task(
        self: &Arc<Self>,
        request: CreateRequest,
        config: Option<String>,
    ) -> Result<u32> {
        let id = request.id.clone();
        if !sealpod_protocol::valid_id(&id) {
            return Err(Error::invalid(format!(
                "id {id:?} is not allowed: 1 to {} of A-Z a-z 0-9 _ . -",
                sealpod_protocol::ID_MAX
            )));
        }
        {
            let mut containers = lock(&self.containers);
            if containers.contains_key(&id) {
                return Err(Error::new(
                    Kind::AlreadyExists,
                    format!("task {id:?} already exists"),
                ));
            }
            containers.insert(id.clone(), None);
        }
        // A task of its own: a client that goes away (containerd restarts) drops the request, and a
        // container must be made or not made, never forgotten half way.
        let pod = Arc::clone(self);
        let making = tokio::spawn(async move { pod.make(id, request, config).await });
        making.await.map_err(|e| Error::chain(Kind::Unknown, &e))?
    }

    /// Makes the container whose id is reserved, or gives the id back.
    async fn make(
        self: Arc<Self>,
        id: String,
        request: CreateRequest,
        config: Option<String>,
    ) -> Result<u32> {
        match self.create_reserved(request, config).await {
            Ok(handle) => {
                lock(&self.containers).insert(id, Some(handle));
                self.made.send_replace(());
                Ok(self.vm_pid())
            }
            Err(e) => {
                self.forget(&id);
                self.made.send_replace(());
                let last = lock(&self.containers).is_empty() && lock(&self.sandbox).is_none();
                if last {
                    // Nobody may ever ask for the end: the client that wanted the pod can be gone.
                    self.stop_vm().await;
                    self.finished.send_replace(true);
                }
                Err(e)
            }
        }
    }

    async fn create_reserved(
        self: &Arc<Self>,
        request: CreateRequest,
        config: Option<String>,
    ) -> Result<Handle> {
        let wrong = |e: spec::Error| Error::chain(Kind::InvalidArgument, &e);
        let mut spec = spec::load(&request.bundle).map_err(wrong)?;
        let by_cri = lock(&self.sandbox)
            .as_ref()
            .is_some_and(|s| s.pod.is_some());
        if by_cri {
            let added = sandbox::add_mounts(&mut spec, self.identity.place.dir());
            added.map_err(|e| Error::chain(Kind::InvalidArgument, &e))?;
        }
        let role = spec::role(&spec::annotations(&spec)).map_err(wrong)?;
        let own = !matches!(role, Role::Member { .. });
        if own && request.id != self.id() {
            return Err(Error::invalid(format!(
                "task {:?} does not belong to pod {:?}: its specification names no sandbox",
                request.id,
                self.id()
            )));
        }
        if own {
            self.check_before_boot(&request, &spec, &role)?;
            let boot = BootRequest {
                config,
                netns: None,
                annotations: spec::annotations(&spec),
                spec: Some(spec.clone()),
            };
            self.boot(boot).await?;
        }
        create(self, request, spec, role != Role::Sandbox).await
    }

    /// What can be refused before anything is taken.
    fn check_before_boot(&self, request: &CreateRequest, spec: &Spec, role: &Role) -> Result<()> {
        if *role == Role::Sandbox {
            return Ok(());
        }
        let translated = spec::translate(spec.clone(), &request.bundle);
        translated
            .map_err(|e| Error::chain(Kind::InvalidArgument, &e))
            .map(|_| ())
    }

    async fn boot(self: &Arc<Self>, request: BootRequest) -> Result<()> {
        let pod = Arc::clone(self);
        self.machine
            .call(|m| Box::pin(async move { m.boot(&pod, request).await }))
            .await?
    }

    /// Notes what a sandbox will be made of.
    ///
    /// # Errors
    /// A second time.
    pub fn create_sandbox(&self, request: SandboxRequest) -> Result<()> {
        let mut sandbox = lock(&self.sandbox);
        if sandbox.is_some() {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("sandbox {:?} already exists", self.id()),
            ));
        }
        *sandbox = Some(request);
        Ok(())
    }

    /// Boots the VM of a sandbox that was created. Returns its pid and when it was there.
    ///
    /// # Errors
    /// Not created, or what the boot failed of.
    pub async fn start_sandbox(self: &Arc<Self>) -> Result<(u32, i64)> {
        let request = lock(&self.sandbox).clone();
        let request = request
            .ok_or_else(|| Error::not_found(format!("sandbox {:?} not found", self.id())))?;
        if let Some(pod) = &request.pod {
            let written = sandbox::write_files(self.identity.place.dir(), pod);
            written.map_err(|e| Error::chain(Kind::Unknown, &e))?;
        }
        let boot = sandbox::boot_request(self.id(), request)?;
        self.boot(boot).await?;
        self.connect_network().await?;
        Ok((
            self.vm_pid(),
            lock(&self.view).created_ns.unwrap_or_default(),
        ))
    }

    /// State for the Sandbox service.
    #[must_use]
    pub fn sandbox_status(&self) -> SandboxStatus {
        let view = lock(&self.view);
        SandboxStatus {
            ready: view.guest.is_some(),
            created_ns: view.created_ns,
            exit: *self.ended.borrow(),
        }
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

    /// Attaches the host's block device or file `path`. Returns its serial, by which the guest knows it.
    ///
    /// # Errors
    /// What the VM refused.
    pub async fn attach_disk(&self, path: &std::path::Path, readonly: bool) -> Result<String> {
        let path = path.to_owned();
        self.machine
            .call(move |m| Box::pin(async move { m.attach_disk(path, readonly).await }))
            .await?
    }

    /// Removes a container from the guest, its disks from the VM, and its mounts. What fails is logged:
    /// the pod's end takes the rest.
    pub async fn remove_container(
        self: &Arc<Self>,
        id: &str,
        disks: &[String],
        volumes: &[String],
    ) {
        if let Ok(guest) = self.guest()
            && let Err(e) = guest
                .agent()
                .delete_container(Guest::soon(), &Guest::container(id))
                .await
        {
            tracing::warn!(id, "Container not removed in the guest: {e}");
        }
        let disks = disks.to_vec();
        let detached = self
            .machine
            .call(move |m| Box::pin(async move { m.detach_disks(&disks).await }));
        if let Err(e) = detached.await {
            tracing::error!("{e}");
        }
        let dir = self.container_dir(id);
        let pod = Arc::clone(self);
        let volumes = volumes.to_vec();
        let removed = tokio::task::spawn_blocking(move || {
            pod.volumes
                .release(&volumes)
                .map_err(|e| crate::error::chain(&e))?;
            crate::mount::detach(&dir).map_err(|e| crate::error::chain(&e))?;
            crate::ledger::remove_tree(&dir).map_err(|e| e.to_string())
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(e)) => tracing::warn!(id, "Container's mounts not removed: {e}"),
            Err(e) => tracing::warn!(id, "Container's mounts not removed: {e}"),
        }
    }

    /// The container `id` is deleted.
    pub fn forget(&self, id: &str) {
        lock(&self.containers).remove(id);
    }

    /// Resource use of the container `id`, or of all where it is empty.
    ///
    /// # Errors
    /// What the guest answers.
    pub async fn stats(&self, id: &str) -> Result<Any> {
        let reply = self
            .guest()?
            .agent()
            .stats(Guest::soon(), &Guest::container(id))
            .await;
        Ok(metrics_any(reply.map_err(Error::from)?.metrics))
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
