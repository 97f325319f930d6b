//! A process that the shim has asked for: its exit, its streams, its terminal.

use nix::errno::Errno;
use std::os::fd::AsFd;

use tokio::sync::watch;

use super::ContainerError;
use crate::io::{Declared, End, Streams};
use crate::launch::{ChildStdio, Launched, Report};
use crate::reaper::{Exit, ExitWatch, Reaper};
use crate::{io, sys};

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Pid in the guest.
    pub pid: i32,
    exit: ExitWatch,
    streams: Streams,
    terminal: Option<End>,
}

/// What a wait for a process tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// How and when.
    pub exit: Exit,
    /// Bytes of output that were sent up to then.
    pub stdout_bytes: u64,
    /// See above.
    pub stderr_bytes: u64,
}

/// A process whose set-up is under way.
pub(super) struct Making {
    launched: Launched,
    exit: ExitWatch,
    ends: io::ParentStdio,
    declared: Declared,
    terminal: Option<End>,
    seccomp: Option<std::os::fd::OwnedFd>,
}

impl Making {
    /// Forks by `fork`, which is given the child's ends of the streams.
    pub(super) fn start<E>(
        reaper: &Reaper,
        declared: Declared,
        terminal: bool,
        fork: impl FnOnce(&ChildStdio) -> Result<Launched, E>,
    ) -> Result<Self, ContainerError>
    where
        ContainerError: From<E>,
    {
        let piped = if terminal {
            Declared::default()
        } else {
            declared
        };
        let (ends, theirs) = io::pipes(piped).map_err(ContainerError::Streams)?;
        let launched = fork(&theirs)?;
        let exit = reaper.watch(launched.pid);
        Ok(Self {
            launched,
            exit,
            ends,
            declared,
            terminal: None,
            seccomp: None,
        })
    }

    /// Follows the reports up to `Ready` (with `until_ready`) or to execve.
    pub(super) async fn follow(&mut self, until_ready: bool) -> Result<(), ContainerError> {
        loop {
            match self.launched.channel.next().await {
                Report::Terminal(master) => {
                    self.terminal = Some(io::end(master).map_err(ContainerError::Streams)?);
                }
                Report::Seccomp(program) => self.seccomp = Some(program),
                Report::Ready if until_ready => return Ok(()),
                Report::Closed if !until_ready => return Ok(()),
                Report::Ready => {}
                Report::Failed(text) => return Err(self.failed(text).await),
                Report::Closed => return Err(self.failed(String::new()).await),
            }
        }
    }

    /// The error of a process that did not come to be, once it is gone.
    async fn failed(&mut self, text: String) -> ContainerError {
        let exit = self.exit.wait_for(Option::is_some).await.map(|exit| *exit);
        if !text.is_empty() {
            return ContainerError::Launch(text);
        }
        let status = exit.ok().flatten().map_or(0, |exit| exit.status);
        ContainerError::Launch(format!("it ended during its set-up with status {status}"))
    }

    /// The process, and what came with it: launch handles and the seccomp program.
    pub(super) fn finish(self) -> (Process, Launched, Option<std::os::fd::OwnedFd>) {
        let ends = match &self.terminal {
            Some(master) => io::ParentStdio::terminal(master, self.declared),
            None => self.ends,
        };
        let process = Process {
            pid: self.launched.pid,
            streams: Streams::start(ends, self.declared, &self.exit),
            exit: self.exit,
            terminal: self.terminal,
        };
        (process, self.launched, self.seccomp)
    }
}

impl Process {
    /// How it ended, if it has.
    #[must_use]
    pub fn exited(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Its streams.
    #[must_use]
    pub fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Waits for its end alone.
    pub async fn exit(&self) -> Option<Exit> {
        let mut exit = self.exit.clone();
        exit.wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|exit| *exit)
    }

    /// Waits for its end and for its output to have been sent.
    ///
    /// # Errors
    /// [`ContainerError::Gone`] when it was forgotten meanwhile.
    pub async fn wait(&self) -> Result<Ended, ContainerError> {
        let exit = self.exit().await.ok_or(ContainerError::Gone)?;
        let [stdout, stderr] = self.streams.drained();
        Ok(Ended {
            exit,
            stdout_bytes: count(stdout).await,
            stderr_bytes: count(stderr).await,
        })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// [`ContainerError::Finished`] when it has ended.
    pub fn signal(&self, signal: i32) -> Result<(), ContainerError> {
        // An entry that is not reaped yet still owns its pid, so this cannot hit a stranger.
        if self.exited().is_some() {
            return Err(ContainerError::Finished);
        }
        match sys::kill(self.pid, signal) {
            Err(Errno::ESRCH) => Err(ContainerError::Finished),
            Err(errno) => Err(ContainerError::Signal { signal, errno }),
            Ok(()) => Ok(()),
        }
    }

    /// Changes the size of its terminal.
    ///
    /// # Errors
    /// [`ContainerError::State`] when it has none.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<(), ContainerError> {
        let Some(terminal) = &self.terminal else {
            return Err(ContainerError::State("the process has no terminal".into()));
        };
        sys::set_window_size(terminal.get_ref().as_fd(), columns, rows)
            .map_err(|e| ContainerError::State(format!("resize the terminal: {e}")))
    }
}

async fn count(drained: Option<watch::Receiver<Option<u64>>>) -> u64 {
    let Some(mut drained) = drained else { return 0 };
    // An error: the stream was closed from here, so nothing more will be sent.
    let told = drained.wait_for(Option::is_some).await.map(|n| *n);
    told.ok().flatten().unwrap_or_default()
}
