//! One process of a container as the client sees it: its streams, where it is in its life, its exit.
//!
//! ```text
//!            start                exit told
//! Added ───────────▶ Running ───────────────▶ Stopped      (exec)
//! Created ─────────▶ Running ───────────────▶ Stopped      (init; Created ▶ Stopped when killed)
//! ```

use sealpod_protocol::streams::{Header, Stdio as Kind};
use tokio::sync::watch;

use crate::{
    error::Result,
    guest::{Guest, GuestError},
    io::{GuestEnds, HostEnds, Stdio, Uris},
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Exit status, 128 + signal where a signal ended it.
    pub status: u32,
    /// When, ns since the Unix epoch.
    pub at_ns: i64,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Known, not in the guest yet (exec) or not released there yet (init).
    Created,
    /// Runs.
    Running,
    /// Has ended.
    Stopped(Exit),
}

/// See the file's head.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) uris: Uris,
    pub(super) phase: Phase,
    pub(super) stdio: Option<Stdio>,
    /// OCI process, until an exec is started.
    pub(super) spec: Vec<u8>,
    /// Width and height of its terminal, as far as a client has said.
    pub(super) console: (u32, u32),
    exit: watch::Sender<Option<Exit>>,
}

impl Process {
    pub(super) fn new(uris: Uris, spec: Vec<u8>) -> Self {
        Self {
            uris,
            phase: Phase::Created,
            stdio: None,
            spec,
            console: (0, 0),
            exit: watch::Sender::new(None),
        }
    }

    /// What waits for the exit.
    pub(super) fn exited(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// Marks the process as ended. Whether it was the first time.
    pub(super) fn stop(&mut self, exit: Exit) -> bool {
        if matches!(self.phase, Phase::Stopped(_)) {
            return false;
        }
        self.phase = Phase::Stopped(exit);
        self.exit.send_replace(Some(exit));
        true
    }
}

/// Connects the streams that `host` has to the process in the guest and starts copying.
pub(super) async fn attach(
    guest: &Guest,
    container_id: &str,
    exec_id: &str,
    host: HostEnds,
) -> Result<Stdio> {
    let open = async |wanted: bool, stream: Kind| {
        if !wanted {
            return Ok(None);
        }
        let header = Header::Stdio {
            stream,
            container_id: container_id.into(),
            exec_id: exec_id.into(),
        };
        guest.stream(&header).await.map(Some)
    };
    let (stdin, stdout, stderr) = host.wanted();
    let (stdin, stdout, stderr) = tokio::join!(
        open(stdin, Kind::Stdin),
        open(stdout, Kind::Stdout),
        open(stderr, Kind::Stderr)
    );
    // A process that has ended already takes no input; what it wrote is still there to be read.
    let stdin = match stdin {
        Err(GuestError::Stream { .. }) => None,
        other => other?,
    };
    let ends = GuestEnds {
        stdin,
        stdout: stdout?,
        stderr: stderr?,
    };
    Ok(Stdio::start(host, ends))
}
