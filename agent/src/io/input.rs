//! Input of a process from its stream connection.

use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::sync::{oneshot, watch};
use tokio::time::timeout;

use super::{CHUNK, Connection, End};
use crate::reaper::ExitWatch;

/// After a request to close, how long the connection may be idle before what was sent counts as
/// delivered. (Normally its own end comes first.)
const CLOSE_IDLE: Duration = Duration::from_millis(500);

/// Moves input until the connection ends, closing is asked for, or the process has ended or reads no
/// more. Dropping `sink` then is what closes a pipe; a terminal has other holders and stays open.
pub(super) async fn feed(
    sink: End,
    attach: oneshot::Receiver<Connection>,
    mut close: watch::Receiver<bool>,
    mut exit: ExitWatch,
) {
    let move_all = async {
        let mut connection = tokio::select! {
            biased;
            connection = attach => connection.ok()?,
            _ = close.wait_for(|c| *c) => return None,
        };
        let mut buffer = Vec::new();
        loop {
            let closing = *close.borrow();
            buffer.resize(CHUNK, 0);
            let count = if closing {
                timeout(CLOSE_IDLE, connection.read(&mut buffer))
                    .await
                    .ok()?
            } else {
                tokio::select! {
                    biased;
                    count = connection.read(&mut buffer) => count,
                    _ = close.wait_for(|c| *c) => continue,
                }
            };
            match count {
                Ok(0) | Err(_) => return None,
                Ok(count) => write_all(&sink, &buffer[..count]).await?,
            }
        }
    };
    let _: Option<()> = tokio::select! {
        done = move_all => done,
        _ = exit.wait_for(Option::is_some) => None,
    };
}

/// `None` when nobody reads any more.
async fn write_all(sink: &End, mut bytes: &[u8]) -> Option<()> {
    while !bytes.is_empty() {
        let mut ready = sink.writable().await.ok()?;
        let wrote = ready.try_io(|fd| nix::unistd::write(fd.get_ref(), bytes).map_err(Into::into));
        match wrote {
            Ok(Ok(count)) => bytes = bytes.get(count..)?,
            Ok(Err(e)) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(Err(_)) => return None,
            Err(_would_block) => {}
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixStream;

    async fn fed(close_first: bool, half_close: bool) -> Vec<u8> {
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let sink = super::super::end(writer.into()).expect("registered");
        let (attach, attached) = oneshot::channel::<Connection>();
        let (close, closing) = watch::channel(false);
        let (_exit, exited) = watch::channel(None);
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        ours.write_all(b"typed").await.expect("sent");
        assert!(attach.send(Box::new(theirs)).is_ok());
        if half_close {
            ours.shutdown().await.expect("half-closed");
        }
        if close_first {
            close.send_replace(true);
        }
        feed(sink, attached, closing, exited).await;
        let mut got = Vec::new();
        reader.read_to_end(&mut got).expect("closed");
        got
    }

    #[tokio::test]
    async fn the_end_of_the_connection_is_the_end_of_input() {
        assert_eq!(fed(false, true).await, b"typed");
    }

    #[tokio::test]
    async fn closing_delivers_what_was_sent_before() {
        assert_eq!(fed(true, false).await, b"typed");
    }

    #[tokio::test]
    async fn the_end_of_the_process_ends_the_input() {
        let (_reader, writer) = std::io::pipe().expect("pipe");
        let sink = super::super::end(writer.into()).expect("registered");
        let (_attach, attached) = oneshot::channel::<Connection>();
        let (_close, closing) = watch::channel(false);
        let (exit, exited) = watch::channel(None);
        exit.send_replace(Some(crate::reaper::Exit {
            status: 0,
            at_unix_ns: 0,
            killed: false,
        }));
        feed(sink, attached, closing, exited).await;
    }
}
