//! The Sandbox service (containerd 2, `sandboxer = "shim"`): the pod without a pause container.
//! Source: containerd's api/runtime/sandbox/v1/sandbox.proto.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox,
    types::platform::Platform,
};
use ttrpc::{Result, r#async::TtrpcContext};

use super::convert;
use crate::{
    clock,
    error::Error,
    pod::{Pod, SandboxRequest},
};

pub(super) struct SandboxService {
    pod: Arc<Pod>,
}

impl SandboxService {
    pub(super) fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    /// The one sandbox that this shim serves.
    fn check(&self, id: &str) -> Result<()> {
        if id == self.pod.id() {
            return Ok(());
        }
        let text = format!(
            "sandbox {id:?} not found: this shim serves {:?}",
            self.pod.id()
        );
        Err(Error::not_found(text).into())
    }
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        r: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        self.check(&r.sandbox_id)?;
        let request = SandboxRequest {
            bundle: r.bundle_path.into(),
            netns: (!r.netns_path.is_empty()).then(|| r.netns_path.into()),
            annotations: r.annotations,
            config: convert::config_path(r.options.as_ref())?,
            pod: convert::pod_config(r.options.as_ref())?,
        };
        self.pod.create_sandbox(request)?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        r: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        self.check(&r.sandbox_id)?;
        let (pid, created_ns) = self.pod.start_sandbox().await?;
        Ok(StartSandboxResponse {
            pid,
            created_at: Some(clock::timestamp(created_ns)).into(),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, r: PlatformRequest) -> Result<PlatformResponse> {
        self.check(&r.sandbox_id)?;
        let platform = Platform {
            os: "linux".into(),
            architecture: "amd64".into(),
            ..Default::default()
        };
        Ok(PlatformResponse {
            platform: Some(platform).into(),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        r: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        self.check(&r.sandbox_id)?;
        self.pod.stop_vm().await;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        r: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        self.check(&r.sandbox_id)?;
        let exit = self.pod.wait_vm().await;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: Some(clock::timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        r: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        self.check(&r.sandbox_id)?;
        let status = self.pod.sandbox_status();
        Ok(SandboxStatusResponse {
            sandbox_id: r.sandbox_id,
            pid: self.pod.pid(),
            state: if status.ready {
                "SANDBOX_READY"
            } else {
                "SANDBOX_NOTREADY"
            }
            .into(),
            created_at: status.created_ns.map(clock::timestamp).into(),
            exited_at: status.exit.map(|e| clock::timestamp(e.at_ns)).into(),
            info: if r.verbose {
                self.pod.info()
            } else {
                Default::default()
            },
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, r: PingRequest) -> Result<PingResponse> {
        self.check(&r.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        r: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        self.check(&r.sandbox_id)?;
        self.pod.shutdown(true).await;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        r: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        self.check(&r.sandbox_id)?;
        let mut response = SandboxMetricsResponse::new();
        let metric = response.metrics.mut_or_insert_default();
        metric.id = r.sandbox_id;
        metric.timestamp = Some(clock::now_timestamp()).into();
        metric.data = Some(self.pod.stats("").await?).into();
        Ok(response)
    }
}
