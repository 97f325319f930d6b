//! A process's standard streams on the host: what the client named (fifo, file, logging program) on one
//! side, the guest's stream connections on the other. Copies bytes; knows no task states.
//!
//! ```text
//! fifo ──▶ copy_in  ──▶ stream "stdin"   half-close at the client's CloseIO
//! fifo ◀── copy_out ◀── stream "stdout"  counts what it has delivered, so that an exit can wait for it
//! ```
//! Nothing is read from the guest that the client has not taken: the stream's flow control reaches the
//! process in the guest.

mod binary;
mod copy;
mod host;

use tokio::net::UnixStream;

use copy::Output;
pub use host::{HostEnds, open};

/// Where a client wants a process's streams: `CreateTaskRequest`, `ExecProcessRequest`. Empty means none.
#[expect(missing_docs, reason = "containerd's field names")]
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uris {
    pub stdin: String,
    pub stdout: String,
    pub stderr: String,
    pub terminal: bool,
}

impl Uris {
    /// Whether the process has a standard error stream of its own (a terminal has not).
    #[must_use]
    pub fn wants_stderr(&self) -> bool {
        !self.terminal && !self.stderr.is_empty()
    }
}

/// A client's stream that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a path, `file://` or `binary://`.
    #[error(
        "Stream {uri:?} cannot be used: allowed are a path, file:///path and binary:///path?key=value"
    )]
    Scheme {
        /// What was asked for.
        uri: String,
    },
    /// Could not be opened.
    #[error("Stream {uri:?} could not be opened")]
    Open {
        /// What was asked for.
        uri: String,
        /// Why.
        source: std::io::Error,
    },
    /// The logging program did not start.
    #[error("Logging program {path:?} did not start")]
    Logger {
        /// Program.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Connections to the guest, one for each stream that the client named.
#[derive(Debug, Default)]
pub struct GuestEnds {
    /// To the process.
    pub stdin: Option<UnixStream>,
    /// From the process or its terminal.
    pub stdout: Option<UnixStream>,
    /// From the process.
    pub stderr: Option<UnixStream>,
}

/// The running copies of one process.
#[derive(Debug)]
pub struct Stdio {
    stdin: Option<copy::Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    // Keeps a logging program's pipes; dropped with the streams.
    _logger: Option<binary::Logger>,
}

impl Stdio {
    /// Starts copying.
    #[must_use]
    pub fn start(host: HostEnds, guest: GuestEnds) -> Self {
        Self {
            stdin: host
                .stdin
                .zip(guest.stdin)
                .map(|(h, g)| copy::Input::start(h, g)),
            stdout: host
                .stdout
                .zip(guest.stdout)
                .map(|(h, g)| Output::start(h, g)),
            stderr: host
                .stderr
                .zip(guest.stderr)
                .map(|(h, g)| Output::start(h, g)),
            _logger: host.logger,
        }
    }

    /// The client has no more input: what is in the fifo is still sent, then the process sees the end.
    /// Idempotent.
    pub fn close_stdin(&mut self) {
        if let Some(input) = &mut self.stdin {
            input.close();
        }
    }

    /// Completes when the first output was delivered; never where the process has none.
    pub fn first_output(&self) -> impl Future<Output = ()> + Send + 'static {
        let rx = self.stdout.as_ref().map(Output::progress);
        async move {
            match rx {
                Some(rx) => copy::delivered_some(rx).await,
                None => std::future::pending().await,
            }
        }
    }

    /// What has to be waited for before the exit of the process is told.
    #[must_use]
    pub fn drain(&self) -> Drain {
        Drain {
            stdout: self.stdout.as_ref().map(Output::progress),
            stderr: self.stderr.as_ref().map(Output::progress),
        }
    }
}

/// See [`Stdio::drain`].
#[derive(Debug, Default)]
pub struct Drain {
    stdout: Option<copy::ProgressRx>,
    stderr: Option<copy::ProgressRx>,
}

impl Drain {
    /// Returns when the client's ends have been given as many bytes as the agent counted, or when a
    /// client has taken nothing for [`copy::STALLED`].
    pub async fn wait(self, stdout_bytes: u64, stderr_bytes: u64) {
        let one = async |rx: Option<copy::ProgressRx>, bytes| {
            if let Some(rx) = rx {
                copy::delivered(rx, bytes).await;
            }
        };
        tokio::join!(
            one(self.stdout, stdout_bytes),
            one(self.stderr, stderr_bytes)
        );
    }
}
