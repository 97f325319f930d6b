//! For tests: the agent, but it breaks the rules of attestation in the way that the kernel's command line names
//! (`hostile.agent=WAY`). Whoever expects its measurement trusts it; what holds then is the host gate alone.
//! Nothing but a test's initramfs has it.
//!
//! | way | what it does |
//! |---|---|
//! | `replay` | every question is answered with the evidence of the first one about the same devices |
//! | `stale-nonce` | evidence over another nonce than the one that was asked with |
//! | `other-pod` | evidence of a pod of another name |
//! | `other-key` | evidence with another key than the one that was bound |
//! | `open-gate` | devices are taken for admitted without a token, and never given back |

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use sealpod_agent::service::Service;
use sealpod_attestation::binding::EphemeralKey;
use sealpod_attestation::evidence::Bundle;
use sealpod_protocol::agent::{
    AdmitDevicesRequest, AttestRequest, AttestResponse, ContainerRequest, CreateContainerRequest,
    CreateContainerResponse, Empty, Event, ExecRequest, ExecResponse, HelloRequest, HelloResponse,
    Network, PidsResponse, ProcessRequest, ResizePtyRequest, RevokeDevicesRequest,
    SetupSandboxRequest, SignalRequest, StatsResponse, UpdateRequest, WaitResponse,
};
use sealpod_protocol::agent_ttrpc::Agent;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Result};

/// Word of the kernel's command line.
const WORD: &str = "hostile.agent=";

fn main() {
    sealpod_agent::init::main(|service| {
        let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let way = cmdline
            .split_whitespace()
            .find_map(|w| w.strip_prefix(WORD));
        Arc::new(Hostile {
            service,
            way: way.unwrap_or_default().into(),
            first: Mutex::default(),
        })
    });
}

struct Hostile {
    service: Service,
    way: String,
    /// The first answer about each set of devices.
    first: Mutex<HashMap<Vec<String>, AttestResponse>>,
}

fn failed(why: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INTERNAL, why))
}

impl Hostile {
    fn is(&self, way: &str) -> bool {
        self.way == way
    }
}

/// The bundle, with a key that nobody has bound.
fn with_other_key(answer: &AttestResponse) -> Result<AttestResponse> {
    let mut bundle = Bundle::from_json(&answer.bundle).map_err(failed)?;
    bundle.key = EphemeralKey::from_random(&[7; 48])
        .map_err(failed)?
        .public();
    Ok(AttestResponse {
        bundle: bundle.to_json().map_err(failed)?,
        ..Default::default()
    })
}

/// What it does like any agent.
macro_rules! honestly {
    ($($method:ident($request:ty) -> $response:ty;)*) => {
        #[async_trait]
        impl Agent for Hostile {
            $(async fn $method(&self, ctx: &TtrpcContext, request: $request) -> Result<$response> {
                self.service.$method(ctx, request).await
            })*

            async fn setup_sandbox(
                &self,
                ctx: &TtrpcContext,
                mut request: SetupSandboxRequest,
            ) -> Result<Empty> {
                if self.is("other-pod") {
                    request.pod_uid = "another-pod".into();
                }
                self.service.setup_sandbox(ctx, request).await
            }

            async fn create_container(
                &self,
                ctx: &TtrpcContext,
                mut request: CreateContainerRequest,
            ) -> Result<CreateContainerResponse> {
                if self.is("open-gate") {
                    request.admitted_devices.clear();
                }
                self.service.create_container(ctx, request).await
            }

            async fn attest(
                &self,
                ctx: &TtrpcContext,
                mut request: AttestRequest,
            ) -> Result<AttestResponse> {
                if self.is("stale-nonce")
                    && let Some(byte) = request.nonce.first_mut()
                {
                    *byte ^= 1;
                }
                let devices = request.devices.clone();
                let answer = self.service.attest(ctx, request).await?;
                if self.is("other-key") {
                    return with_other_key(&answer);
                }
                let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
                let first = first.entry(devices).or_insert_with(|| answer.clone());
                Ok(if self.is("replay") { first.clone() } else { answer })
            }

            async fn admit_devices(
                &self,
                ctx: &TtrpcContext,
                request: AdmitDevicesRequest,
            ) -> Result<Empty> {
                if self.is("open-gate") {
                    return Ok(Empty::new());
                }
                self.service.admit_devices(ctx, request).await
            }

            async fn revoke_devices(
                &self,
                ctx: &TtrpcContext,
                request: RevokeDevicesRequest,
            ) -> Result<Empty> {
                if self.is("open-gate") {
                    return Ok(Empty::new());
                }
                self.service.revoke_devices(ctx, request).await
            }
        }
    };
}

honestly! {
    hello(HelloRequest) -> HelloResponse;
    configure_network(Network) -> Empty;
    start_container(ContainerRequest) -> Empty;
    delete_container(ContainerRequest) -> Empty;
    exec(ExecRequest) -> ExecResponse;
    delete_process(ProcessRequest) -> Empty;
    wait(ProcessRequest) -> WaitResponse;
    signal(SignalRequest) -> Empty;
    resize_pty(ResizePtyRequest) -> Empty;
    close_stdin(ProcessRequest) -> Empty;
    pids(ContainerRequest) -> PidsResponse;
    pause(ContainerRequest) -> Empty;
    resume(ContainerRequest) -> Empty;
    update(UpdateRequest) -> Empty;
    stats(ContainerRequest) -> StatsResponse;
    next_event(Empty) -> Event;
    shutdown(Empty) -> Empty;
}
