//! What the service works with: the guest's containers, pod and gate, and how a request's names lead to
//! them. Answers are the service's errors already.

use std::path::Path;
use std::sync::{Arc, MutexGuard, PoisonError};

use sealpod_protocol::agent::{AdmittedDevice, CreateContainerRequest};
use sealpod_protocol::streams::Stdio;
use sealpod_protocol::valid_id;
use tokio::sync::{Mutex, mpsc};
use ttrpc::{Code, Result};

use super::Service;
use crate::attest::{Attestor, device, device::Live};
use crate::container::{Container, Containers, Process};
use crate::io::{Connection, Processes};
use crate::log;
use crate::network::Network;
use crate::sandbox::Sandbox;
use crate::slot;
use crate::start::Timeline;
use crate::status::{attest_error, container_error, status};

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) containers: Containers,
    pub(super) sandbox: Sandbox,
    pub(super) attestor: Attestor,
    pub(super) network: Mutex<Network>,
    pub(super) events: Mutex<mpsc::Receiver<String>>,
    pub(super) timeline: std::sync::Mutex<Timeline>,
}

pub(super) fn check_id(what: &str, id: &str) -> Result<()> {
    if valid_id(id) {
        return Ok(());
    }
    Err(status(
        Code::INVALID_ARGUMENT,
        format_args!(
            "Invalid {what} id {:?}: 1 to 128 of A-Z a-z 0-9 _ . -",
            id.get(..64).unwrap_or(id)
        ),
    ))
}

pub(super) fn check_process(container: &str, exec: &str) -> Result<()> {
    check_id("container", container)?;
    if exec.is_empty() {
        return Ok(());
    }
    check_id("exec", exec)
}

impl Inner {
    pub(super) fn container(&self, id: &str) -> Result<Arc<Container>> {
        check_id("container", id)?;
        self.containers.get(id).map_err(container_error)
    }

    /// A process of a container, its init where `exec` is empty.
    pub(super) fn process(
        &self,
        container: &str,
        exec: &str,
    ) -> Result<(Arc<Container>, Arc<Process>)> {
        check_process(container, exec)?;
        let found = self.containers.process(container, exec);
        found.map_err(container_error)
    }

    pub(super) fn timeline(&self) -> MutexGuard<'_, Timeline> {
        let locked = self.timeline.lock();
        locked.unwrap_or_else(PoisonError::into_inner)
    }

    /// The devices that a container asks for, if all of them are admitted.
    pub(super) fn admitted(&self, request: &CreateContainerRequest) -> Result<Vec<(String, Live)>> {
        let one = |asked: &AdmittedDevice| match self.attestor.admitted(&asked.id) {
            Some(live) => Ok((asked.path.clone(), live)),
            None => Err(status(
                Code::PERMISSION_DENIED,
                format_args!("Guest gate: device {:?} is not admitted", asked.id),
            )),
        };
        request.admitted_devices.iter().map(one).collect()
    }

    /// Closes the guest gate for devices, for all that are admitted where none is named: no container can
    /// open them any more, those that have one stand still, and the devices leave the guest, also those
    /// that nobody has admitted yet.
    pub(super) async fn revoke(&self, ids: &[String]) -> Result<()> {
        let closed = self.attestor.close(ids);
        if ids.is_empty() || !closed.as_ref().is_ok_and(Vec::is_empty) {
            self.containers.freeze(true).await;
        }
        let mut devices = closed.map_err(attest_error)?;
        let here = ids
            .iter()
            .filter_map(|id| device::find(Path::new("/sys"), id));
        devices.extend(here);
        devices.dedup_by(|a, b| a.id == b.id);
        for device in devices {
            if let Err(e) = device.remove(Path::new(slot::SLOTS)).await {
                log!("device {} stays: {e}", device.id);
            }
        }
        Ok(())
    }
}

impl Processes for Service {
    fn check(&self, container: &str, exec: &str, stream: Stdio) -> std::result::Result<(), String> {
        let found = self.0.containers.process(container, exec);
        let (_, process) = found.map_err(|e| e.to_string())?;
        process.streams().check(stream).map_err(|e| e.to_string())
    }

    fn attach(
        &self,
        container: &str,
        exec: &str,
        stream: Stdio,
        connection: Connection,
    ) -> std::result::Result<(), String> {
        let found = self.0.containers.process(container, exec);
        let (_, process) = found.map_err(|e| e.to_string())?;
        process
            .streams()
            .attach(stream, connection)
            .map_err(|e| e.to_string())
    }
}
