//! Connections: accepted up to a number, each with a time for its handshake, its headers and its whole
//! life. A client that is slow, silent or broken loses its connection and nobody else's.
//!
//! ```text
//!   accept ──▶ address admitted? ──▶ TLS within the time ──▶ requests ──┬─ end ─────────────────────────┐
//!                 └─ no ─▶ closed        └─ no ─▶ closed                ├─ lifetime over: this request  ├─▶ lingers
//!                                                                       └─ draining: this request ──────┘
//! ```

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::limits::Open;
use super::metrics::Cut;
use super::routes;
use super::service::Service;

/// Longest header of a request, and what is read of a body at once.
const BUFFER: usize = 16 << 10;
/// Most header lines.
const MAX_HEADERS: usize = 48;
/// How long a request may go on whose connection should have ended.
const GRACE: Duration = Duration::from_secs(15);
/// How long, and how many bytes, a client may go on sending after its last answer. A connection that is
/// closed with bytes unread is reset, and the answer can be lost with it.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: u64 = 8 << 20;

/// Serves until `stop` says true, then waits for the open connections. Returns how many were still
/// open when the grace was over.
pub(crate) async fn serve(
    listener: TcpListener,
    service: Arc<Service>,
    mut stop: watch::Receiver<bool>,
) -> usize {
    let all = service.config.limits.connections;
    let slots = Arc::new(Semaphore::new(all as usize));
    loop {
        let slot = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            slot = Arc::clone(&slots).acquire_owned() => slot,
        };
        let Ok(slot) = slot else { break };
        let accepted = tokio::select! {
            _ = stop.wait_for(|stop| *stop) => break,
            accepted = listener.accept() => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, as a rule: others must end first.
                eprintln!("sealpod-attest: cannot accept a connection: {error}");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(open) = service.addresses.connect(peer.ip()) else {
            service.metrics.cut(Cut::Address);
            continue;
        };
        let (service, stop) = (Arc::clone(&service), stop.clone());
        tokio::spawn(async move {
            service.metrics.connections.fetch_add(1, Relaxed);
            connection(stream, &service, &open, stop).await;
            service.metrics.connections.fetch_sub(1, Relaxed);
            drop(slot);
        });
    }
    // Others may listen here from now on.
    drop(listener);
    match timeout(GRACE, slots.acquire_many(all)).await {
        Ok(_) => 0,
        Err(_) => all as usize - slots.available_permits(),
    }
}

async fn connection(
    stream: TcpStream,
    service: &Arc<Service>,
    open: &Open,
    mut stop: watch::Receiver<bool>,
) {
    let limits = &service.config.limits;
    let _ = stream.set_nodelay(true);
    let acceptor = TlsAcceptor::from(service.tls());
    let Ok(Ok(mut stream)) = timeout(limits.header_time(), acceptor.accept(stream)).await else {
        service.metrics.cut(Cut::Handshake);
        return;
    };
    let respond = service_fn(|request| async move {
        let answer = routes::answer(service, open, request).await;
        Ok::<_, Infallible>(answer.into_response())
    });
    let ended = {
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.header_time())
            .max_buf_size(BUFFER)
            .max_headers(MAX_HEADERS)
            .serve_connection(TokioIo::new(&mut stream), respond);
        let mut served = pin!(served);
        let ended = tokio::select! {
            ended = served.as_mut() => Some(ended),
            () = sleep(limits.connection_time()) => None,
            _ = stop.wait_for(|stop| *stop) => None,
        };
        match ended {
            Some(ended) => Ok(ended),
            None => {
                served.as_mut().graceful_shutdown();
                timeout(GRACE, served).await
            }
        }
    };
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(_)) => service.metrics.cut(Cut::Request),
        Err(_) => return service.metrics.cut(Cut::Lifetime),
    }
    let (stream, _) = stream.into_inner();
    let _ = timeout(LINGER, linger(stream)).await;
}

/// Reads what a client still sends that has been told that nothing more comes, until it ends or has sent
/// enough. What it is does not matter, nor whether reading fails: the connection is closed in any case.
async fn linger(stream: TcpStream) {
    let _ = tokio::io::copy(&mut stream.take(LINGER_BYTES), &mut tokio::io::sink()).await;
}
