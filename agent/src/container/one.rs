//! One container: its processes, and what may be done in which of its states (drawn in the parent
//! module).

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;
use sealpod_protocol::agent::ExecRequest;

use super::process::{Making, Process};
use super::{COUNT_MAX, ContainerError, SETTLE, console_size, lock, spec, streams};
use crate::cgroup::oom::OomWatch;
use crate::cgroup::{self, Cgroup};
use crate::launch::{self, AgentChannel, JoinTarget, LaunchError};
use crate::reaper::Reaper;

/// Why an exec is refused once its container's init has ended.
const STOPPED: &str = "cannot exec in a stopped container";

/// A container.
#[derive(Debug)]
pub struct Container {
    pub(super) cgroup: Cgroup,
    pub(super) init: Arc<Process>,
    pub(super) init_handle: OwnedFd,
    pub(super) seccomp: Option<OwnedFd>,
    pub(super) user_namespace: bool,
    /// Serials of the disks that were attached for it.
    pub(super) disks: Vec<String>,
    pub(super) has_admitted_devices: bool,
    pub(super) oom: OomWatch,
    pub(super) state: Mutex<State>,
}

/// What changes in its life.
#[derive(Debug)]
pub(super) struct State {
    pub(super) phase: Phase,
    /// `None`: being made.
    pub(super) execs: HashMap<String, Option<Arc<Process>>>,
}

/// Where it is between its making and its end.
#[derive(Debug)]
pub(super) enum Phase {
    Created(AgentChannel),
    Running,
    Paused,
}

