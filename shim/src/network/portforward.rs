//! TCP connections to the pod's namespace on the host end in the guest.
//!
//! containerd's port-forward (and anything that dials `localhost` after entering the pod's network
//! namespace) looks for servers there, but they run in the guest. A BPF program at the namespace's
//! socket lookup sends every TCP connection to one listener of ours, whatever its port; each is
//! carried to the same port of the guest's loopback. Frames of the pod's interfaces never come here:
//! the mirror takes them first.

use std::{
    future::Future,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::{TcpListener, TcpStream, UnixStream},
    sync::Semaphore,
    task::JoinHandle,
};
use tracing::{debug, warn};

use super::{
    bpf,
    netns::{NetnsError, PodNetns},
};

/// Connections carried at the same time; further ones are reset.
pub const MAX_CONNECTIONS: usize = 256;

/// Why port forwarding is not available.
#[derive(Debug, thiserror::Error)]
pub enum PortForwardError {
    /// No way into the namespace.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// No listening socket.
    #[error("Port forwarding has no listening socket in the pod's network namespace")]
    Listen(#[source] io::Error),
    /// No BPF program.
    #[error(
        "Port forwarding needs BPF programs of type sk_lookup (kernel 5.9 or later, CAP_BPF and CAP_NET_ADMIN)"
    )]
    Bpf(#[source] io::Error),
}

/// Carries connections until it is dropped.
#[derive(Debug)]
pub struct PortForward {
    accepting: JoinHandle<()>,
    _steering: OwnedFd,
}

impl PortForward {
    /// Begins. `dial` opens a stream to a TCP port of the guest's loopback (a `tcp <port>` stream of
    /// the protocol, its answer already read).
    ///
    /// # Errors
    /// [`PortForwardError`]; the pod can live without.
    pub async fn start<F, D>(netns: &PodNetns, dial: F) -> Result<Self, PortForwardError>
    where
        F: Fn(u16) -> D + Send + Sync + 'static,
        D: Future<Output = io::Result<UnixStream>> + Send + 'static,
    {
        let listener = netns
            .run(|| {
                // Accepts both families; where the kernel has no IPv6, the old one alone.
                std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))
                    .or_else(|_| std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)))
            })
            .await?
            .map_err(PortForwardError::Listen)?;
        let steering =
            bpf::steer_tcp(netns.as_fd(), listener.as_fd()).map_err(PortForwardError::Bpf)?;
        listener
            .set_nonblocking(true)
            .map_err(PortForwardError::Listen)?;
        let listener = TcpListener::from_std(listener).map_err(PortForwardError::Listen)?;
        Ok(Self {
            accepting: tokio::spawn(accept(listener, Arc::new(dial))),
            _steering: steering,
        })
    }
}

impl Drop for PortForward {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept<F, D>(listener: TcpListener, dial: Arc<F>)
where
    F: Fn(u16) -> D + Send + Sync + 'static,
    D: Future<Output = io::Result<UnixStream>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let connection = match listener.accept().await {
            Ok((connection, _)) => connection,
            Err(e) => {
                // Out of descriptors or memory, or a client that is gone already.
                warn!(error = %e, "A forwarded connection was not accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            debug!("A forwarded connection was reset: {MAX_CONNECTIONS} are open");
            reset(&connection);
            continue;
        };
        let dial = dial.clone();
        tokio::spawn(async move {
            carry(connection, &*dial).await;
            drop(place);
        });
    }
}

/// One connection, from its acceptance to the end of both directions.
async fn carry<F, D>(mut connection: TcpStream, dial: &F)
where
    F: Fn(u16) -> D,
    D: Future<Output = io::Result<UnixStream>>,
{
    let guest = match connection.local_addr() {
        Ok(address) => dial(address.port()).await,
        Err(e) => Err(e),
    };
    match guest {
        Ok(mut guest) => {
            // Copies an end of file as one, so that either side may close its half first.
            if let Err(e) = tokio::io::copy_bidirectional(&mut connection, &mut guest).await {
                debug!(error = %e, "A forwarded connection broke");
                reset(&connection);
            }
        }
        Err(e) => {
            debug!(error = %e, "The guest did not take a forwarded connection");
            reset(&connection);
        }
    }
}

/// Makes the close that follows a reset.
fn reset(connection: &TcpStream) {
    let _ = nix::sys::socket::setsockopt(
        connection,
        nix::sys::socket::sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 0,
        },
    );
}
