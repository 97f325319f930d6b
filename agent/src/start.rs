//! The agent's run: one thread, one connection to the shim over which requests come, one listener for
//! streams. The transport is the caller's choice; the guest's is vsock.
//!
//! ```text
//!  dial ──▶ serve ── the connection ends ──▶ nobody's yet: dial again; a pod's: the guest ends
//! ```
//! A guest that was written down before it was any pod's goes on behind another shim's vsock engine, with
//! its connections gone.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use futures::stream;
use nix::sys::sysinfo::sysinfo;
use nix::time::{ClockId, clock_gettime};
use sealpod_protocol::agent::HelloResponse;
use sealpod_protocol::agent_ttrpc::{Agent, create_agent};
use sealpod_protocol::{AGENT_PORT, PROTOCOL_VERSION, STREAM_PORT};
use tokio::io::{AsyncRead, AsyncWrite, Interest};
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::attest::Gate;
use crate::io::{Connection, accept};
use crate::log;
use crate::reaper::Reaper;
use crate::service::Service;
use crate::sys;

/// Most stream connections at once.
const STREAMS_MAX: usize = 4096;
/// Pause after a listener's failure (no descriptors left), so that it does not spin.
const BACK_OFF: Duration = Duration::from_millis(100);

/// When the agent began, and when it was ready.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timeline {
    /// CLOCK_BOOTTIME, ns; of a guest that was written down, when it went on.
    pub began_ns: u64,
    /// See above.
    pub ready_ns: u64,
}

/// CLOCK_BOOTTIME, ns.
#[must_use]
pub fn boot_time_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |t| {
        (t.tv_sec() * 1_000_000_000 + t.tv_nsec()).unsigned_abs()
    })
}

impl Timeline {
    /// What the agent says of itself and its guest.
    #[must_use]
    pub fn hello(&self) -> HelloResponse {
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages: u64 = statm
            .split(' ')
            .nth(1)
            .and_then(|p| p.parse().ok())
            .unwrap_or_default();
        let kernel = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned());
        HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: kernel.unwrap_or_default(),
            init_started_ns: self.began_ns,
            ready_ns: self.ready_ns,
            memory_total_bytes: sysinfo().map_or(0, |s| s.ram_total()),
            memory_available_bytes: available(&memory),
            agent_rss_bytes: pages * PAGE,
            ..Default::default()
        }
    }
}

/// Page size of x86-64, bytes.
const PAGE: u64 = 4096;

/// `MemAvailable` of /proc/meminfo, bytes.
fn available(meminfo: &str) -> u64 {
    let line = meminfo
        .lines()
        .find_map(|l| l.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// What answers the shim: the agent's service, or what a test has put around it.
pub type Serving = fn(Service) -> Arc<dyn Agent + Send + Sync>;

/// Serves the shim over vsock until it is gone.
///
/// # Errors
/// When the shim cannot be reached, or the connection of a guest that is a pod's ends.
pub async fn over_vsock(mut began_ns: u64, serving: Serving) -> io::Result<()> {
    let streams = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))?;
    let mut next_stream = async || {
        loop {
            match streams.accept().await {
                // Sockets of this family know no namespaces: a container may connect here too.
                Ok((_, peer)) if peer.cid() != VMADDR_CID_HOST => {}
                Ok((connection, _)) => return Box::new(connection) as Connection,
                Err(e) => {
                    log!("accept a stream: {e}");
                    tokio::time::sleep(BACK_OFF).await;
                }
            }
        }
    };
    let mut run = Run::new(serving)?;
    loop {
        let shim = dial().await?;
        run.service.ready(Timeline {
            began_ns,
            ready_ns: boot_time_ns(),
        });
        let lost = lost(&shim)?;
        let ended = run.serve(shim, lost, &mut next_stream).await;
        if run.service.is_a_pods() || !matches!(ended, Err(Ended::Shim)) {
            return ended.map_err(Into::into);
        }
        began_ns = boot_time_ns();
    }
}