impl Container {
    pub(super) fn process(&self, exec_id: &str) -> Result<Arc<Process>, ContainerError> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let found = lock(&self.state).execs.get(exec_id).cloned().flatten();
        found.ok_or_else(|| ContainerError::NotFound(format!("process {exec_id}")))
    }

    /// A pidfd of its init, for a container that joins it.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it has ended.
    pub(super) fn handle(&self) -> Result<OwnedFd, ContainerError> {
        if self.init.exited().is_some() {
            return Err(ContainerError::State(
                "cannot join the PID namespace of a container that has stopped".into(),
            ));
        }
        self.init_handle
            .try_clone()
            .map_err(ContainerError::Streams)
    }

    /// Lets its init execute its program.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it has been started or has ended; what the program's execution
    /// says.
    pub async fn start(&self) -> Result<(), ContainerError> {
        let channel = {
            let mut state = lock(&self.state);
            if self.init.exited().is_some() {
                return Err(ContainerError::State(
                    "cannot start a container that has stopped".into(),
                ));
            }
            match std::mem::replace(&mut state.phase, Phase::Running) {
                Phase::Created(channel) => channel,
                other => {
                    state.phase = other;
                    return Err(ContainerError::State(
                        "cannot start an already running container".into(),
                    ));
                }
            }
        };
        channel
            .go()
            .map_err(|e| ContainerError::Launch(format!("release the container's init: {e}")))?;
        match channel.next().await {
            launch::Report::Failed(text) => {
                self.init.exit().await;
                Err(ContainerError::Launch(text))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn reserve(&self, exec_id: &str) -> Result<(), ContainerError> {
        let mut state = lock(&self.state);
        if self.init.exited().is_some() {
            return Err(ContainerError::State(STOPPED.into()));
        }
        if matches!(state.phase, Phase::Paused) {
            return Err(ContainerError::State(
                "cannot exec in a paused container".into(),
            ));
        }
        if state.execs.contains_key(exec_id) {
            return Err(ContainerError::Exists(format!("process {exec_id}")));
        }
        if state.execs.len() >= COUNT_MAX {
            return Err(ContainerError::Argument("too many processes".into()));
        }
        state.execs.insert(exec_id.into(), None);
        Ok(())
    }

    pub(super) async fn run(
        &self,
        reaper: &Reaper,
        request: ExecRequest,
    ) -> Result<Process, ContainerError> {
        let size = console_size(request.console_width, request.console_height);
        let plan = spec::exec(&request.process, request.terminal.then_some(size))?;
        let declared = streams((
            request.terminal,
            request.stdin,
            request.stdout,
            request.stderr,
        ));
        let fork = |stdio: &launch::ChildStdio| {
            let target = JoinTarget {
                init: self.init_handle.as_fd(),
                user_namespace: self.user_namespace,
                seccomp: self.seccomp.as_ref().map(AsFd::as_fd),
                cgroup: self.cgroup.handle(),
            };
            match launch::spawn_exec(&plan, stdio, target) {
                Err(LaunchError::Step { errno, .. }) if cgroup::is_not_a_leaf(errno) => {
                    let beside = self.cgroup.handle_of(self.init.pid);
                    let beside = beside.map_err(|e| LaunchError::Step {
                        what: "find the cgroup of the container's init".into(),
                        errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::ESRCH)),
                    })?;
                    let target = JoinTarget {
                        cgroup: beside.as_fd(),
                        ..target
                    };
                    launch::spawn_exec(&plan, stdio, target)
                }
                other => other,
            }
        };
        let stopped = |error| match self.init.exited() {
            // It ended while it was being joined.
            Some(_) => ContainerError::State(STOPPED.into()),
            None => error,
        };
        let mut making = Making::start(reaper, declared, request.terminal, |stdio| {
            match fork(stdio) {
                // It has ended, and is about to be collected.
                Err(LaunchError::Step {
                    errno: Errno::ESRCH,
                    ..
                }) => Err(ContainerError::State(STOPPED.into())),
                other => Ok(other?),
            }
        })?;
        making.follow(false).await.map_err(stopped)?;
        Ok(making.finish().0)
    }

    /// Forgets a process that has ended. Idempotent.
    ///
    /// # Errors
    /// [`ContainerError::State`] while it runs.
    pub fn delete_process(&self, exec_id: &str) -> Result<(), ContainerError> {
        let mut state = lock(&self.state);
        match state.execs.get(exec_id) {
            None => Ok(()),
            Some(Some(process)) if process.exited().is_some() => {
                state.execs.remove(exec_id);
                Ok(())
            }
            Some(_) => Err(ContainerError::State(
                "cannot delete a running process".into(),
            )),
        }
    }

    /// Queues an OOM event that belongs before an exit that is about to be told.
    pub fn check_oom(&self) {
        self.oom.check();
    }

    /// Sends a signal to every process of the container.
    ///
    /// # Errors
    /// [`ContainerError::Finished`] when there is none.
    pub fn signal_all(&self, signal: i32) -> Result<(), ContainerError> {
        let pids = self.cgroup.pids()?;
        if pids.is_empty() {
            return Err(ContainerError::Finished);
        }
        if signal == libc::SIGKILL {
            return Ok(self.cgroup.kill()?);
        }
        for pid in pids {
            match crate::sys::kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(errno) => return Err(ContainerError::Signal { signal, errno }),
            }
        }
        Ok(())
    }

    /// Pids of the container, each with the exec that it is the process of, if it is one.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn pids(&self) -> Result<Vec<(i32, String)>, ContainerError> {
        let all = self.cgroup.pids()?;
        let state = lock(&self.state);
        let exec = |pid: i32| {
            let mut execs = state.execs.iter();
            let found = execs.find(|(_, p)| p.as_ref().is_some_and(|p| p.pid == pid));
            found.map_or_else(String::new, |(id, _)| id.clone())
        };
        Ok(all.into_iter().map(|pid| (pid, exec(pid))).collect())
    }

    /// Stops all its processes.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it does not run.
    pub async fn pause(&self) -> Result<(), ContainerError> {
        if self.init.exited().is_some() || !matches!(lock(&self.state).phase, Phase::Running) {
            return Err(ContainerError::State(
                "cannot pause a container that does not run".into(),
            ));
        }
        if let Err(error) = self.cgroup.freeze(true, SETTLE).await {
            let _ = self.cgroup.freeze(false, SETTLE).await;
            return Err(error.into());
        }
        lock(&self.state).phase = Phase::Paused;
        Ok(())
    }

    /// Whether it stands still.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        matches!(lock(&self.state).phase, Phase::Paused)
    }

    /// Lets its processes go on.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it is not paused.
    pub async fn resume(&self) -> Result<(), ContainerError> {
        if !matches!(lock(&self.state).phase, Phase::Paused) {
            return Err(ContainerError::State(
                "cannot resume a container that is not paused".into(),
            ));
        }
        self.cgroup.freeze(false, SETTLE).await?;
        lock(&self.state).phase = Phase::Running;
        Ok(())
    }

    /// Changes its limits.
    ///
    /// # Errors
    /// The first limit that is refused.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), ContainerError> {
        Ok(self.cgroup.update(resources)?)
    }

    /// Where its counters are.
    #[must_use]
    pub fn cgroup_path(&self) -> &Path {
        self.cgroup.path()
    }
}
