//! The copies themselves, one task a stream. Bounded buffers; a task ends with either of its ends.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::watch,
    task::JoinHandle,
};

/// One read. The vsock engine hands out no more at once either.
const CHUNK: usize = 16 << 10;
/// An exit does not wait longer than this for a client that takes nothing.
pub(super) const STALLED: Duration = Duration::from_secs(10);

/// A writer of a client's stream.
pub(super) type Sink = Box<dyn AsyncWrite + Send + Unpin>;

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    delivered: u64,
    ended: bool,
}

pub(super) type ProgressRx = watch::Receiver<Progress>;

/// Guest → client.
#[derive(Debug)]
pub(super) struct Output {
    progress: ProgressRx,
    task: JoinHandle<()>,
}

impl Output {
    pub(super) fn start(sink: Sink, stream: UnixStream) -> Self {
        let (tx, progress) = watch::channel(Progress::default());
        let task = tokio::spawn(async move {
            copy_out(stream, sink, &tx).await;
            tx.send_modify(|p| p.ended = true);
        });
        Self { progress, task }
    }

    pub(super) fn progress(&self) -> ProgressRx {
        self.progress.clone()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy_out(mut stream: UnixStream, sink: Sink, progress: &watch::Sender<Progress>) {
    let mut sink = Some(sink);
    let mut buffer = vec![0; CHUNK];
    loop {
        let n = match stream.read(&mut buffer).await {
            Ok(0) => return,
            Ok(n) => n,
            Err(e) => return tracing::debug!("Output stream of the guest ended: {e}"),
        };
        if let Some(s) = &mut sink
            && let Err(e) = write(s, &buffer[..n]).await
        {
            // The client is gone; the process must not block on a reader that will not return.
            tracing::debug!("Client takes no more output: {e}");
            sink = None;
        }
        progress.send_modify(|p| p.delivered += n as u64);
    }
}

async fn write(sink: &mut Sink, bytes: &[u8]) -> io::Result<()> {
    sink.write_all(bytes).await?;
    sink.flush().await
}

/// Returns when something was delivered, or nothing will be.
pub(super) async fn delivered_some(mut rx: ProgressRx) {
    let _ = rx.wait_for(|p| p.delivered > 0 || p.ended).await;
}

/// See [`super::Drain::wait`].
pub(super) async fn delivered(mut rx: ProgressRx, bytes: u64) {
    loop {
        let p = *rx.borrow_and_update();
        if p.ended || p.delivered >= bytes {
            return;
        }
        match tokio::time::timeout(STALLED, rx.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                let left = bytes - p.delivered;
                return tracing::warn!(left, "Client takes no output; the exit is told without it");
            }
        }
    }
}

/// Client → guest.
#[derive(Debug)]
pub(super) struct Input {
    // A writer of our own: the fifo has no end while a client may still come back.
    keeper: Option<pipe::Sender>,
    task: JoinHandle<()>,
}

impl Input {
    pub(super) fn start(host: super::host::Stdin, stream: UnixStream) -> Self {
        let super::host::Stdin { reader, keeper } = host;
        Self {
            keeper,
            task: tokio::spawn(copy_in(reader, stream)),
        }
    }

    pub(super) fn close(&mut self) {
        self.keeper = None;
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy_in(mut from: impl AsyncRead + Unpin, mut stream: UnixStream) {
    let (mut guest_closed, mut to) = stream.split();
    let mut buffer = vec![0; CHUNK];
    let mut nothing = [0; 1];
    loop {
        tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(n) if n > 0 => {
                    if to.write_all(&buffer[..n]).await.is_err() {
                        return;
                    }
                }
                _ => break,
            },
            // The process has closed its end; nobody reads what a client still sends.
            _ = guest_closed.read(&mut nothing) => return,
        }
    }
    if to.shutdown().await.is_ok() {
        // Everything has arrived when the guest closes its side.
        let _ = guest_closed.read(&mut nothing).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_exit_waits_until_its_output_was_taken() {
        let (guest, stream) = UnixStream::pair().expect("socketpair");
        let (sink, mut client) = tokio::io::duplex(4);
        let output = Output::start(Box::new(sink), stream);
        let (mut guest_read, mut guest_write) = guest.into_split();
        guest_write.write_all(b"0123456789").await.expect("write");
        let waiting = tokio::spawn(delivered(output.progress(), 10));
        let mut all = [0; 10];
        client.read_exact(&mut all).await.expect("read");
        assert_eq!(&all, b"0123456789");
        waiting.await.expect("delivered");
        drop(guest_write);
        assert_eq!(guest_read.read(&mut [0; 1]).await.expect("eof"), 0);
    }

    #[tokio::test]
    async fn a_client_that_left_does_not_block_the_process() {
        let (mut guest, stream) = UnixStream::pair().expect("socketpair");
        let (sink, client) = tokio::io::duplex(4);
        drop(client);
        let output = Output::start(Box::new(sink), stream);
        guest.write_all(&[7; 100_000]).await.expect("write");
        delivered(output.progress(), 100_000).await;
    }

    #[tokio::test]
    async fn input_ends_when_the_client_closes_it() {
        let (mut guest, stream) = UnixStream::pair().expect("socketpair");
        let (keeper, reader) = pipe::pipe().expect("pipe");
        let mut input = Input::start(
            super::super::host::Stdin {
                reader,
                keeper: Some(keeper),
            },
            stream,
        );
        if let Some(k) = &mut input.keeper {
            k.write_all(b"abc").await.expect("write");
        }
        input.close();
        let mut all = Vec::new();
        guest.read_to_end(&mut all).await.expect("read");
        assert_eq!(all, b"abc");
    }
}
