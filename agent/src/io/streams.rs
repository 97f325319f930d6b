//! The streams of one process, from its making to its forgetting.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sealpod_protocol::streams::Stdio;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use super::output::would_block;
use super::{Connection, End, input, output};
use crate::launch::ChildStdio;
use crate::reaper::ExitWatch;

/// Streams that the shim has announced it will attach.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Declared {
    /// Input.
    pub stdin: bool,
    /// Output.
    pub stdout: bool,
    /// Errors; not with a terminal.
    pub stderr: bool,
}

/// Why a stream cannot be attached.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AttachError {
    /// The process was made without it.
    #[error("the process has no such stream")]
    Undeclared,
    /// It has a connection, had one, or will have none any more.
    #[error("the stream is attached already, or has ended")]
    Taken,
}

/// The agent's ends of a process's pipes.
#[derive(Debug, Default)]
pub struct ParentStdio {
    stdin: Option<End>,
    stdout: Option<End>,
    stderr: Option<End>,
}

impl ParentStdio {
    /// All on one terminal, by its master.
    #[must_use]
    pub fn terminal(master: &End, declared: Declared) -> Self {
        Self {
            stdin: declared.stdin.then(|| master.clone()),
            // Read even if nobody wants it: else a program that writes to its terminal would stop.
            stdout: Some(master.clone()),
            stderr: None,
        }
    }
}

/// Pipes for the declared streams.
///
/// # Errors
/// When there are no descriptors left.
pub fn pipes(declared: Declared) -> io::Result<(ParentStdio, ChildStdio)> {
    let mut parent = ParentStdio::default();
    let mut child = ChildStdio::default();
    if declared.stdin {
        let (reader, writer) = io::pipe()?;
        parent.stdin = Some(super::end(writer.into())?);
        child.stdin = Some(OwnedFd::from(reader));
    }
    for (wanted, ours, theirs) in [
        (declared.stdout, &mut parent.stdout, &mut child.stdout),
        (declared.stderr, &mut parent.stderr, &mut child.stderr),
    ] {
        if wanted {
            let (reader, writer) = io::pipe()?;
            *ours = Some(super::end(reader.into())?);
            *theirs = Some(OwnedFd::from(writer));
        }
    }
    Ok((parent, child))
}

/// Where a stream's connection is handed over.
type Slot = Mutex<Option<oneshot::Sender<Connection>>>;

/// The streams of a process. Dropping it closes them.
pub struct Streams {
    stdin: Option<(Slot, watch::Sender<bool>)>,
    stdout: Option<(Slot, watch::Receiver<Option<u64>>)>,
    stderr: Option<(Slot, watch::Receiver<Option<u64>>)>,
    tasks: Vec<AbortHandle>,
}

impl Streams {
    /// Starts moving bytes. With a terminal whose output nobody has declared, it is read and thrown
    /// away.
    #[must_use]
    pub fn start(ends: ParentStdio, declared: Declared, exit: &ExitWatch) -> Self {
        let mut tasks = Vec::new();
        let stdin = ends.stdin.map(|end| {
            let (attach, attached) = oneshot::channel();
            let (close, closing) = watch::channel(false);
            let task = tokio::spawn(input::feed(end, attached, closing, exit.clone()));
            tasks.push(task.abort_handle());
            (Mutex::new(Some(attach)), close)
        });
        let mut out = |end: Option<End>, declared: bool| {
            end.map(|end| {
                let (attach, attached) = oneshot::channel();
                let (tell, drained) = watch::channel(None);
                let task = tokio::spawn(output::forward(end, attached, exit.clone(), tell));
                tasks.push(task.abort_handle());
                // A sender that is dropped stands for "nobody will come".
                (Mutex::new(declared.then_some(attach)), drained)
            })
        };
        let stdout = out(ends.stdout, declared.stdout);
        let stderr = out(ends.stderr, declared.stderr);
        Self {
            stdin,
            stdout,
            stderr,
            tasks,
        }
    }

    /// Gives a stream its connection.
    ///
    /// # Errors
    /// [`AttachError`]; the connection is dropped.
    pub fn attach(&self, stream: Stdio, connection: Connection) -> Result<(), AttachError> {
        let slot = match stream {
            Stdio::Stdin => self.stdin.as_ref().map(|(slot, _)| slot),
            Stdio::Stdout => self.stdout.as_ref().map(|(slot, _)| slot),
            Stdio::Stderr => self.stderr.as_ref().map(|(slot, _)| slot),
        };
        let slot = slot.ok_or(AttachError::Undeclared)?;
        let attach = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
        attach
            .and_then(|attach| attach.send(connection).ok())
            .ok_or(AttachError::Taken)
    }

    /// Whether [`Streams::attach`] could succeed now; for an answer before the connection is given.
    ///
    /// # Errors
    /// As [`Streams::attach`].
    pub fn check(&self, stream: Stdio) -> Result<(), AttachError> {
        let slot = match stream {
            Stdio::Stdin => self.stdin.as_ref().map(|(slot, _)| slot),
            Stdio::Stdout => self.stdout.as_ref().map(|(slot, _)| slot),
            Stdio::Stderr => self.stderr.as_ref().map(|(slot, _)| slot),
        };
        let slot = slot.ok_or(AttachError::Undeclared)?;
        let slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let free = slot.as_ref().is_some_and(|attach| !attach.is_closed());
        free.then_some(()).ok_or(AttachError::Taken)
    }

    /// Asks for the end of the input, once what was sent is delivered. Idempotent.
    pub fn close_stdin(&self) {
        if let Some((_, close)) = &self.stdin {
            close.send_replace(true);
        }
    }

    /// Watches that tell how many bytes of output were sent up to the process's end.
    #[must_use]
    pub fn drained(&self) -> [Option<watch::Receiver<Option<u64>>>; 2] {
        [&self.stdout, &self.stderr].map(|out| out.as_ref().map(|(_, drained)| drained.clone()))
    }
}

impl std::fmt::Debug for Streams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Streams").finish_non_exhaustive()
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.tasks.iter().for_each(AbortHandle::abort);
    }
}

/// Whether there is something to read, an end or an error; else "would block".
pub(super) fn poll_in(fd: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut polled = [PollFd::new(fd.get_ref().as_fd(), PollFlags::POLLIN)];
    match poll(&mut polled, PollTimeout::ZERO) {
        Ok(0) => Err(would_block()),
        _ => Ok(()),
    }
}
