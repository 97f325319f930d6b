//! Whether a pod's VM goes on from a template ([`vm::template`]) or boots. A template is never in the way: what
//! goes wrong with it is one line in the log, and the VM boots.

use std::{os::fd::OwnedFd, sync::Arc};

use sealpod_protocol::agent::HelloResponse;

use super::{Mark, Pod, boot::Plan, lock};
use crate::{
    error::chain,
    guest::Guest,
    ledger::Ledger,
    vm::{
        self,
        template::{self, Restored, TemplateError},
    },
};

/// A VM like `config`, from a template; none where it is to boot.
pub(super) async fn restored(
    pod: &Pod,
    plan: &Plan,
    config: &vm::VmConfig,
    ledger: &Ledger,
) -> Option<Restored> {
    if !plan.may_use_template() {
        return None;
    }
    pod.timeline.mark(Mark::VmStarting);
    let state_dir = &plan.config.runtime.state_dir;
    match template::start(state_dir, config, ledger, plan.boot_limit()).await {
        Ok(Some(restored)) => Some(restored),
        Ok(None) => {
            tracing::info!("The VM boots: its template is being made");
            None
        }
        Err(e) => boots(&e),
    }
}

/// Gives it the pod's share and network devices, and waits for its agent.
pub(super) async fn with_devices(
    pod: &Pod,
    restored: Option<Restored>,
    share: &OwnedFd,
    nics: &[vm::Nic],
) -> Option<(Arc<dyn vm::Vm>, Guest, HelloResponse)> {
    match restored?.plug(share, nics).await {
        Ok(plugged) => {
            *lock(&pod.learning) = plugged.learning;
            Some((plugged.vm, plugged.guest, plugged.hello))
        }
        Err(e) => boots(&e),
    }
}

fn boots<T>(e: &TemplateError) -> Option<T> {
    tracing::warn!(
        "The VM boots instead of going on from a template: {}",
        chain(e)
    );
    None
}
