//! The agent's client: the connection that the agent dialled, and the streams opened to it. Everything
//! that comes back is the guest's word: capped, checked, and waited for only so long.

use std::{io, path::Path, path::PathBuf, time::Duration};

use protobuf::Message;
use sealpod_protocol::{
    AGENT_PORT, PROTOCOL_VERSION, STREAM_PORT,
    agent::{self, HelloRequest, HelloResponse},
    agent_ttrpc::AgentClient,
    streams::Header,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};
use ttrpc::{
    r#async::transport::Socket,
    context::{self, Context},
};

use crate::error::{Error, Result};

/// How long the agent may take for a request that only touches its own state or the guest's kernel.
const CALL: Duration = Duration::from_secs(30);
/// Building a container reads its root file system.
const CREATE: Duration = Duration::from_secs(120);
/// Opening one stream.
const STREAM: Duration = Duration::from_secs(10);
/// Connections of an agent that has not answered yet.
const DIALS_MAX: u32 = 16;
/// Longest line that the agent or the engine answers on a new stream.
const LINE_MAX: usize = 512;

/// Why the agent cannot be talked to.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// Of the connection itself.
    #[error("Guest agent's connection failed")]
    Io(#[from] io::Error),
    /// Another protocol.
    #[error(
        "Guest agent speaks protocol version {theirs}, this shim {PROTOCOL_VERSION}: initramfs and shim are not of one build"
    )]
    Version {
        /// Its version; 0 where it did not say.
        theirs: u32,
    },
    /// It refused, or did not answer.
    #[error("Guest agent refused the first request")]
    Hello(#[source] ttrpc::Error),
    /// Its VM is gone.
    #[error("The VM ended before its agent answered: {0}")]
    Ended(String),
    /// Too slow, or not there.
    #[error("Guest agent did not answer within {0} s")]
    Silent(u64),
    /// A stream was refused.
    #[error("Guest refused the stream {header:?}: {reason}")]
    Stream {
        /// Which.
        header: String,
        /// What the agent said.
        reason: String,
    },
}

/// Where the agent of a VM to be dials, until it has. Nobody else may dial afterwards.
#[derive(Debug)]
pub struct Dialled {
    listener: UnixListener,
    path: PathBuf,
    vsock: PathBuf,
}

impl Dialled {
    /// For the VM whose vsock engine has its socket at `vsock`, or will have.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn bind(vsock: PathBuf) -> io::Result<Self> {
        let mut path = vsock.clone().into_os_string();
        path.push(format!("_{AGENT_PORT}"));
        let path = PathBuf::from(path);
        Ok(Self {
            listener: UnixListener::bind(&path)?,
            path,
            vsock,
        })
    }

    /// Waits for the agent to dial and answer; `ended` is how its VM ends. A connection that is gone before it
    /// answers is one that the agent has given up: it dials again.
    ///
    /// # Errors
    /// [`GuestError`]: it does not within `limit`, ended before, or cannot be talked to.
    pub async fn answered(
        self,
        ended: impl Future<Output = String>,
        limit: Duration,
    ) -> std::result::Result<(Guest, HelloResponse), GuestError> {
        let answered = async {
            let mut left = DIALS_MAX;
            loop {
                let accepted = Guest::accept(&self.listener, &self.vsock).await;
                let Err(GuestError::Hello(e)) = &accepted else {
                    return accepted;
                };
                left -= 1;
                if left == 0 || matches!(e, ttrpc::Error::RpcStatus(_)) {
                    return accepted;
                }
                tracing::info!("The agent's connection was gone before it answered: {e}");
            }
        };
        tokio::select! {
            answered = answered => answered,
            exit = ended => Err(GuestError::Ended(exit)),
            () = tokio::time::sleep(limit) => Err(GuestError::Silent(limit.as_secs())),
        }
    }
}

impl Drop for Dialled {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Handle to the agent of one pod.
#[derive(Clone)]
pub struct Guest {
    client: AgentClient,
    vsock: PathBuf,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest")
            .field("vsock", &self.vsock)
            .finish_non_exhaustive()
    }
}

