//! The Task service. Source: containerd's api/runtime/task/v3/shim.proto.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::well_known_types::any::Any,
    shim_async::Task,
};
use serde::Serialize;
use ttrpc::{Result, r#async::TtrpcContext};

use super::convert;
use crate::{
    clock,
    container::{CreateRequest, Handle},
    error::{Error, Kind},
    io::Uris,
    pod::Pod,
    spec,
};

/// Type of a process's details in `Pids`, as containerd's runc options define it (exec_id = 1).
const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";

pub(super) struct TaskService {
    pod: Arc<Pod>,
}

impl TaskService {
    pub(super) fn new(pod: Arc<Pod>) -> Self {
        Self { pod }
    }

    async fn task(&self, id: &str) -> Result<Handle> {
        Ok(self.pod.container(id).await?)
    }
}

/// The JSON value of an `Any`, checked to be a `T` and made one for the guest.
fn json<T: serde::de::DeserializeOwned + Serialize>(
    what: &str,
    any: Option<&Any>,
    translate: impl FnOnce(&mut T),
) -> Result<Vec<u8>> {
    let any = any.ok_or_else(|| Error::invalid(format!("{what} is missing")))?;
    let mut typed: T = serde_json::from_slice(&any.value)
        .map_err(|e| Error::invalid(format!("{what} ({}) cannot be read: {e}", any.type_url)))?;
    translate(&mut typed);
    let text = serde_json::to_vec(&typed);
    Ok(text.map_err(|e| Error::invalid(format!("{what}: {e}")))?)
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, r: StateRequest) -> Result<StateResponse> {
        let s = self.task(&r.id).await?.state(r.exec_id.clone()).await?;
        Ok(StateResponse {
            id: r.id,
            bundle: s.bundle,
            pid: s.pid,
            status: convert::status(s.status).into(),
            stdin: s.uris.stdin,
            stdout: s.uris.stdout,
            stderr: s.uris.stderr,
            terminal: s.uris.terminal,
            exit_status: s.exit.map_or(0, |e| e.status),
            exited_at: s.exit.map(|e| clock::timestamp(e.at_ns)).into(),
            exec_id: r.exec_id,
            ..Default::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, r: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if !r.checkpoint.is_empty() || !r.parent_checkpoint.is_empty() {
            let text = "Restoring a checkpoint is not supported: a container lives in a VM";
            return Err(Error::new(Kind::Unimplemented, text).into());
        }
        let config = convert::config_path(r.options.as_ref())?;
        let request = CreateRequest {
            id: r.id,
            bundle: r.bundle.into(),
            rootfs: r.rootfs,
            uris: Uris {
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
                terminal: r.terminal,
            },
        };
        Ok(CreateTaskResponse {
            pid: self.pod.create_task(request, config).await?,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, r: StartRequest) -> Result<StartResponse> {
        Ok(StartResponse {
            pid: self.task(&r.id).await?.start(r.exec_id).await?,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, r: DeleteRequest) -> Result<DeleteResponse> {
        let (exit, pid) = self.task(&r.id).await?.delete(r.exec_id).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: Some(clock::timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: PidsRequest) -> Result<PidsResponse> {
        let processes = self.task(&r.id).await?.pids().await?.into_iter();
        let info = processes.map(|(pid, exec_id)| {
            let details = (!exec_id.is_empty()).then(|| Any {
                type_url: PROCESS_DETAILS.into(),
                // Field 1, length-delimited; ids are shorter than 128 bytes, one length byte.
                value: [
                    &[0x0a, u8::try_from(exec_id.len()).unwrap_or(0)],
                    exec_id.as_bytes(),
                ]
                .concat(),
                ..Default::default()
            });
            ProcessInfo {
                pid,
                info: details.into(),
                ..Default::default()
            }
        });
        Ok(PidsResponse {
            processes: info.collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, r: PauseRequest) -> Result<Empty> {
        self.task(&r.id).await?.set_paused(true).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, r: ResumeRequest) -> Result<Empty> {
        self.task(&r.id).await?.set_paused(false).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: CheckpointTaskRequest) -> Result<Empty> {
        self.task(&r.id).await?;
        let text = "Checkpoint is not supported: a container lives in a VM, whose state cannot be \
                    restored elsewhere container by container";
        Err(Error::new(Kind::Unimplemented, text).into())
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> Result<Empty> {
        self.task(&r.id)
            .await?
            .kill(r.exec_id, r.signal, r.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecProcessRequest) -> Result<Empty> {
        let as_it_is = |_: &mut oci_spec::runtime::Process| {};
        let spec = json("The process to execute", r.spec.as_ref(), as_it_is)?;
        let uris = Uris {
            stdin: r.stdin,
            stdout: r.stdout,
            stderr: r.stderr,
            terminal: r.terminal,
        };
        self.task(&r.id).await?.exec(r.exec_id, uris, spec).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: ResizePtyRequest) -> Result<Empty> {
        self.task(&r.id)
            .await?
            .resize(r.exec_id, r.width, r.height)
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, r: CloseIORequest) -> Result<Empty> {
        let task = self.task(&r.id).await?;
        if r.stdin {
            task.close_stdin(r.exec_id).await?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateTaskRequest) -> Result<Empty> {
        let task = self.task(&r.id).await?;
        let resources = json(
            "The resources to set",
            r.resources.as_ref(),
            spec::translate_update,
        )?;
        task.update(resources).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, r: WaitRequest) -> Result<WaitResponse> {
        let exit = self.task(&r.id).await?.wait(r.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: Some(clock::timestamp(exit.at_ns)).into(),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, r: StatsRequest) -> Result<StatsResponse> {
        Ok(StatsResponse {
            stats: Some(self.task(&r.id).await?.stats().await?).into(),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, r: ConnectRequest) -> Result<ConnectResponse> {
        // containerd asks before the first task is there, too: then there is no VM yet.
        let task_pid = self.pod.task_pid(&r.id);
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, r: ShutdownRequest) -> Result<Empty> {
        self.pod.shutdown(r.now).await;
        Ok(Empty::new())
    }
}
