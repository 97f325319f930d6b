//! The ttrpc service of agent.proto: requests checked and handed to what carries them out, errors given
//! the code that the shim acts on. Nothing is decided here.

mod inner;

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use oci_spec::runtime::LinuxResources;
use protobuf::Message;
use sealpod_protocol::PROTOCOL_VERSION;
use sealpod_protocol::agent::{
    AdmitDevicesRequest, AttestRequest, AttestResponse, ContainerRequest, CreateContainerRequest,
    CreateContainerResponse, Empty, Event, ExecRequest, ExecResponse, HelloRequest, HelloResponse,
    Network as NetworkRequest, Oom, PidsResponse, Process, ProcessRequest, ResizePtyRequest,
    RevokeDevicesRequest, SetupSandboxRequest, SignalRequest, StatsResponse, UpdateRequest,
    WaitResponse, event,
};
use sealpod_protocol::agent_ttrpc::Agent;
use tokio::sync::{Mutex, mpsc};
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, Result};

use crate::attest::{Attestor, Gate};
use crate::cgroup::{self, oom, stats};
use crate::container::Containers;
use crate::log;
use crate::network::Plan;
use crate::reaper::Reaper;
use crate::sandbox::{self, Sandbox};
use crate::start::Timeline;
use crate::status::{attest_error, container_error, network_error, sandbox_error, status};
use inner::{Inner, check_id, check_process};

/// Largest signal number.
const SIGNAL_MAX: u32 = 64;
/// Time for the answer to a shutdown to leave before the guest ends.
const FAREWELL: std::time::Duration = std::time::Duration::from_millis(50);

/// The agent's service.
#[derive(Debug, Clone)]
pub struct Service(Arc<Inner>);

/// Runs `work` to its end even if the request is given up: a container half made would be nobody's.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|e| Err(status(Code::INTERNAL, e)))
}

impl Service {
    /// A service for a guest in which nothing runs yet.
    #[must_use]
    pub fn new(reaper: Reaper, gate: Gate) -> Self {
        let (sender, events) = mpsc::channel(oom::QUEUE);
        Self(Arc::new(Inner {
            containers: Containers::new(reaper, sender),
            sandbox: Sandbox::default(),
            attestor: Attestor::new(gate),
            network: Mutex::default(),
            events: Mutex::new(events),
            timeline: std::sync::Mutex::default(),
        }))
    }

    /// Notes when the guest began and was ready, which the shim asks for.
    pub fn ready(&self, timeline: Timeline) {
        *self.0.timeline() = timeline;
    }

