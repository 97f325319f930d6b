//! Standard streams of processes: pipes and terminals on one side, stream connections of the shim on
//! the other, and who waits for whom. What a process is, is not known here.

mod connection;
mod input;
mod output;
mod streams;

pub use connection::{Connection, Processes, accept};
pub use streams::{Declared, ParentStdio, Streams, pipes};

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Our end of a pipe, or the master of a terminal; shared by what reads, writes and resizes it.
pub type End = Arc<AsyncFd<OwnedFd>>;

/// Bytes moved at a time.
const CHUNK: usize = 16 << 10;

/// Registers a descriptor with the runtime.
///
/// # Errors
/// When it cannot be made non-blocking or polled.
pub fn end(fd: OwnedFd) -> std::io::Result<End> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    sys::register(fd, Interest::READABLE | Interest::WRITABLE).map(Arc::new)
}
