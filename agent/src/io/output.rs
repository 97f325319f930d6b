//! Output of a process to its stream connection, with back-pressure: a chunk is read only when the
//! connection has taken the one before.
//!
//! ```text
//! Unattached ──connection──▶ Forwarding ──connection lost──▶ Discarding
//!     │ (nothing is read: the output waits in the pipe)         ▲
//!     └── the process has ended and nobody came for ATTACH_GRACE┘
//! ```
//! In every state the end of the pipe ends the task. `drained` is told how many bytes the connection
//! has taken, once: at the end of the pipe, or when the process has ended and the pipe is found empty
//! (a descendant may hold it and write on; that is forwarded, and not counted), or when [`LATE_MAX`]
//! bytes have come after the process's end.

use std::io;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use super::{CHUNK, Connection, End};
use crate::reaper::ExitWatch;

/// How long the output of a process that has ended waits for a connection.
const ATTACH_GRACE: Duration = Duration::from_secs(10);
/// More than a pipe's buffer holds (fs.pipe-max-size is 1 MiB): what comes later was written later.
const LATE_MAX: usize = 1 << 20;

/// What one attempt to read found.
enum Read {
    Bytes(usize),
    Nothing,
    End,
}

/// Moves the output of one stream. Ends with the pipe.
pub(super) async fn forward(
    source: End,
    attach: oneshot::Receiver<Connection>,
    mut exit: ExitWatch,
    drained: watch::Sender<Option<u64>>,
) {
    let mut connection = wait_attached(attach, &mut exit).await;
    let (mut sent, mut late, mut told) = (0_u64, 0, false);
    let mut buffer = Vec::new();
    loop {
        // Looked at before reading: what the process wrote is in the pipe by then.
        let ended = exit.borrow().is_some();
        buffer.resize(CHUNK, 0);
        match read(&source, &mut buffer) {
            Read::End => break,
            Read::Nothing => {
                if ended && !told {
                    told = true;
                    drained.send_replace(Some(sent));
                }
                buffer = Vec::new(); // an idle stream costs nothing
                wait_readable(&source, &mut exit, ended).await;
            }
            Read::Bytes(count) => {
                if let Some(stream) = &mut connection {
                    match stream.write_all(&buffer[..count]).await {
                        Ok(()) => sent += count as u64,
                        Err(_) => connection = None,
                    }
                }
                late += if ended { count } else { 0 };
                if late > LATE_MAX && !told {
                    told = true;
                    drained.send_replace(Some(sent));
                }
            }
        }
    }
    if let Some(mut stream) = connection {
        let _ = stream.shutdown().await;
    }
    if !told {
        drained.send_replace(Some(sent));
    }
}

async fn wait_attached(
    attach: oneshot::Receiver<Connection>,
    exit: &mut ExitWatch,
) -> Option<Connection> {
    let abandoned = async {
        // An error means that the process is being forgotten.
        let _ = exit.wait_for(Option::is_some).await;
        sleep(ATTACH_GRACE).await;
    };
    tokio::select! {
        connection = attach => connection.ok(),
        () = abandoned => None,
    }
}

/// Waits until there may be something to read, or the process has ended.
async fn wait_readable(source: &End, exit: &mut ExitWatch, ended: bool) {
    tokio::select! {
        biased;
        _ = exit.changed(), if !ended => {}
        ready = source.readable() => {
            if let Ok(mut ready) = ready {
                // The readiness may be an old one: asks the kernel, so that the next wait is a true
                // one. Poll consumes nothing.
                let _ = ready.try_io(super::streams::poll_in);
            }
        }
    }
}

fn read(source: &End, buffer: &mut [u8]) -> Read {
    loop {
        match nix::unistd::read(source.get_ref(), buffer) {
            Ok(0) => return Read::End,
            Ok(count) => return Read::Bytes(count),
            Err(nix::errno::Errno::EAGAIN) => return Read::Nothing,
            Err(nix::errno::Errno::EINTR) => {}
            // EIO: the last holder of a terminal's slave has closed it.
            Err(_) => return Read::End,
        }
    }
}

