//! The containers of a pod: made, found, removed. An id is taken before its container is made, and given
//! back when that fails.

use std::{path::PathBuf, sync::Arc};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use oci_spec::runtime::Spec;

use super::{Mark, Pod, boot::BootRequest, lock, sandbox};
use crate::{
    container::{CreateRequest, Handle, create, metrics_any},
    error::{Error, Kind, Result},
    guest::Guest,
    spec::{self, Role},
};

impl Pod {
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

    /// Pid of the task `id` on the host; the pod's while it is being made, 0 where there is none.
    #[must_use]
    pub fn task_pid(&self, id: &str) -> u32 {
        match lock(&self.containers).get(id) {
            Some(Some(handle)) => handle.pid(),
            Some(None) => self.pid(),
            None => 0,
        }
    }

    /// The container whose task has this pid.
    #[must_use]
    pub(crate) fn container_of(&self, pid: u32) -> Option<String> {
        let containers = lock(&self.containers);
        let mut made = containers.iter();
        let found = made.find(|(_, handle)| handle.as_ref().is_some_and(|h| h.pid() == pid));
        found.map(|(id, _)| id.clone())
    }

    /// The part of the pod's share that belongs to the container `id`.
    #[must_use]
    pub fn container_dir(&self, id: &str) -> PathBuf {
        self.share_dir().join(id)
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
        self.asked.send_replace(true);
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
                let pid = handle.pid();
                lock(&self.containers).insert(id, Some(handle));
                self.made.send_replace(());
                Ok(pid)
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
            let grows = self.check_before_boot(&request, &spec, &role)?;
            let boot = BootRequest {
                config,
                netns: None,
                annotations: spec::annotations(&spec),
                spec: Some(spec.clone()),
                grows,
            };
            self.boot(boot).await?;
        }
        let created = create(self, request, spec, role).await?;
        self.timeline.mark(Mark::ContainerCreated);
        Ok(created)
    }

    /// What can be refused before anything is taken. Returns whether the VM can be asked for more than it
    /// starts with: a container that is a pod by itself says all it will have, but for the interfaces
    /// that hooks bring.
    fn check_before_boot(&self, request: &CreateRequest, spec: &Spec, role: &Role) -> Result<bool> {
        if *role == Role::Sandbox {
            return Ok(true);
        }
        let translated = spec::translate(spec.clone(), &request.bundle)
            .map_err(|e| Error::chain(Kind::InvalidArgument, &e))?;
        Ok(!translated.disks.is_empty() || spec.hooks().is_some())
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
        if let Ok(guest) = self.guest() {
            let request = Guest::container(id);
            let removed = guest
                .agent()
                .delete_container(Guest::soon(), &request)
                .await;
            match removed.map_err(Error::from) {
                // The VM ends, and the container with it.
                Err(e) if e.kind == Kind::Unavailable => {
                    tracing::debug!(id, "Container not removed in the guest: {e}");
                }
                Err(e) => tracing::warn!(id, "Container not removed in the guest: {e}"),
                Ok(_) => {}
            }
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
}