impl Guest {
    /// Takes the connection that the agent dials to `listener`, and asks who it is. `vsock` is the
    /// engine's socket, for streams. The caller bounds the time.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn accept(
        listener: &UnixListener,
        vsock: &Path,
    ) -> std::result::Result<(Self, HelloResponse), GuestError> {
        let (stream, _) = listener.accept().await?;
        let guest = Self {
            client: AgentClient::new(ttrpc::r#async::Client::new(Socket::new(stream))),
            vsock: vsock.to_owned(),
        };
        let request = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        };
        let hello = guest
            .client
            .hello(context::with_duration(CALL), &request)
            .await;
        match hello {
            Ok(h) if h.protocol_version == PROTOCOL_VERSION => Ok((guest, h)),
            Ok(h) => Err(GuestError::Version {
                theirs: h.protocol_version,
            }),
            Err(e) => Err(GuestError::Hello(e)),
        }
    }

    /// The agent's requests, with `ctx` as [`Self::soon`] or [`Self::whenever`] make it.
    #[must_use]
    pub fn agent(&self) -> &AgentClient {
        &self.client
    }

    /// For requests that are answered at once.
    #[must_use]
    pub fn soon() -> Context {
        context::with_duration(CALL)
    }

    /// For building a container.
    #[must_use]
    pub fn while_building() -> Context {
        context::with_duration(CREATE)
    }

    /// For requests that wait for something to happen.
    #[must_use]
    pub fn whenever() -> Context {
        context::with_timeout(0)
    }

    /// Opens a stream to the guest.
    ///
    /// # Errors
    /// [`GuestError::Io`] where the guest is gone or slow, [`GuestError::Stream`] where it refuses.
    pub async fn stream(&self, header: &Header) -> std::result::Result<UnixStream, GuestError> {
        let open = async {
            let mut stream = UnixStream::connect(&self.vsock).await?;
            stream
                .write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes())
                .await?;
            line(&mut stream).await?;
            stream.write_all(header.encode().as_bytes()).await?;
            let answer = line(&mut stream).await?;
            if answer == "OK" {
                return Ok(stream);
            }
            Err(GuestError::Stream {
                header: header.encode().trim_end().to_owned(),
                reason: answer.strip_prefix("ERR ").unwrap_or(&answer).to_owned(),
            })
        };
        match timeout(STREAM, open).await {
            Ok(done) => done,
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }

    /// Requests that only name a container.
    #[must_use]
    pub fn container(id: &str) -> agent::ContainerRequest {
        agent::ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        }
    }

    /// Requests that only name a process.
    #[must_use]
    pub fn process(id: &str, exec_id: &str) -> agent::ProcessRequest {
        agent::ProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            ..Default::default()
        }
    }
}

impl From<GuestError> for Error {
    fn from(e: GuestError) -> Self {
        Self::chain(crate::error::Kind::Unavailable, &e)
    }
}

/// Checks that `request` fits into one ttrpc message.
///
/// # Errors
/// Names `what` and both sizes.
pub fn fits(what: &str, request: &impl Message) -> Result<()> {
    // Room for ttrpc's own fields around the payload.
    let max = (4 << 20) - (16 << 10);
    let bytes = usize::try_from(request.compute_size()).unwrap_or(usize::MAX);
    if bytes <= max {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{what} is {bytes} bytes; at most {max} fit into one request to the guest"
    )))
}