/// For `try_io`: whether the descriptor has something to read, or nothing yet.
pub(super) fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reaper::Exit;
    use std::io::Write;
    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    struct Running {
        writer: std::io::PipeWriter,
        attach: Option<oneshot::Sender<Connection>>,
        exit: watch::Sender<Option<Exit>>,
        drained: watch::Receiver<Option<u64>>,
        task: tokio::task::JoinHandle<()>,
    }

    fn start() -> Running {
        let (reader, writer) = std::io::pipe().expect("pipe");
        let source = super::super::end(reader.into()).expect("registered");
        let (attach, attached) = oneshot::channel();
        let (exit, exited) = watch::channel(None);
        let (tell, drained) = watch::channel(None);
        let task = tokio::spawn(forward(source, attached, exited, tell));
        Running {
            writer,
            attach: Some(attach),
            exit,
            drained,
            task,
        }
    }

    impl Running {
        fn attach(&mut self) -> UnixStream {
            let (ours, theirs) = UnixStream::pair().expect("pair");
            let attach = self.attach.take().expect("attached once");
            assert!(attach.send(Box::new(theirs)).is_ok());
            ours
        }

        fn end(&self) {
            self.exit.send_replace(Some(Exit {
                status: 0,
                at_unix_ns: 1,
                killed: false,
            }));
        }

        async fn count(&mut self) -> u64 {
            let told = self.drained.wait_for(Option::is_some).await.expect("told");
            told.unwrap_or_default()
        }
    }

    #[tokio::test]
    async fn output_written_before_the_connection_is_not_lost() {
        let mut run = start();
        run.writer.write_all(b"early").expect("write");
        run.end();
        let mut stream = run.attach();
        drop(run.writer);
        let mut got = String::new();
        stream.read_to_string(&mut got).await.expect("read");
        assert_eq!(got, "early");
        run.task.await.expect("ended");
    }

    #[tokio::test]
    async fn a_descendant_that_keeps_the_pipe_does_not_hold_up_the_count() {
        let mut run = start();
        let mut stream = run.attach();
        run.writer.write_all(b"before").expect("write");
        run.end();
        assert_eq!(run.count().await, 6);
        run.writer.write_all(b"after").expect("write");
        let mut got = [0; 11];
        stream.read_exact(&mut got).await.expect("forwarded");
        assert_eq!(&got, b"beforeafter");
        assert_eq!(*run.drained.borrow(), Some(6));
        drop(run.writer);
        run.task.await.expect("ended");
    }

    #[tokio::test]
    async fn a_lost_connection_does_not_stop_the_process() {
        let mut run = start();
        drop(run.attach());
        let mut writer = run.writer;
        // Far more than a pipe holds: the write ends only when it is being drained.
        let written = tokio::task::spawn_blocking(move || writer.write_all(&[7; 1 << 20]));
        written.await.expect("joined").expect("written");
        run.task.await.expect("ended");
        assert!(run.drained.borrow().is_some_and(|n| n < 1 << 20));
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_comes_for_is_given_up_after_the_grace() {
        let mut run = start();
        run.writer.write_all(b"lost").expect("write");
        run.end();
        assert_eq!(run.count().await, 0);
    }

    #[tokio::test]
    async fn nothing_is_read_while_the_connection_takes_nothing() {
        let mut run = start();
        let stream = run.attach();
        let writer = run.writer;
        nix::fcntl::fcntl(
            &writer,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .expect("non-blocking");
        // Fills socket, task and pipe; then the writer must be the one that waits.
        let mut total = 0;
        let mut idle = 0;
        while idle < 50 {
            match (&writer).write(&[1; 4096]) {
                Ok(n) => (total, idle) = (total + n, 0),
                Err(_) => idle += 1,
            }
            tokio::task::yield_now().await;
        }
        assert!(total < 8 << 20, "{total} bytes were taken from the process");
        drop(stream);
        drop(writer);
        run.task.await.expect("ended");
    }
}
