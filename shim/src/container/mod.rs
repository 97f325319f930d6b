//! One container: the states of its init and exec processes, and the events they cause. One task owns
//! it; [`Handle`] sends it requests. What it needs of the VM it asks of the pod.
//!
//! A pod's sandbox ("pause") container has no process in the guest: its start and its exit are only
//! told, and it ends when it is killed or when the VM does.

mod create;
mod exits;
mod lifecycle;
mod process;
mod query;

use std::{collections::HashMap, path::PathBuf, sync::Arc};

use containerd_shim::event::Event;
use containerd_shim_protos::events::task as ev;

use crate::{
    error::{Error, Kind, Result},
    hooks::Hooks,
    io::Uris,
    owner::Owner,
    pod::{Pod, StandIn},
};
pub use create::{Request as CreateRequest, create};
use process::Process;
pub use process::{Exit, Phase};
pub(crate) use query::metrics_any;
pub use query::{Snapshot, Status};

/// See the module.
#[derive(Debug)]
pub struct Container {
    pod: Arc<Pod>,
    id: String,
    bundle: PathBuf,
    hooks: Hooks,
    init: Process,
    execs: HashMap<String, Process>,
    paused: bool,
    /// Is a pod by itself: with it ends the VM.
    alone: bool,
    stand_in: Option<StandIn>,
    /// Has a process in the guest.
    in_guest: bool,
    /// Pid of that process in the guest.
    guest_pid: u32,
    /// Serials of the disks that were attached for it.
    disks: Vec<String>,
    /// Names of the pod's volumes that it uses.
    volumes: Vec<String>,
}

/// Sends requests to a container.
#[derive(Debug, Clone)]
pub struct Handle {
    pid: u32,
    owner: Owner<Container>,
}

impl Container {
    /// The process `exec_id`, or init where it is empty.
    fn process(&mut self, exec_id: &str) -> Result<&mut Process> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        let id = &self.id;
        self.execs
            .get_mut(exec_id)
            .ok_or_else(|| Error::not_found(format!("exec {exec_id:?} of task {id:?} not found")))
    }

    /// The process and its state for a request that needs it to run.
    fn running(&mut self, exec_id: &str, verb: &str) -> Result<&mut Process> {
        let process = self.process(exec_id)?;
        match process.phase {
            Phase::Running => Ok(process),
            Phase::Created => Err(Error::precondition(format!(
                "cannot {verb} a process that is not started"
            ))),
            Phase::Stopped(_) => Err(Error::not_found("process already finished")),
        }
    }

    /// The task's pid on the host: its stand-in's. A pod, and a container that is one, has the pod's.
    fn pid(&self) -> u32 {
        self.stand_in
            .as_ref()
            .map_or_else(|| self.pod.pid(), StandIn::pid)
    }

    async fn publish(&self, event: impl Event) {
        self.pod.publisher().publish(event).await;
    }
}

impl Handle {
    /// The task's pid on the host.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Adds an exec; it runs from [`Handle::start`] on.
    ///
    /// # Errors
    /// An id that is taken or malformed, a stopped container.
    pub async fn exec(&self, exec_id: String, uris: Uris, spec: Vec<u8>) -> Result<()> {
        self.owner
            .call(move |c| {
                Box::pin(async move {
                    let event = c.add_exec(exec_id, uris, spec)?;
                    c.publish(event).await;
                    Ok(())
                })
            })
            .await?
    }
}

impl Container {
    fn add_exec(
        &mut self,
        exec_id: String,
        uris: Uris,
        spec: Vec<u8>,
    ) -> Result<ev::TaskExecAdded> {
        if !sealpod_protocol::valid_id(&exec_id) {
            return Err(Error::invalid(format!(
                "exec id {exec_id:?} is not allowed: 1 to {} of A-Z a-z 0-9 _ . -",
                sealpod_protocol::ID_MAX
            )));
        }
        if self.execs.contains_key(&exec_id) {
            return Err(Error::new(
                Kind::AlreadyExists,
                format!("exec {exec_id:?} already exists"),
            ));
        }
        if !self.in_guest {
            return Err(Error::precondition(
                "the sandbox container has no process to exec into",
            ));
        }
        match self.init.phase {
            Phase::Running if self.paused => {
                return Err(Error::precondition("cannot exec in a paused container"));
            }
            Phase::Running => {}
            // As runc: an exec may be added to a created container, and fails when it is started.
            Phase::Created => {}
            Phase::Stopped(_) => {
                return Err(Error::precondition("cannot exec in a stopped container"));
            }
        }
        self.execs.insert(exec_id.clone(), Process::new(uris, spec));
        Ok(ev::TaskExecAdded {
            container_id: self.id.clone(),
            exec_id,
            ..Default::default()
        })
    }
}
