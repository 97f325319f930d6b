//! A small client of the Container Runtime Interface, blocking, as a kubelet would use it. Only turns
//! calls into gRPC; what is asserted lies in the tests.

mod streams;

use std::{collections::HashMap, time::Duration};

use anyhow::{Context, Result};
use k8s_cri::v1::{
    self as api, ContainerConfig, ContainerState, ExecSyncResponse, PodSandboxConfig,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::runtime::Runtime;
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint},
};

use crate::{Env, image, wait};

/// containerd namespace of the CRI plugin.
pub const NAMESPACE: &str = "k8s.io";

type Client = RuntimeServiceClient<Channel>;

/// See the module.
#[derive(Debug)]
pub struct Cri {
    tokio: Runtime,
    client: Client,
    tag: String,
    logs: std::path::PathBuf,
}

/// A running pod sandbox.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Sandbox id.
    pub id: String,
    /// What it was made of: containers are created with it again.
    pub config: PodSandboxConfig,
}

impl Cri {
    /// Connects and waits until runtime and network are ready; imports the pause and busybox images.
    ///
    /// # Errors
    /// Where an image cannot be imported.
    ///
    /// # Panics
    /// When the plugin does not get ready.
    pub fn connect(env: &mut Env) -> Result<Self> {
        env.import(NAMESPACE, &image::pause()?)?;
        env.import(NAMESPACE, &image::busybox()?)?;
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let address = format!("unix:{}", env.containerd.address().display());
        let channel = tokio.block_on(async {
            Endpoint::from_shared(address)?
                .connect()
                .await
                .context("CRI")
        })?;
        let logs = env.folder().join("logs");
        std::fs::create_dir_all(&logs)?;
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(64 << 20);
        let cri = Self {
            tokio,
            client,
            tag: env.tag().to_owned(),
            logs,
        };
        wait::until("CRI plugin ready", Duration::from_secs(30), || {
            let status = cri
                .call(async |c| c.status(api::StatusRequest { verbose: false }).await)
                .ok()?;
            status
                .status?
                .conditions
                .iter()
                .all(|c| c.status)
                .then_some(())
        });
        env.rebase();
        Ok(cri)
    }

    /// Any call, with a deadline.
    ///
    /// # Errors
    /// The server's.
    pub fn call<T>(
        &self,
        f: impl AsyncFnOnce(&mut Client) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        let mut client = self.client.clone();
        self.tokio.block_on(async {
            let limit = Duration::from_secs(90) * wait::patience();
            match tokio::time::timeout(limit, f(&mut client)).await {
                Ok(answer) => answer.map(Response::into_inner),
                Err(_) => Err(Status::deadline_exceeded("the test waited too long")),
            }
        })
    }

    /// Two calls or more at once.
    pub fn block_on<F: Future>(&self, f: F) -> F::Output {
        self.tokio.block_on(f)
    }

    /// A further handle for [`Self::block_on`].
    #[must_use]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// A pod's configuration as a kubelet fills it, before `change`.
    #[must_use]
    pub fn pod_config(
        &self,
        name: &str,
        change: impl FnOnce(&mut PodSandboxConfig),
    ) -> PodSandboxConfig {
        let logs = self.logs.join(name);
        let namespaces = api::NamespaceOption {
            network: api::NamespaceMode::Pod.into(),
            pid: api::NamespaceMode::Container.into(),
            ipc: api::NamespaceMode::Pod.into(),
            ..Default::default()
        };
        let mut config = PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "default".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: logs.to_string_lossy().into_owned(),
            dns_config: Some(api::DnsConfig {
                servers: vec!["192.0.2.53".into()],
                searches: vec!["sealpod.test".into()],
                options: vec![],
            }),
            linux: Some(api::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.tag),
                security_context: Some(api::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let _ = std::fs::create_dir_all(&config.log_directory);
        config
    }

    /// Runs a pod.
    ///
    /// # Errors
    /// The server's.
    pub fn run_pod(
        &self,
        name: &str,
        change: impl FnOnce(&mut PodSandboxConfig),
    ) -> Result<Pod, Status> {
        let config = self.pod_config(name, change);
        let request = api::RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: String::new(),
        };
        let id = self
            .call(async |c| c.run_pod_sandbox(request).await)?
            .pod_sandbox_id;
        Ok(Pod { id, config })
    }

