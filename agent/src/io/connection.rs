//! Stream connections: the header line of each, what it asks for, and the two kinds that belong to no
//! process (a TCP port, the debug console).

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use sealpod_protocol::streams::{HEADER_MAX, Header, Stdio};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// How long a connection may take to say what it is for.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// A byte stream both ways.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A stream connection of the shim.
pub type Connection = Box<dyn Stream>;

/// Who takes the streams of processes.
pub trait Processes {
    /// Whether this stream can be attached now; the reason if not.
    ///
    /// # Errors
    /// In words, for the other side.
    fn check(&self, container: &str, exec: &str, stream: Stdio) -> Result<(), String>;
    /// Attaches it.
    ///
    /// # Errors
    /// As above; the connection is closed.
    fn attach(
        &self,
        container: &str,
        exec: &str,
        stream: Stdio,
        connection: Connection,
    ) -> Result<(), String>;
}

/// Serves one connection from its first byte.
pub async fn accept(mut connection: Connection, processes: &impl Processes) {
    let header = match timeout(HEADER_TIMEOUT, read_header(&mut connection)).await {
        Ok(Ok(header)) => header,
        Ok(Err(why)) => return refuse(connection, &why).await,
        Err(_) => return refuse(connection, "no header line in time").await,
    };
    match header {
        Header::Stdio {
            stream,
            container_id,
            exec_id,
        } => {
            if let Err(why) = processes.check(&container_id, &exec_id, stream) {
                return refuse(connection, &why).await;
            }
            // The answer goes first: from then on the connection is the process's alone.
            if connection.write_all(b"OK\n").await.is_ok() {
                let _ = processes.attach(&container_id, &exec_id, stream, connection);
            }
        }
        Header::Tcp { port } => match connect(port).await {
            Ok(mut tcp) => {
                if connection.write_all(b"OK\n").await.is_ok() {
                    let _ = copy_bidirectional(&mut connection, &mut tcp).await;
                }
            }
            Err(e) => {
                let why = format!("connect to port {port} of the guest: {e}");
                refuse(connection, &why).await;
            }
        },
    }
}

/// Reads up to the newline. The other side waits for the answer before it sends more, so a byte after
/// the newline is an error.
async fn read_header(connection: &mut Connection) -> Result<Header, String> {
    let mut line = [0; HEADER_MAX];
    let mut length = 0;
    loop {
        let count = connection.read(&mut line[length..]).await;
        length += match count {
            Ok(0) if length == HEADER_MAX => return Err("header line too long".into()),
            Ok(0) => return Err("connection ended within the header line".into()),
            Ok(count) => count,
            Err(e) => return Err(format!("read the header line: {e}")),
        };
        match line[..length].iter().position(|b| *b == b'\n') {
            Some(end) if end + 1 == length => {
                return Header::decode(&line[..length]).map_err(|e| e.to_string());
            }
            Some(_) => return Err("bytes after the header line, before the answer".into()),
            None => {}
        }
    }
}

async fn refuse(mut connection: Connection, why: &str) {
    let why = why.replace('\n', " ");
    // A peer that does not read its refusal does without it.
    let _ = timeout(HEADER_TIMEOUT, async {
        connection
            .write_all(format!("ERR {why}\n").as_bytes())
            .await?;
        connection.shutdown().await
    })
    .await;
}

async fn connect(port: u16) -> io::Result<TcpStream> {
    match TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
        Ok(tcp) => Ok(tcp),
        Err(first) => TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
            .await
            .map_err(|_| first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use tokio::net::{TcpListener, UnixStream};

    #[derive(Default)]
    struct Known(Mutex<Vec<Connection>>);

    impl Processes for Known {
        fn check(&self, container: &str, _: &str, _: Stdio) -> Result<(), String> {
            (container == "c1")
                .then_some(())
                .ok_or("no such container".into())
        }
        fn attach(&self, _: &str, _: &str, _: Stdio, c: Connection) -> Result<(), String> {
            self.0.lock().expect("lock").push(c);
            Ok(())
        }
    }

    async fn answer(sent: &[u8]) -> (String, usize) {
        let known = Known::default();
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        ours.write_all(sent).await.expect("sent");
        ours.shutdown().await.expect("half-closed");
        accept(Box::new(theirs), &known).await;
        let attached = known.0.into_inner().expect("lock").len();
        let mut got = String::new();
        ours.read_to_string(&mut got).await.expect("answer");
        (got, attached)
    }

    #[tokio::test]
    async fn a_known_stream_is_answered_and_attached() {
        assert_eq!(answer(b"stdout c1 -\n").await, ("OK\n".into(), 1));
    }

    #[tokio::test]
    async fn hostile_headers_get_one_line_and_nothing_is_attached() {
        let long = [b'a'; HEADER_MAX];
        for bad in [
            &b""[..],
            b"stdout c1 -",
            b"stdout c2 -\n",
            b"stdout c1 -\nearly",
            b"tcp 0\n",
            b"\xff\xfe\n",
            b"console\n",
            &long,
        ] {
            let (text, attached) = answer(bad).await;
            assert!(
                text.starts_with("ERR ") && text.ends_with('\n'),
                "{bad:?} {text:?}"
            );
            assert_eq!(attached, 0);
        }
    }

    #[tokio::test]
    async fn a_tcp_port_of_the_guest_is_reached_both_ways() {
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("bind");
        let port = server.local_addr().expect("address").port();
        let echo = tokio::spawn(async move {
            let (mut peer, _) = server.accept().await.expect("accepted");
            let mut got = String::new();
            peer.read_to_string(&mut got)
                .await
                .expect("half-close arrives");
            peer.write_all(got.to_uppercase().as_bytes())
                .await
                .expect("answered");
        });
        let known = Known::default();
        let (mut ours, theirs) = UnixStream::pair().expect("pair");
        ours.write_all(format!("tcp {port}\n").as_bytes())
            .await
            .expect("sent");
        let client = async {
            let mut ok = [0; 3];
            ours.read_exact(&mut ok).await.expect("answer");
            assert_eq!(&ok, b"OK\n");
            ours.write_all(b"hello").await.expect("sent");
            ours.shutdown().await.expect("half-closed");
            let mut got = String::new();
            ours.read_to_string(&mut got).await.expect("answer");
            got
        };
        let ((), got) = tokio::join!(accept(Box::new(theirs), &known), client);
        assert_eq!(got, "HELLO");
        echo.await.expect("ended");
    }
}
