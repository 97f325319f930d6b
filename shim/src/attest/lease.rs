//! The lease of a pod that was affirmed, with devices or without: renewed at half of its life, and what becomes
//! of pod and devices when it is not. Part of the gate.

use std::{sync::Weak, time::Duration};

use sealpod_attestation::appraise::VerifierError;
use sealpod_protocol::agent;
use tokio::time::Instant;

use super::{AttestError, gate::Gate, release::Release};
use crate::{config::OnLoss, guest::Guest, pod::Pod};

/// A verifier that cannot be reached is asked again after this, while the lease lasts.
const RETRY: Duration = Duration::from_secs(2);
/// How long the guest may take to let go of a device before its VM is ended.
const LET_GO: Duration = Duration::from_secs(15);

impl Gate {
    /// Half of what is left of the lease.
    pub(super) fn half_life(&self) -> Duration {
        let until = self.affirmed.as_ref().map(|a| a.until);
        until.map_or(Duration::ZERO, |until| {
            until.saturating_duration_since(Instant::now()) / 2
        })
    }

    /// Asks the guest to close its gate for devices and to power their slots down: then taking them does
    /// not wait. A guest that does not answer gives them up all the same, later.
    pub(super) async fn ask_back(&self, devices: &[Box<dyn Release>]) {
        let request = agent::RevokeDevicesRequest {
            devices: devices.iter().map(|d| d.id().to_owned()).collect(),
            ..Default::default()
        };
        let Some(guest) = self.guest().ok().filter(|_| !devices.is_empty()) else {
            return;
        };
        let asked = guest.agent().revoke_devices(Guest::soon(), &request);
        if let Err(e) = asked.await {
            tracing::warn!("Guest gate not closed: {e}");
        }
    }

    /// Gives devices back to the host. A guest that does not let go of one loses its VM.
    pub(super) async fn take_back(&mut self, devices: Vec<Box<dyn Release>>) {
        let Some(pod) = self.pod.upgrade() else {
            return;
        };
        for mut device in devices {
            let vm = pod.vm().await;
            let done = tokio::time::timeout(LET_GO, device.detach(vm.as_deref())).await;
            if matches!(done, Ok(Ok(()))) {
                continue;
            }
            tracing::error!(
                pod = pod.id(),
                device = device.id(),
                "The guest does not let go of a device: its VM is ended"
            );
            if let Some(vm) = vm {
                vm.stop().await;
            }
            if let Err(e) = device.detach(None).await {
                tracing::error!("{}", crate::error::chain(&e));
            }
        }
    }

    /// Renews the lease. Returns when to come again; `None` when there is nothing to renew any more.
    pub(super) async fn renew(&mut self) -> Option<Duration> {
        if self.lost.is_some() {
            return None;
        }
        let until = self.affirmed.as_ref().map(|a| a.until)?;
        let why = match self.renew_now().await {
            Ok(()) => {
                let ids = self.released.iter().map(|r| r.id().to_owned()).collect();
                match self.record("lease", "renewed", String::new(), ids) {
                    Ok(()) => return Some(self.half_life()),
                    Err(e) => e,
                }
            }
            // Not a word against the pod: it is asked again while the lease lasts.
            Err(e) if unreachable(&e) && Instant::now() + RETRY < until => {
                tracing::warn!("Lease not renewed yet: {}", crate::error::chain(&e));
                return Some(RETRY);
            }
            Err(e) => e,
        };
        self.lose(crate::error::chain(&why)).await;
        None
    }

    /// The pod is no longer affirmed.
    async fn lose(&mut self, why: String) {
        let Some(pod) = self.pod.upgrade() else {
            return;
        };
        let ids: Vec<String> = self.released.iter().map(|r| r.id().to_owned()).collect();
        tracing::error!(pod = pod.id(), devices = ?ids, "Lease lost: {why}");
        if let Err(e) = self.record("revocation", "withheld", why.clone(), ids) {
            tracing::error!("{}", crate::error::chain(&e));
        }
        self.lost = Some(why);
        self.affirmed = None;
        match self.settings.policy.on_loss {
            OnLoss::Kill => {
                if let Some(vm) = pod.vm().await {
                    vm.stop().await;
                }
            }
            OnLoss::Freeze => {
                pod.freeze().await;
                self.ask_back(&self.released).await;
            }
        }
        let devices = std::mem::take(&mut self.released);
        self.take_back(devices).await;
    }

    /// The VM has ended: what it had goes back to the host. Idempotent.
    pub async fn ended(&mut self) {
        self.affirmed = None;
        drop(std::mem::take(&mut self.withheld));
        for mut device in std::mem::take(&mut self.released) {
            if let Err(e) = device.detach(None).await {
                tracing::error!("{}", crate::error::chain(&e));
            }
        }
    }
}

/// Whether the error says nothing about the pod: the verifier could not be asked.
fn unreachable(e: &AttestError) -> bool {
    matches!(
        e,
        AttestError::Verifier(VerifierError::Remote(_) | VerifierError::Busy)
    )
}

/// Comes again at half of each lease, until there is none.
pub(super) async fn renew(pod: Weak<Pod>, first: Duration) {
    let mut pause = first;
    loop {
        tokio::time::sleep(pause).await;
        let gate = pod.upgrade().and_then(|pod| pod.gate());
        let Some(gate) = gate else {
            return;
        };
        match gate
            .call(|g| Box::pin(async move { g.renew().await }))
            .await
        {
            Ok(Some(next)) => pause = next,
            _ => return,
        }
    }
}