    /// Creates a busybox container, not started.
    ///
    /// # Errors
    /// The server's.
    pub fn create(
        &self,
        pod: &Pod,
        name: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String, Status> {
        let mut config = ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: name.into(),
                attempt: 0,
            }),
            image: Some(api::ImageSpec {
                image: image::BUSYBOX.into(),
                ..Default::default()
            }),
            command: ["sleep", "1000"].map(String::from).into(),
            log_path: format!("{name}.log"),
            linux: Some(api::LinuxContainerConfig {
                security_context: Some(api::LinuxContainerSecurityContext {
                    namespace_options: pod
                        .config
                        .linux
                        .as_ref()
                        .and_then(|l| l.security_context.as_ref())
                        .and_then(|s| s.namespace_options.clone()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        Ok(self
            .call(async |c| c.create_container(request).await)?
            .container_id)
    }

    /// Starts a created container.
    ///
    /// # Errors
    /// The server's.
    pub fn start(&self, id: &str) -> Result<(), Status> {
        let request = api::StartContainerRequest {
            container_id: id.into(),
        };
        self.call(async |c| c.start_container(request).await)
            .map(drop)
    }

    /// Creates and starts one.
    ///
    /// # Errors
    /// The server's.
    pub fn run(
        &self,
        pod: &Pod,
        name: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String, Status> {
        let id = self.create(pod, name, change)?;
        self.start(&id)?;
        Ok(id)
    }

    /// Runs a command in a container to its end; a limit of 0 s is none, others are multiplied by
    /// [`wait::patience`].
    ///
    /// # Errors
    /// The server's, `DEADLINE_EXCEEDED` past the limit.
    pub fn exec_sync(
        &self,
        id: &str,
        command: &[&str],
        seconds: i64,
    ) -> Result<ExecSyncResponse, Status> {
        let request = api::ExecSyncRequest {
            container_id: id.into(),
            cmd: command.iter().map(|&w| w.into()).collect(),
            timeout: seconds * i64::from(wait::patience()),
        };
        self.call(async |c| c.exec_sync(request).await)
    }

    /// Standard output of a shell command that has to succeed.
    ///
    /// # Panics
    /// Where it does not.
    #[track_caller]
    pub fn sh(&self, id: &str, script: &str) -> String {
        let done = self.exec_sync(id, &["sh", "-c", script], 60).expect(script);
        let stderr = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.exit_code, 0, "{script}: {stderr}");
        String::from_utf8_lossy(&done.stdout).trim_end().to_owned()
    }

    /// A container's status.
    ///
    /// # Errors
    /// The server's.
    pub fn status(&self, id: &str) -> Result<api::ContainerStatus, Status> {
        let request = api::ContainerStatusRequest {
            container_id: id.into(),
            verbose: false,
        };
        let answer = self.call(async |c| c.container_status(request).await)?;
        answer
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// Waits until a container has exited.
    ///
    /// # Panics
    /// When it does not within 30 s.
    #[track_caller]
    pub fn wait_exit(&self, id: &str) -> api::ContainerStatus {
        wait::until("container exited", Duration::from_secs(30), || {
            let status = self.status(id).ok()?;
            (status.state == i32::from(ContainerState::ContainerExited)).then_some(status)
        })
    }

    /// Stops a container with a grace period in seconds.
    ///
    /// # Errors
    /// The server's.
    pub fn stop(&self, id: &str, seconds: i64) -> Result<(), Status> {
        let request = api::StopContainerRequest {
            container_id: id.into(),
            timeout: seconds,
        };
        self.call(async |c| c.stop_container(request).await)
            .map(drop)
    }

    /// Removes a container.
    ///
    /// # Errors
    /// The server's.
    pub fn remove(&self, id: &str) -> Result<(), Status> {
        let request = api::RemoveContainerRequest {
            container_id: id.into(),
        };
        self.call(async |c| c.remove_container(request).await)
            .map(drop)
    }

    /// Stops and removes a pod.
    ///
    /// # Errors
    /// The server's.
    pub fn remove_pod(&self, pod: &Pod) -> Result<(), Status> {
        let id = pod.id.clone();
        self.call(async |c| {
            c.stop_pod_sandbox(api::StopPodSandboxRequest { pod_sandbox_id: id })
                .await
        })?;
        let id = pod.id.clone();
        self.call(async |c| {
            c.remove_pod_sandbox(api::RemovePodSandboxRequest { pod_sandbox_id: id })
                .await
        })
        .map(drop)
    }

    /// The pod's first address.
    ///
    /// # Errors
    /// The server's.
    pub fn pod_ip(&self, pod: &Pod) -> Result<String, Status> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: pod.id.clone(),
            verbose: false,
        };
        let answer = self.call(async |c| c.pod_sandbox_status(request).await)?;
        Ok(answer
            .status
            .and_then(|s| s.network)
            .map(|n| n.ip)
            .unwrap_or_default())
    }

    /// A container's statistics.
    ///
    /// # Errors
    /// The server's.
    pub fn stats(&self, id: &str) -> Result<api::ContainerStats, Status> {
        let request = api::ContainerStatsRequest {
            container_id: id.into(),
        };
        let answer = self.call(async |c| c.container_stats(request).await)?;
        answer
            .stats
            .ok_or_else(|| Status::internal("no stats in the answer"))
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// The server's.
    pub fn update(&self, id: &str, linux: api::LinuxContainerResources) -> Result<(), Status> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: id.into(),
            linux: Some(linux),
            annotations: HashMap::new(),
            ..Default::default()
        };
        self.call(async |c| c.update_container_resources(request).await)
            .map(drop)
    }

    /// The lines of a container's log: stream name and text.
    #[must_use]
    pub fn log(&self, pod: &Pod, name: &str) -> Vec<(String, String)> {
        let path = std::path::Path::new(&pod.config.log_directory).join(format!("{name}.log"));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let field =
            |line: &str, n: usize| line.splitn(4, ' ').nth(n).unwrap_or_default().to_owned();
        text.lines()
            .map(|line| (field(line, 1), field(line, 3)))
            .collect()
    }
}
