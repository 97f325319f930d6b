//! The first words with the agent of a new VM: what it says, and what it is told of the pod.

use std::time::Duration;

use oci_spec::runtime::LinuxNamespaceType;
use sealpod_protocol::agent;

use super::boot::{BootRequest, failed};
use crate::{
    attest::Settings,
    clock,
    error::{Error, Result},
    guest::{Dialled, Guest},
    network::PodNetwork,
    spec, vm,
};

/// Size of the pod's shared memory file system where the pod says nothing: containerd's default.
const SHM_BYTES: u64 = 64 << 20;
/// Randomness given to a new guest.
const ENTROPY_BYTES: usize = 256;
/// Console lines told with a guest that did not come up.
const CONSOLE_LINES: usize = 20;

/// Waits for the agent to dial and answer, for the VM to end, or for the time to run out.
pub(super) async fn answer(
    vm: &dyn vm::Vm,
    dialled: Dialled,
    limit: Duration,
) -> Result<(Guest, agent::HelloResponse)> {
    let ended = async { vm.wait().await.to_string() };
    match dialled.answered(ended, limit).await {
        Ok(answered) => Ok(answered),
        Err(e) => {
            vm::log_where_it_stands(vm).await;
            vm.stop().await;
            Err(with_console(failed(&e), &vm.console_tail()))
        }
    }
}

/// Makes the guest the pod's.
pub(super) async fn set_up(
    guest: &Guest,
    request: &BootRequest,
    network: &PodNetwork,
    attested: &Settings,
) -> Result<()> {
    let mut entropy = vec![0; ENTROPY_BYTES];
    getrandom(&mut entropy).map_err(|e| failed(&e))?;
    let spec = request.spec.as_ref();
    let sandbox =
        spec.filter(|_| spec::role(&request.annotations).is_ok_and(|r| r == spec::Role::Sandbox));
    let sysctls = sandbox.and_then(|s| s.linux().as_ref()?.sysctl().clone());
    // A container that is a pod by itself sets the host name in its own UTS namespace, if it has one.
    let own_uts = spec.is_some_and(|s| spec::namespace(s, LinuxNamespaceType::Uts).is_some());
    let hostname = match sandbox {
        None if own_uts => None,
        _ => spec.and_then(|s| s.hostname().clone()),
    };
    let message = agent::SetupSandboxRequest {
        hostname: hostname.unwrap_or_default(),
        time_unix_ns: clock::unix_ns(),
        entropy,
        share: true,
        network: Some(network.to_proto()).into(),
        sysctls: sysctls.unwrap_or_default(),
        shm_bytes: spec.and_then(spec::pod_shm_bytes).unwrap_or(SHM_BYTES),
        init_data: attested.init_data.clone(),
        pod_uid: attested.pod_uid.clone(),
        ..Default::default()
    };
    guest
        .agent()
        .setup_sandbox(Guest::soon(), &message)
        .await
        .map_err(Error::from)?;
    Ok(())
}

fn getrandom(buffer: &mut [u8]) -> std::io::Result<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(buffer)
}

/// A guest that does not come up says why on its console.
fn with_console(e: Error, console: &[String]) -> Error {
    let lines = &console[console.len().saturating_sub(CONSOLE_LINES)..];
    let said = if lines.is_empty() {
        "the guest's console was empty".to_owned()
    } else {
        format!("the guest's last console lines were:\n{}", lines.join("\n"))
    };
    Error::new(e.kind, format!("{}; {said}", e.message))
}
