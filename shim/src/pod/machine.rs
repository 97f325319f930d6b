//! The VM and what belongs to it on the host, owned by one task: nothing here runs at the same time as
//! anything else here.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::{
    Pod, StandIn,
    boot::{self, BootRequest},
};
use crate::{
    attest::withhold::Withheld,
    error::{Error, Kind, Result},
    guest::Guest,
    host_cgroup::HostCgroup,
    ledger::Ledger,
    network::{PodNetwork, portforward::PortForward},
    virtiofs::Virtiofs,
    vm::{self, Vm},
};

/// When the file server is seen to end, how long the VM may take to be the cause of it.
const VM_FOLLOWS: Duration = Duration::from_millis(300);

/// What a pod holds of the host, as far as it got it.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) vm: Option<Arc<dyn Vm>>,
    /// The pod's.
    pub(super) stand_in: Option<StandIn>,
    pub(super) virtiofsd: Option<Virtiofs>,
    pub(super) network: Option<PodNetwork>,
    pub(super) port_forward: Option<PortForward>,
    pub(super) cgroup: Option<HostCgroup>,
    /// Until the gate has them. A device can go back once its VM has ended, not before.
    pub(super) withheld: Withheld,
}

impl Taken {
    /// Gives everything back. What fails is logged; the ledger still names it.
    async fn give_back(mut self) {
        self.port_forward = None;
        if let Some(vm) = self.vm.take() {
            vm.stop().await;
        }
        self.stand_in = None;
        if let Some(virtiofsd) = self.virtiofsd.take() {
            virtiofsd.stop().await;
        }
        if let Some(mut network) = self.network.take()
            && let Err(e) = network.detach().await
        {
            tracing::warn!("{}", crate::error::chain(&e));
        }
        if let Some(cgroup) = self.cgroup.take() {
            // Waits for the last processes to go.
            let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
            if let Ok(Err(e)) = removed {
                tracing::warn!("{}", crate::error::chain(&e));
            }
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Empty,
    Up {
        /// For the guest to end by itself.
        shutdown: Duration,
    },
    Ended,
}

/// See the file's head.
pub(super) struct Machine {
    ledger: Ledger,
    phase: Phase,
    taken: Taken,
    next_disk: u32,
}

impl Machine {
    pub(super) fn new(ledger: Ledger) -> Self {
        Self {
            ledger,
            phase: Phase::Empty,
            taken: Taken::default(),
            next_disk: 0,
        }
    }

    pub(super) fn vm(&self) -> Result<&Arc<dyn Vm>> {
        let gone = || Error::new(Kind::Unavailable, "The pod's VM is not running");
        self.taken.vm.as_ref().ok_or_else(gone)
    }

    /// See [`Pod::stand_in`].
    pub(super) async fn stand_in(&self) -> Result<StandIn> {
        let vm = self.vm()?;
        let network = self.taken.network.as_ref();
        let network = network.ok_or_else(|| Error::precondition("the pod has no network"))?;
        StandIn::new(network.netns(), vm.as_ref()).await
    }

    pub(super) fn ledger(&self) -> Ledger {
        self.ledger.clone()
    }

    #[cfg(test)]
    pub(super) fn pretend(&mut self, vm: Arc<dyn Vm>) {
        self.taken.vm = Some(vm);
    }

    /// Boots the VM and watches over it.
    pub(super) async fn boot(&mut self, pod: &Arc<Pod>, request: BootRequest) -> Result<()> {
        if self.phase != Phase::Empty {
            return Err(Error::precondition(format!(
                "pod {:?} has had its VM",
                pod.id()
            )));
        }
        match boot::boot(pod, &self.ledger, &request, &mut self.taken).await {
            Ok(shutdown) => {
                self.watch(pod);
                self.phase = Phase::Up { shutdown };
                Ok(())
            }
            Err(e) => {
                self.ended(pod).await;
                Err(e)
            }
        }
    }

    /// See [`Pod::connect_network`].
    pub(super) async fn connect_network(&mut self, guest: &Guest) -> Result<()> {
        let vm = Arc::clone(self.vm()?);
        let Some(current) = &mut self.taken.network else {
            return Ok(());
        };
        let update = current.update().await;
        let update = update.map_err(|e| Error::chain(Kind::Unknown, &e))?;
        for tap in update.added {
            vm.add_nic(boot::nic(tap))
                .await
                .map_err(|e| Error::chain(Kind::Unknown, &e))?;
        }
        if let Some(network) = update.network {
            guest
                .agent()
                .configure_network(Guest::soon(), &network)
                .await
                .map_err(Error::from)?;
        }
        Ok(())
    }

    /// See [`Pod::attach_disk`].
    pub(super) async fn attach_disk(&mut self, path: PathBuf, readonly: bool) -> Result<String> {
        let serial = format!("sealpod-{}", self.next_disk);
        self.next_disk += 1;
        let disk = vm::Disk {
            path,
            readonly,
            serial: serial.clone(),
        };
        self.vm()?
            .add_disk(disk)
            .await
            .map_err(|e| Error::chain(Kind::Unknown, &e))?;
        Ok(serial)
    }

    pub(super) async fn detach_disks(&mut self, serials: &[String]) {
        let Ok(vm) = self.vm() else {
            return;
        };
        for serial in serials {
            if let Err(e) = vm.remove_disk(serial).await {
                tracing::warn!(serial, "Disk not removed: {}", crate::error::chain(&e));
            }
        }
    }

    /// Lets the guest write what it holds and power off, then ends what is left. Idempotent.
    pub(super) async fn stop(&mut self, pod: &Arc<Pod>) {
        if let (Phase::Up { shutdown }, Ok(vm), Ok(guest)) = (self.phase, self.vm(), pod.guest()) {
            let bye = async {
                let asked = guest
                    .agent()
                    .shutdown(Guest::soon(), &Default::default())
                    .await;
                if asked.is_ok() {
                    vm.wait().await;
                }
            };
            if tokio::time::timeout(shutdown, bye).await.is_err() {
                tracing::warn!("Guest did not power off in time");
            }
        }
        self.ended(pod).await;
    }

    /// The VM is gone, or has to go: frees everything on the host. Idempotent.
    pub(super) async fn ended(&mut self, pod: &Arc<Pod>) {
        if std::mem::replace(&mut self.phase, Phase::Ended) == Phase::Ended {
            return;
        }
        std::mem::take(&mut self.taken).give_back().await;
        // Not awaited: a container that is told may itself be waiting for this task.
        let pod = Arc::clone(pod);
        tokio::spawn(async move { pod.vm_ended().await });
    }

    /// Sees the VM and its file server end, whoever ends them, and passes on what the guest reports.
    fn watch(&self, pod: &Arc<Pod>) {
        let (Some(vm), Some(virtiofsd)) = (&self.taken.vm, &self.taken.virtiofsd) else {
            return;
        };
        let (vm, virtiofsd) = (Arc::clone(vm), virtiofsd.watch());
        let watched = Arc::clone(pod);
        tokio::spawn(async move {
            let reason = tokio::select! {
                // A VM that ends takes its file server along: then the VM's reason is the reason.
                biased;
                exit = vm.wait() => exit.to_string(),
                exit = virtiofsd.wait() => {
                    let wrote = virtiofsd.output().join(" | ");
                    match tokio::time::timeout(VM_FOLLOWS, vm.wait()).await {
                        Ok(ended) => format!("{ended}; its file server: {exit}: {wrote}"),
                        Err(_) => format!("its file server ended: {exit}: {wrote}"),
                    }
                }
            };
            tracing::info!(pod = watched.id(), "VM ended: {reason}");
            let pod = Arc::clone(&watched);
            let told = watched
                .machine
                .call(move |m| Box::pin(async move { m.ended(&pod).await }));
            if let Err(e) = told.await {
                tracing::error!("{e}");
            }
        });
        tokio::spawn(report_events(Arc::clone(pod)));
    }
}

/// Out-of-memory kills, as long as the agent answers.
async fn report_events(pod: Arc<Pod>) {
    use containerd_shim_protos::events::task::TaskOOM;
    use sealpod_protocol::agent::event::Kind as EventKind;

    let Ok(guest) = pod.guest() else {
        return;
    };
    loop {
        match guest
            .agent()
            .next_event(Guest::whenever(), &Default::default())
            .await
        {
            Ok(event) => {
                // The guest may only name containers that are there.
                if let Some(EventKind::Oom(oom)) = event.kind
                    && pod.has(&oom.container_id)
                {
                    let event = TaskOOM {
                        container_id: oom.container_id,
                        ..Default::default()
                    };
                    pod.publisher().publish(event).await;
                }
            }
            Err(e) => return tracing::debug!("No more events from the guest: {e}"),
        }
    }
}
