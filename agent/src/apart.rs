//! Work in a process of its own: what blocks for longer than the agent's one thread may, and what is not
//! trusted not to panic. A panic of the agent ends the guest; one here is an error. The process has a copy of
//! the agent's memory and none of its descriptors, and its answer is a message of bounded length.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::sys;

/// Kinds of answer: what was asked for, or why there is none.
const DONE: u8 = 0;
const FAILED: u8 = 1;
/// Longest reason, bytes.
const REASON_MAX: usize = 512;

/// Work that was not done.
#[derive(Debug, thiserror::Error)]
pub enum ApartError {
    /// No process for it, or no pipe.
    #[error("No process of its own could be made: {0}")]
    Process(#[from] io::Error),
    /// Its own reason.
    #[error("{0}")]
    Failed(String),
    /// A panic, or a signal.
    #[error("Its process ended without an answer")]
    Ended,
    /// It was killed.
    #[error("No answer within {} s", .0.as_secs())]
    Silent(Duration),
    /// More than was asked for.
    #[error("The answer is longer than {0} bytes")]
    TooLong(usize),
}

/// Does `work` in a process of its own and returns its answer, of at most `most` bytes. One that has not
/// answered within `patience` is killed.
///
/// # Errors
/// [`ApartError`]; `EDEADLK` where the agent has a second thread.
pub async fn run(
    most: usize,
    patience: Duration,
    work: impl FnOnce() -> Result<Vec<u8>, String>,
) -> Result<Vec<u8>, ApartError> {
    let (answer, answers) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(io::Error::from)?;
    let pidfd = match sys::fork(0, None).map_err(io::Error::from)? {
        sys::Fork::Child => child(answers, work),
        sys::Fork::Parent { pidfd, .. } => pidfd,
    };
    drop(answers);
    let mut answer = pipe::Receiver::from_owned_fd(answer)?;
    let read = tokio::time::timeout(patience, message(&mut answer, most)).await;
    let read = read.unwrap_or(Err(ApartError::Silent(patience)));
    if !matches!(read, Ok(_) | Err(ApartError::Failed(_))) {
        // Mostly it has ended already.
        let _ = sys::kill_by(&pidfd, libc::SIGKILL);
    }
    read
}

/// The answer: its kind, its length, itself.
async fn message(answer: &mut pipe::Receiver, most: usize) -> Result<Vec<u8>, ApartError> {
    let cut = |_| ApartError::Ended;
    let kind = answer.read_u8().await.map_err(cut)?;
    let length = answer.read_u32().await.map_err(cut)? as usize;
    let most = if kind == DONE { most } else { REASON_MAX };
    if length > most {
        return Err(ApartError::TooLong(most));
    }
    let mut bytes = vec![0; length];
    answer.read_exact(&mut bytes).await.map_err(cut)?;
    match kind {
        DONE => Ok(bytes),
        _ => Err(ApartError::Failed(
            String::from_utf8_lossy(&bytes).into_owned(),
        )),
    }
}

/// The process. Nothing of the agent's runs here: its hook for panics would end the guest, and streams
/// whose end somebody waits for would stay open.
fn child(answers: OwnedFd, work: impl FnOnce() -> Result<Vec<u8>, String>) -> ! {
    std::panic::set_hook(Box::new(|_| sys::exit_now(101)));
    if sys::close_all_but(&mut [answers.as_raw_fd()]).is_err() {
        sys::exit_now(1);
    }
    let (kind, mut bytes) = match work() {
        Ok(bytes) => (DONE, bytes),
        Err(reason) => (FAILED, reason.into_bytes()),
    };
    if kind == FAILED {
        bytes.truncate(REASON_MAX);
    }
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let message = [&[kind], &length.to_be_bytes()[..], &bytes].concat();
    let written = std::fs::File::from(answers).write_all(&message);
    sys::exit_now(i32::from(written.is_err()))
}
