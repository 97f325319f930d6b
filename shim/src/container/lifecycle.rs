//! Start, signals, pause, resume, update, delete.

use containerd_shim_protos::events::task as ev;
use sealpod_protocol::agent;

use super::{Container, Exit, Handle, Phase, process};
use crate::{
    clock,
    error::{Error, Kind, Result},
    guest::{self, Guest},
    hooks::Point,
    io,
};

const SIGKILL: u32 = 9;
const SIGTERM: u32 = 15;

impl Handle {
    /// Starts init, or the exec `exec_id`. Returns the task's pid.
    ///
    /// # Errors
    /// A second start; what the guest says of a program that cannot run.
    pub async fn start(&self, exec_id: String) -> Result<u32> {
        let handle = self.clone();
        self.owner
            .call(|c| {
                Box::pin(async move {
                    if exec_id.is_empty() {
                        c.start_init().await
                    } else {
                        c.start_exec(exec_id, handle).await
                    }
                })
            })
            .await?
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// Not found where the process has ended.
    pub async fn kill(&self, exec_id: String, signal: u32, all: bool) -> Result<()> {
        self.owner
            .call(move |c| Box::pin(async move { c.kill(&exec_id, signal, all).await }))
            .await?
    }

    /// Freezes or thaws all processes.
    ///
    /// # Errors
    /// A container that does not run.
    pub async fn set_paused(&self, paused: bool) -> Result<()> {
        self.owner
            .call(move |c| Box::pin(async move { c.set_paused(paused).await }))
            .await?
    }

    /// Changes the limits of the container inside its VM.
    ///
    /// # Errors
    /// What the guest refuses.
    pub async fn update(&self, resources: Vec<u8>) -> Result<()> {
        self.owner
            .call(move |c| Box::pin(async move { c.update(resources).await }))
            .await?
    }

    /// Forgets an exec, or removes the container. Returns how it had ended and the task's pid.
    ///
    /// # Errors
    /// A process that runs.
    pub async fn delete(&self, exec_id: String) -> Result<(Exit, u32)> {
        self.owner
            .call(move |c| {
                Box::pin(async move {
                    if exec_id.is_empty() {
                        c.delete().await
                    } else {
                        c.delete_exec(&exec_id).await
                    }
                })
            })
            .await?
    }
}

impl Container {
    async fn start_init(&mut self) -> Result<u32> {
        match self.init.phase {
            Phase::Created => {}
            Phase::Running => return Err(Error::precondition("cannot start a running process")),
            Phase::Stopped(_) => return Err(Error::precondition("cannot start a stopped process")),
        }
        self.pod.connect_network().await?;
        if self.in_guest {
            let guest = self.pod.guest()?;
            guest
                .agent()
                .start_container(Guest::soon(), &Guest::container(&self.id))
                .await
                .map_err(Error::from)?;
            self.pod.mark_started(self.init.stdio.as_ref());
        }
        self.init.phase = Phase::Running;
        let event = ev::TaskStart {
            container_id: self.id.clone(),
            pid: self.pid(),
            ..Default::default()
        };
        self.publish(event).await;
        // Create hooks may refuse; after the start nothing can.
        let _ = self.hooks.run(Point::Poststart, self.pod.pid()).await;
        Ok(self.pid())
    }

    async fn start_exec(&mut self, exec_id: String, handle: Handle) -> Result<u32> {
        let pid = self.pid();
        let id = self.id.clone();
        let init = self.init.phase;
        let namespace = self.pod.namespace().to_owned();
        let guest = self.pod.guest()?;
        let process = self.process(&exec_id)?;
        match process.phase {
            Phase::Created => {}
            Phase::Running => return Err(Error::precondition("cannot start a running process")),
            Phase::Stopped(_) => return Err(Error::precondition("cannot start a stopped process")),
        }
        if init != Phase::Running {
            return Err(Error::precondition(
                "cannot exec in a container that does not run",
            ));
        }
        let started = async {
            let host = io::open(&process.uris, &namespace, &id).await;
            let host = host.map_err(|e| Error::chain(Kind::InvalidArgument, &e))?;
            let (stdin, stdout, stderr) = host.wanted();
            let (console_width, console_height) = process.console;
            let request = agent::ExecRequest {
                container_id: id.clone(),
                exec_id: exec_id.clone(),
                process: std::mem::take(&mut process.spec),
                terminal: process.uris.terminal,
                stdin,
                stdout,
                stderr,
                console_width,
                console_height,
                ..Default::default()
            };
            guest::fits("The process to execute", &request)?;
            guest
                .agent()
                .exec(Guest::while_building(), &request)
                .await
                .map_err(exec_failed)?;
            process::attach(&guest, &id, &exec_id, host).await
        };
        let stdio = match started.await {
            Ok(stdio) => stdio,
            Err(e) => {
                // As containerd's own shim: the exec can be deleted, and had the status of a shell that
                // found no program.
                let exit = Exit {
                    status: 127,
                    at_ns: clock::unix_ns(),
                };
                process.stop(exit);
                return Err(e);
            }
        };
        let drain = stdio.drain();
        process.stdio = Some(stdio);
        process.phase = Phase::Running;
        let event = ev::TaskExecStarted {
            container_id: id.clone(),
            exec_id: exec_id.clone(),
            pid,
            ..Default::default()
        };
        self.publish(event).await;
        handle.watch(guest, id, exec_id, drain);
        Ok(pid)
    }