    /// Whether a shim has set a pod up in this guest.
    #[must_use]
    pub fn is_a_pods(&self) -> bool {
        self.0.sandbox.is_set_up()
    }
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> Result<HelloResponse> {
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(status(
                Code::FAILED_PRECONDITION,
                format_args!(
                    "The agent speaks protocol version {PROTOCOL_VERSION}, the shim {}: initramfs and shim are not of one build",
                    request.protocol_version
                ),
            ));
        }
        let timeline = *self.0.timeline();
        Ok(timeline.hello())
    }

    async fn setup_sandbox(&self, _: &TtrpcContext, request: SetupSandboxRequest) -> Result<Empty> {
        let this = self.clone();
        to_the_end(async move {
            let plan = Plan::try_from(request.network.get_or_default())
                .map_err(|e| network_error(e.into()))?;
            this.0.sandbox.set_up(&request).map_err(sandbox_error)?;
            let attestor = &this.0.attestor;
            let known = attestor.set_up(&request.init_data, &request.pod_uid);
            known.map_err(attest_error)?;
            let mut network = this.0.network.lock().await;
            network.configure(plan).await.map_err(network_error)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn configure_network(&self, _: &TtrpcContext, request: NetworkRequest) -> Result<Empty> {
        let this = self.clone();
        to_the_end(async move {
            let plan = Plan::try_from(&request).map_err(|e| network_error(e.into()))?;
            let mut network = this.0.network.lock().await;
            network.configure(plan).await.map_err(network_error)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Result<CreateContainerResponse> {
        check_id("container", &request.container_id)?;
        self.0.attestor.may_run().map_err(attest_error)?;
        let this = self.clone();
        to_the_end(async move {
            let devices = this.0.admitted(&request)?;
            let pid = this
                .0
                .containers
                .create(request, devices)
                .await
                .map_err(container_error)?;
            Ok(CreateContainerResponse {
                pid: pid.unsigned_abs(),
                ..Default::default()
            })
        })
        .await
    }

    async fn start_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        check_id("container", &request.container_id)?;
        self.0.attestor.may_run().map_err(attest_error)?;
        let container = self
            .0
            .containers
            .get(&request.container_id)
            .map_err(container_error)?;
        to_the_end(async move {
            container.start().await.map_err(container_error)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        check_id("container", &request.container_id)?;
        let this = self.clone();
        to_the_end(async move {
            let deleted = this.0.containers.delete(&request.container_id).await;
            deleted.map_err(container_error)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> Result<ExecResponse> {
        check_id("container", &request.container_id)?;
        check_id("exec", &request.exec_id)?;
        self.0.attestor.may_run().map_err(attest_error)?;
        let this = self.clone();
        to_the_end(async move {
            let pid = this
                .0
                .containers
                .exec(request)
                .await
                .map_err(container_error)?;
            Ok(ExecResponse {
                pid: pid.unsigned_abs(),
                ..Default::default()
            })
        })
        .await
    }

    async fn delete_process(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        check_process(&request.container_id, &request.exec_id)?;
        // A container that is gone is gone with all its processes.
        if let Ok(container) = self.0.containers.get(&request.container_id) {
            let deleted = container.delete_process(&request.exec_id);
            deleted.map_err(container_error)?;
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<WaitResponse> {
        let (container, process) = self.0.process(&request.container_id, &request.exec_id)?;
        let ended = process.wait().await.map_err(container_error)?;
        if ended.exit.killed {
            container.check_oom();
            tokio::task::yield_now().await; // the event's answer leaves first
        }
        Ok(WaitResponse {
            exit_status: ended.exit.status,
            exited_at_unix_ns: ended.exit.at_unix_ns,
            stdout_bytes: ended.stdout_bytes,
            stderr_bytes: ended.stderr_bytes,
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> Result<Empty> {
        let number = i32::try_from(request.signal)
            .ok()
            .filter(|_| request.signal <= SIGNAL_MAX);
        let Some(number) = number else {
            return Err(status(
                Code::INVALID_ARGUMENT,
                format_args!("Signal {}: 0 to {SIGNAL_MAX} are allowed", request.signal),
            ));
        };
        let (container, process) = self.0.process(&request.container_id, &request.exec_id)?;
        let sent = if request.all {
            container.signal_all(number)
        } else {
            process.signal(number)
        };
        sent.map_err(container_error)?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let (_, process) = self.0.process(&request.container_id, &request.exec_id)?;
        let size = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        let resized = process.resize(size(request.width), size(request.height));
        resized.map_err(container_error)?;
        Ok(Empty::new())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> Result<Empty> {
        let (_, process) = self.0.process(&request.container_id, &request.exec_id)?;
        process.streams().close_stdin();
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<PidsResponse> {
        let container = self.0.container(&request.container_id)?;
        let mut response = PidsResponse::new();
        for (pid, exec_id) in container.pids().map_err(container_error)? {
            response.processes.push(Process {
                pid: pid.unsigned_abs(),
                exec_id,
                ..Default::default()
            });
        }
        Ok(response)
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        to_the_end(async move {
            container.pause().await.map_err(container_error)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<Empty> {
        check_id("container", &request.container_id)?;
        self.0.attestor.may_run().map_err(attest_error)?;
        let container = self
            .0
            .containers
            .get(&request.container_id)
            .map_err(container_error)?;
        to_the_end(async move {
            container.resume().await.map_err(container_error)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        let resources: LinuxResources =
            serde_json::from_slice(&request.resources).map_err(|e| {
                status(
                    Code::INVALID_ARGUMENT,
                    format_args!("Invalid resources: {e}"),
                )
            })?;
        container.update(&resources).map_err(container_error)?;
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> Result<StatsResponse> {
        let metrics = if request.container_id.is_empty() {
            stats::read(Path::new(cgroup::ROOT))
        } else {
            check_id("container", &request.container_id)?;
            let found = self.0.containers.get(&request.container_id);
            stats::read(found.map_err(container_error)?.cgroup_path())
        };
        let metrics = metrics
            .write_to_bytes()
            .map_err(|e| status(Code::INTERNAL, e))?;
        Ok(StatsResponse {
            metrics,
            ..Default::default()
        })
    }

    async fn attest(&self, _: &TtrpcContext, request: AttestRequest) -> Result<AttestResponse> {
        let bundle = self.0.attestor.attest(&request).await;
        Ok(AttestResponse {
            bundle: bundle.map_err(attest_error)?,
            ..Default::default()
        })
    }

    async fn admit_devices(&self, _: &TtrpcContext, request: AdmitDevicesRequest) -> Result<Empty> {
        let this = self.clone();
        to_the_end(async move {
            let lease = this.0.attestor.admit(&request).await;
            let lease = lease.map_err(attest_error)?;
            // Renewed in time, another lease counts then.
            tokio::spawn(async move {
                tokio::time::sleep_until(lease.until).await;
                if this.0.attestor.end(&lease) {
                    log!("the lease has ended");
                    // One that is for no device is the pod's itself.
                    this.0.containers.freeze(!request.devices.is_empty()).await;
                    let _ = this.0.revoke(&[]).await;
                }
            });
            Ok(Empty::new())
        })
        .await
    }

    async fn revoke_devices(
        &self,
        _: &TtrpcContext,
        request: RevokeDevicesRequest,
    ) -> Result<Empty> {
        let this = self.clone();
        to_the_end(async move {
            this.0.revoke(&request.devices).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> Result<Event> {
        let mut events = self.0.events.lock().await;
        let container_id = events.recv().await;
        let container_id =
            container_id.ok_or_else(|| status(Code::UNAVAILABLE, "no more events"))?;
        Ok(Event {
            kind: Some(event::Kind::Oom(Oom {
                container_id,
                ..Default::default()
            })),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> Result<Empty> {
        self.0.containers.kill_all();
        sandbox::sync();
        tokio::spawn(async {
            tokio::time::sleep(FAREWELL).await;
            sandbox::power_off()
        });
        Ok(Empty::new())
    }
}