/// One line without its newline. Reads no byte beyond it: what follows is the stream's.
async fn line(stream: &mut UnixStream) -> io::Result<String> {
    let mut text = Vec::new();
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if text.len() < LINE_MAX => text.push(byte),
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, "line too long")),
        }
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn engine(dir: &Path, answers: &'static [u8]) -> Guest {
        let vsock = dir.join("v");
        let listener = UnixListener::bind(&vsock).expect("bind");
        tokio::spawn(async move {
            let (mut s, _) = listener.accept().await.expect("accept");
            s.write_all(answers).await.expect("write");
            let mut rest = Vec::new();
            let _ = s.read_to_end(&mut rest).await;
        });
        let (ours, _theirs) = UnixStream::pair().expect("pair");
        Guest {
            client: AgentClient::new(ttrpc::r#async::Client::new(Socket::new(ours))),
            vsock,
        }
    }

    #[tokio::test]
    async fn a_stream_begins_right_after_its_ok() {
        let dir = tempfile::tempdir().expect("tempdir");
        let guest = engine(dir.path(), b"OK 1073741824\nOK\npayload").await;
        let mut s = guest
            .stream(&Header::Tcp { port: 80 })
            .await
            .expect("stream");
        let mut first = [0; 7];
        s.read_exact(&mut first).await.expect("read");
        assert_eq!(&first, b"payload");
    }

    #[tokio::test]
    async fn a_refused_stream_says_why_and_an_endless_line_is_cut() {
        let dir = tempfile::tempdir().expect("tempdir");
        let guest = engine(dir.path(), b"OK 1\nERR no such process\n").await;
        let e = guest
            .stream(&Header::Tcp { port: 80 })
            .await
            .expect_err("refused")
            .to_string();
        assert!(e.contains("no such process"), "{e}");
        let dir = tempfile::tempdir().expect("tempdir");
        let guest = engine(dir.path(), &[b'x'; 4096]).await;
        assert!(matches!(
            guest.stream(&Header::Tcp { port: 80 }).await,
            Err(GuestError::Io(_))
        ));
    }

    /// An agent of another build.
    struct Other(u32);

    #[async_trait::async_trait]
    impl sealpod_protocol::agent_ttrpc::Agent for Other {
        async fn hello(
            &self,
            _: &ttrpc::r#async::TtrpcContext,
            _: HelloRequest,
        ) -> ttrpc::Result<HelloResponse> {
            Ok(HelloResponse {
                protocol_version: self.0,
                ..Default::default()
            })
        }
    }

    /// Dials as an agent of this version does.
    async fn dial(dialled: &Dialled, version: u32) -> ttrpc::r#async::Server {
        let agent = UnixStream::connect(&dialled.path).await.expect("dial");
        let service =
            sealpod_protocol::agent_ttrpc::create_agent(std::sync::Arc::new(Other(version)));
        let listener = futures_util::stream::iter([Ok(agent)]);
        let mut server = ttrpc::r#async::Server::new()
            .register_service(service)
            .add_listener(ttrpc::r#async::transport::Listener::new(listener));
        server.start().await.expect("serve");
        server
    }

    #[tokio::test]
    async fn an_agent_that_gave_up_its_connection_is_heard_when_it_dials_again() {
        let dir = tempfile::tempdir().expect("tempdir");
        let dialled = Dialled::bind(dir.path().join("v")).expect("bind");
        for _ in 0..3 {
            drop(UnixStream::connect(&dialled.path).await.expect("dial"));
        }
        let _server = dial(&dialled, PROTOCOL_VERSION).await;
        let answered = dialled.answered(std::future::pending(), CALL).await;
        assert_eq!(
            answered.expect("answer").1.protocol_version,
            PROTOCOL_VERSION
        );
        // But not without end.
        let dialled = Dialled::bind(dir.path().join("w")).expect("bind");
        for _ in 0..DIALS_MAX {
            drop(UnixStream::connect(&dialled.path).await.expect("dial"));
        }
        let e = dialled.answered(std::future::pending(), CALL).await;
        assert!(matches!(e, Err(GuestError::Hello(_))));
    }

    #[tokio::test]
    async fn an_agent_of_another_protocol_version_is_refused_with_both_versions() {
        for theirs in [0, PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1] {
            let dir = tempfile::tempdir().expect("tempdir");
            let dialled = Dialled::bind(dir.path().join("v")).expect("bind");
            let _server = dial(&dialled, theirs).await;
            let e = dialled
                .answered(std::future::pending(), CALL)
                .await
                .expect_err("another version");
            let words = format!("version {theirs}, this shim {PROTOCOL_VERSION}");
            assert!(e.to_string().contains(&words), "{e}");
        }
    }
}
