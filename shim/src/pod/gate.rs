//! What the host gate ([`crate::attest`]) needs of a pod, and what the pod's containers ask of it.

use std::sync::Arc;

use oci_spec::runtime::Spec;
use sealpod_protocol::agent;

use super::{Pod, lock};
use crate::{
    attest::{Gate, Settings, Took, wanted::Wanted, withhold::Withheld},
    container::Handle,
    error::{Error, Kind, Result},
    ledger::Ledger,
    owner::Owner,
    vm::Vm,
};

/// The gate, and what it goes by. There from the boot on.
#[derive(Debug)]
pub(super) struct Attested {
    settings: Arc<Settings>,
    gate: Owner<Gate>,
}

impl Pod {
    /// Puts up the gate of a VM that has just started.
    pub(super) fn put_up_gate(self: &Arc<Self>, settings: Settings, withheld: Withheld) {
        let settings = Arc::new(settings);
        let gate = Owner::spawn(Gate::closed(Arc::clone(&settings), self, withheld));
        // Once: a pod has one VM.
        let _ = self.attested.set(Attested { settings, gate });
    }

    /// Takes the devices that are behind the gate out of a container's specification.
    ///
    /// # Errors
    /// A device that is not this node's to give.
    pub(crate) fn wanted_devices(&self, spec: &mut Spec) -> Result<Vec<Wanted>> {
        let Some(attested) = self.attested.get() else {
            return Ok(Vec::new());
        };
        let wanted = attested.settings.wanted(spec);
        wanted.map_err(|e| Error::chain(Kind::InvalidArgument, &e))
    }

    /// Has the gate release devices to a container; also where it wants none, since the pod may have to
    /// be affirmed before it runs anything.
    ///
    /// # Errors
    /// The check that failed.
    pub(crate) async fn admit(&self, wanted: Vec<Wanted>) -> Result<Vec<agent::AdmittedDevice>> {
        let Some(gate) = self.gate() else {
            return Ok(Vec::new());
        };
        let admitted = gate.call(|g| Box::pin(async move { g.admit(wanted).await }));
        Ok(admitted.await??)
    }

    /// Notes what the gate took of a start.
    pub(crate) fn passed_gate(&self, took: &Took) {
        self.timeline.gate(took);
    }

    /// The gate.
    pub(crate) fn gate(&self) -> Option<Owner<Gate>> {
        self.attested.get().map(|a| a.gate.clone())
    }

    /// The VM, while it runs.
    pub(crate) async fn vm(&self) -> Option<Arc<dyn Vm>> {
        let vm = self
            .machine
            .call(|m| Box::pin(async move { m.vm().ok().cloned() }));
        vm.await.ok().flatten()
    }

    /// Where a resource is written down before it is taken.
    pub(crate) async fn ledger(&self) -> Option<Ledger> {
        let ledger = self.machine.call(|m| Box::pin(async move { m.ledger() }));
        ledger.await.ok()
    }

    /// Stops all containers, as if each had been paused.
    pub(crate) async fn freeze(&self) {
        let all: Vec<Handle> = lock(&self.containers).values().flatten().cloned().collect();
        for container in all {
            // One that does not run stands still.
            if let Err(e) = container.set_paused(true).await {
                tracing::debug!("{e}");
            }
        }
    }

    /// The VM has ended: its devices go back to the host.
    pub(super) async fn close_gate(&self) {
        if let Some(gate) = self.gate() {
            let closed = gate.call(|g| Box::pin(async move { g.ended().await }));
            if let Err(e) = closed.await {
                tracing::error!("{e}");
            }
        }
    }

    /// Makes the pod one whose VM and agent are these.
    #[cfg(test)]
    pub(crate) async fn pretend(&self, guest: crate::guest::Guest, vm: Arc<dyn Vm>) {
        lock(&self.view).guest = Some(guest);
        let set = self
            .machine
            .call(|m| Box::pin(async move { m.pretend(vm) }));
        set.await.expect("machine");
    }
}
