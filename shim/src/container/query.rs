//! What is asked of a container without changing its life: state, pids, stats, exit; and the small
//! things that touch only a process's streams.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use sealpod_protocol::agent;

use super::{Container, Exit, Handle, Phase};
use crate::{
    error::{Error, Result},
    guest::Guest,
    io::Uris,
};

/// Name under which containerd's clients know the statistics of a cgroup v2.
const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// containerd's task states.
#[expect(missing_docs, reason = "containerd's names")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

/// A process at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// State.
    pub status: Status,
    /// The task's pid on the host.
    pub pid: u32,
    /// Its container's bundle.
    pub bundle: String,
    /// Its streams.
    pub uris: Uris,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
}

impl Container {
    pub(super) fn status(&self, phase: Phase) -> Status {
        match phase {
            Phase::Created => Status::Created,
            Phase::Running if self.paused => Status::Paused,
            Phase::Running => Status::Running,
            Phase::Stopped(_) => Status::Stopped,
        }
    }

    pub(super) fn status_name(&self) -> &'static str {
        match self.status(self.init.phase) {
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }

    fn snapshot(&mut self, exec_id: &str) -> Result<Snapshot> {
        let process = self.process(exec_id)?;
        let phase = process.phase;
        let uris = process.uris.clone();
        Ok(Snapshot {
            status: self.status(phase),
            pid: self.pid(),
            bundle: self.bundle.display().to_string(),
            uris,
            exit: match phase {
                Phase::Stopped(exit) => Some(exit),
                _ => None,
            },
        })
    }
}

impl Handle {
    /// State of init, or of the exec `exec_id`.
    ///
    /// # Errors
    /// An exec that is not known.
    pub async fn state(&self, exec_id: String) -> Result<Snapshot> {
        self.owner
            .call(move |c| Box::pin(async move { c.snapshot(&exec_id) }))
            .await?
    }

    /// Returns when the process has ended and its output is delivered.
    ///
    /// # Errors
    /// An exec that is not known, or was deleted meanwhile.
    pub async fn wait(&self, exec_id: String) -> Result<Exit> {
        let exited = self
            .owner
            .call(move |c| Box::pin(async move { c.process(&exec_id).map(|p| p.exited()) }));
        let mut exited = exited.await??;
        let exit = exited.wait_for(Option::is_some).await;
        let exit = exit.map_err(|_| Error::not_found("the process was deleted"))?;
        exit.ok_or_else(|| Error::not_found("the process was deleted"))
    }

    /// Its processes, init first: the task's pid for init, by which clients know it, the pid in the guest
    /// for the others, with the exec id where it is one that was asked for. The sandbox container has one
    /// that is only told.
    ///
    /// # Errors
    /// A container that does not run.
    pub async fn pids(&self) -> Result<Vec<(u32, String)>> {
        self.owner
            .call(|c| {
                Box::pin(async move {
                    if !c.in_guest {
                        return Ok(vec![(c.pid(), String::new())]);
                    }
                    if matches!(c.init.phase, Phase::Stopped(_)) {
                        return Ok(Vec::new());
                    }
                    let guest = c.pod.guest()?;
                    let reply = guest
                        .agent()
                        .pids(Guest::soon(), &Guest::container(&c.id))
                        .await;
                    let reply = reply.map_err(Error::from)?;
                    let all = reply.processes.into_iter();
                    let (init, others): (Vec<_>, Vec<_>) = all
                        .map(|p| (p.pid, p.exec_id))
                        .partition(|(pid, _)| *pid == c.guest_pid);
                    let init = init.into_iter().map(|(_, exec_id)| (c.pid(), exec_id));
                    Ok(init.chain(others).collect())
                })
            })
            .await?
    }

    /// Resource use, as containerd's cgroup v2 metrics. The sandbox container's is the whole pod's.
    ///
    /// # Errors
    /// A container that does not run.
    pub async fn stats(&self) -> Result<Any> {
        self.owner
            .call(|c| {
                Box::pin(async move {
                    if matches!(c.init.phase, Phase::Stopped(_)) {
                        return Err(Error::not_found(format!("task {:?} has ended", c.id)));
                    }
                    let id = if c.in_guest { c.id.as_str() } else { "" };
                    c.pod.stats(id).await
                })
            })
            .await?
    }

    /// Size of the terminal in characters. Nothing changes where there is none, as with containerd's own
    /// shim; an exec that is not started yet gets it at its start.
    ///
    /// # Errors
    /// An exec that is not known.
    pub async fn resize(&self, exec_id: String, width: u32, height: u32) -> Result<()> {
        self.owner
            .call(move |c| {
                Box::pin(async move {
                    let process = c.process(&exec_id)?;
                    process.console = (width, height);
                    let waits = process.phase == Phase::Created && !exec_id.is_empty();
                    let ended = matches!(process.phase, Phase::Stopped(_));
                    if !process.uris.terminal || waits || ended || !c.in_guest {
                        return Ok(());
                    }
                    let request = agent::ResizePtyRequest {
                        container_id: c.id.clone(),
                        exec_id,
                        width,
                        height,
                        ..Default::default()
                    };
                    c.pod
                        .guest()?
                        .agent()
                        .resize_pty(Guest::soon(), &request)
                        .await
                        .map_err(Error::from)?;
                    Ok(())
                })
            })
            .await?
    }

    /// The client has no more input.
    ///
    /// # Errors
    /// An exec that is not known.
    pub async fn close_stdin(&self, exec_id: String) -> Result<()> {
        self.owner
            .call(move |c| {
                Box::pin(async move {
                    if let Some(stdio) = &mut c.process(&exec_id)?.stdio {
                        stdio.close_stdin();
                    }
                    Ok(())
                })
            })
            .await?
    }
}

/// `metrics` (encoded) as what containerd's `Stats` returns.
#[must_use]
pub(crate) fn metrics_any(metrics: Vec<u8>) -> Any {
    Any {
        type_url: METRICS_TYPE.into(),
        value: metrics,
        ..Default::default()
    }
}