    async fn kill(&mut self, exec_id: &str, signal: u32, all: bool) -> Result<()> {
        if !(1..=64).contains(&signal) {
            return Err(Error::invalid(format!(
                "signal {signal} is not allowed: 1 to 64"
            )));
        }
        let init_created = exec_id.is_empty() && self.init.phase == Phase::Created;
        if !init_created {
            self.running(exec_id, "kill")?;
        }
        if !self.in_guest {
            return self.kill_sandbox(signal).await;
        }
        let request = agent::SignalRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            signal,
            all,
            ..Default::default()
        };
        let sent = match self.pod.guest() {
            Ok(guest) => guest
                .agent()
                .signal(Guest::soon(), &request)
                .await
                .map_err(Error::from),
            Err(e) => Err(e),
        };
        match sent {
            // A guest that does not even kill has nothing left to lose.
            Err(e) if e.kind == Kind::Unavailable && signal == SIGKILL => {
                tracing::error!(
                    id = self.id,
                    "Guest does not answer a kill, ending its VM: {e}"
                );
                self.pod.stop_vm().await;
                Ok(())
            }
            other => other.map(|_| ()),
        }
    }

    /// A pause process ends at these two and ignores the others.
    async fn kill_sandbox(&mut self, signal: u32) -> Result<()> {
        let status = match signal {
            SIGKILL => 128 + SIGKILL,
            SIGTERM | 2 => 0,
            _ => return Ok(()),
        };
        let exit = Exit {
            status,
            at_ns: clock::unix_ns(),
        };
        self.exited("", exit).await;
        Ok(())
    }

    async fn set_paused(&mut self, paused: bool) -> Result<()> {
        let verb = if paused { "pause" } else { "resume" };
        if self.init.phase != Phase::Running || self.paused == paused {
            return Err(Error::precondition(format!(
                "cannot {verb} task {:?}: it is {}",
                self.id,
                self.status_name()
            )));
        }
        if self.in_guest {
            let guest = self.pod.guest()?;
            let request = Guest::container(&self.id);
            let done = if paused {
                guest.agent().pause(Guest::soon(), &request).await
            } else {
                guest.agent().resume(Guest::soon(), &request).await
            };
            done.map_err(Error::from)?;
        }
        self.paused = paused;
        let container_id = self.id.clone();
        if paused {
            let mut event = ev::TaskPaused::new();
            event.container_id = container_id;
            self.publish(event).await;
        } else {
            let mut event = ev::TaskResumed::new();
            event.container_id = container_id;
            self.publish(event).await;
        }
        Ok(())
    }

    async fn update(&mut self, resources: Vec<u8>) -> Result<()> {
        if matches!(self.init.phase, Phase::Stopped(_)) {
            return Err(Error::precondition("cannot update a stopped container"));
        }
        if !self.in_guest {
            return Ok(());
        }
        let request = agent::UpdateRequest {
            container_id: self.id.clone(),
            resources,
            ..Default::default()
        };
        guest::fits("The update", &request)?;
        self.pod
            .guest()?
            .agent()
            .update(Guest::soon(), &request)
            .await
            .map_err(Error::from)?;
        Ok(())
    }

    async fn delete_exec(&mut self, exec_id: &str) -> Result<(Exit, u32)> {
        let exit = match self.process(exec_id)?.phase {
            Phase::Stopped(exit) => exit,
            Phase::Created => Exit {
                status: 0,
                at_ns: clock::unix_ns(),
            },
            Phase::Running => return Err(Error::precondition("cannot delete a running process")),
        };
        if let Ok(guest) = self.pod.guest() {
            let request = Guest::process(&self.id, exec_id);
            // The guest forgets it with the container at the latest.
            if let Err(e) = guest.agent().delete_process(Guest::soon(), &request).await {
                tracing::debug!(exec_id, "Guest did not forget an exec: {e}");
            }
        }
        self.execs.remove(exec_id);
        Ok((exit, self.pid()))
    }

    async fn delete(&mut self) -> Result<(Exit, u32)> {
        let exit = match self.init.phase {
            Phase::Stopped(exit) => exit,
            Phase::Created => Exit {
                status: 0,
                at_ns: clock::unix_ns(),
            },
            Phase::Running => return Err(Error::precondition("cannot delete a running process")),
        };
        self.execs.clear();
        self.init.stdio = None;
        if self.in_guest {
            self.pod
                .remove_container(&self.id, &self.disks, &self.volumes)
                .await;
        }
        let pid = self.pid();
        self.pod.forget(&self.id);
        // Poststop hooks are logged, not refused.
        let _ = self.hooks.run(Point::Poststop, self.pod.pid()).await;
        let event = ev::TaskDelete {
            container_id: self.id.clone(),
            pid,
            exit_status: exit.status,
            exited_at: Some(clock::timestamp(exit.at_ns)).into(),
            ..Default::default()
        };
        self.publish(event).await;
        Ok((exit, pid))
    }
}

/// The words that clients look for in a failed exec.
fn exec_failed(e: ttrpc::Error) -> Error {
    let e = Error::from(e);
    if e.kind == Kind::Unavailable {
        return e;
    }
    let text = format!("OCI runtime exec failed: exec failed: {}", e.message);
    Error::new(Kind::Unknown, text)
}