/// Connects to the shim. The kernel waits 2 s for an answer, which a busy host may not give in time; how long a
/// guest may take is the shim's to say.
async fn dial() -> io::Result<VsockStream> {
    loop {
        match VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, AGENT_PORT)).await {
            Err(e) if e.kind() == io::ErrorKind::TimedOut => log!("dial the shim again: {e}"),
            other => return other,
        }
    }
}

/// Serves requests on `shim` and the streams that `next_stream` yields, until `shim` ends.
///
/// # Errors
/// As [`over_vsock`].
pub async fn serve<S>(
    shim: S,
    timeline: Timeline,
    mut next_stream: impl AsyncFnMut() -> Connection,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
{
    let mut run = Run::new(|service| Arc::new(service))?;
    run.service.ready(timeline);
    let lost = std::future::pending();
    let served = run.serve(shim, lost, &mut next_stream).await;
    served.map_err(Into::into)
}

/// Returns when a connection is gone that nobody has closed, as in a guest that goes on elsewhere: the
/// kernel has it in error, which wakes none that wait to read.
fn lost(shim: &VsockStream) -> io::Result<impl Future<Output = ()> + use<>> {
    let shim = sys::register(shim.as_fd().try_clone_to_owned()?, Interest::ERROR)?;
    Ok(async move {
        // Nothing can be wrong with waiting but that the runtime ends.
        let _ = shim.ready(Interest::ERROR).await;
    })
}

/// Why serving ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the shim is gone")]
    Shim,
    #[error("reaper: {0}")]
    Reaper(String),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Ended> for io::Error {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::Io(e) => e,
            Ended::Shim => Self::new(io::ErrorKind::ConnectionAborted, ended),
            Ended::Reaper(_) => Self::other(ended),
        }
    }
}

/// What outlives a connection to a shim.
struct Run {
    service: Service,
    /// What answers the shim.
    served: Arc<dyn Agent + Send + Sync>,
    reaping: tokio::task::JoinHandle<io::Result<()>>,
    places: Arc<Semaphore>,
}

impl Run {
    fn new(serving: Serving) -> io::Result<Self> {
        let reaper = Reaper::default();
        let gate = Gate::closed().map_err(|e| io::Error::other(format!("Guest gate: {e}")))?;
        let service = Service::new(reaper.clone(), gate);
        Ok(Self {
            served: serving(service.clone()),
            service,
            reaping: tokio::spawn(reaper.run()),
            places: Arc::new(Semaphore::new(STREAMS_MAX)),
        })
    }

    async fn serve<S>(
        &mut self,
        shim: S,
        lost: impl Future<Output = ()>,
        next_stream: &mut impl AsyncFnMut() -> Connection,
    ) -> Result<(), Ended>
    where
        S: AsyncRead + AsyncWrite + Send + Sync + Unpin + 'static,
    {
        let (shim, ended) = Watched::new(shim);
        let mut server = Server::new()
            .register_service(create_agent(self.served.clone()))
            .add_listener(Listener::new(stream::iter([Ok(shim)])));
        server.start().await.map_err(io::Error::other)?;
        let streams = async {
            loop {
                let connection = next_stream().await;
                // One too many is closed at once.
                if let Ok(place) = self.places.clone().try_acquire_owned() {
                    let service = self.service.clone();
                    tokio::spawn(async move {
                        accept(connection, &service).await;
                        drop(place);
                    });
                }
            }
        };
        tokio::select! {
            () = streams => Ok(()),
            _ = ended => Err(Ended::Shim),
            () = lost => {
                server.disconnect().await;
                Err(Ended::Shim)
            }
            failed = &mut self.reaping => Err(Ended::Reaper(format!("{failed:?}"))),
        }
    }
}

use watched::Watched;

/// A connection that tells when it is dropped, which is what the server does at its end.
mod watched {
    use std::io;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
    use tokio::sync::oneshot;

    pub(super) struct Watched<S>(
        S,
        #[expect(dead_code, reason = "its drop is the message")] oneshot::Sender<()>,
    );

    impl<S> Watched<S> {
        pub(super) fn new(stream: S) -> (Self, oneshot::Receiver<()>) {
            let (alive, ended) = oneshot::channel();
            (Self(stream, alive), ended)
        }
    }

    impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }
}
