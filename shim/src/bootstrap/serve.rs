//! `serve`: the process that owns a pod, from the first request to the last.

use std::{
    fs::File,
    io,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    sync::Arc,
};

use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::{Server, transport::Listener};

use super::{Args, Error, Place, abandoned};
use crate::{
    mount,
    pod::{Identity, Pod},
    service,
};

/// Where `start` leaves the listening socket.
pub(super) const LISTENER_FD: i32 = 3;
/// Where it leaves what tells the end of its caller.
pub(super) const CALLER_FD: i32 = 4;
/// Threads that wait for blocking calls (mounts, name space changes); they end when idle.
const BLOCKING_THREADS: usize = 8;
/// For the reply to the request that ends this process.
const LAST_REPLY: std::time::Duration = std::time::Duration::from_millis(100);
/// Stack of the runtime's threads, bytes. Small: the process is there once for each pod.
const STACK: usize = 512 << 10;

/// What `start` has left at `number`. To be called once for each, before anything is opened.
#[expect(unsafe_code, reason = "takes over a descriptor by number")]
fn inherited(number: i32) -> io::Result<OwnedFd> {
    nix::fcntl::fcntl(
        // SAFETY: only borrowed for the check that the descriptor is open.
        unsafe { std::os::fd::BorrowedFd::borrow_raw(number) },
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC),
    )?;
    // SAFETY: `start` put it there, it is open (checked above) and nobody else in this process knows the
    // number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// All threads allocate from one heap: the process is there once for each pod, most of its threads wait,
/// and a heap for each of them is memory that no other thread uses. A child between clone and exec never
/// allocates (`child/exec.rs`), so that it does not matter who holds the heap's lock then.
#[expect(unsafe_code, reason = "the C library's allocator is told by mallopt")]
fn one_heap() {
    // SAFETY: takes numbers; there are no other threads yet. Refused it changes nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

pub(super) fn serve(args: &Args) -> Result<(), Error> {
    one_heap();
    let listener = inherited(LISTENER_FD).map_err(Error::io("take over the shim's socket"))?;
    let caller = inherited(CALLER_FD).map_err(Error::io("take over the caller's handle"))?;
    init_log(args.debug);
    mount::private_namespace().map_err(Error::io("make mounts private"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .thread_stack_size(STACK)
        .build()
        .map_err(Error::io("start the runtime"))?;
    let done = runtime.block_on(serve_pod(args, listener.into(), caller));
    // What still runs on blocking threads has nothing left to say.
    runtime.shutdown_background();
    done
}

async fn serve_pod(args: &Args, listener: UnixListener, caller: OwnedFd) -> Result<(), Error> {
    let events =
        std::env::var("TTRPC_ADDRESS").unwrap_or_else(|_| format!("{}.ttrpc", args.address));
    let place = Place::of(&args.socket);
    let identity = Identity {
        namespace: args.namespace.clone(),
        id: args.id.clone(),
        bundle: args.bundle.clone(),
        place,
    };
    let pod = Pod::new(identity, &events).map_err(|e| Error::Io {
        doing: "open the pod's ledger".into(),
        source: io::Error::other(crate::error::chain(&e)),
    })?;
    listener
        .set_nonblocking(true)
        .map_err(Error::io("prepare the shim's socket"))?;
    let listener = tokio::net::UnixListener::from_std(listener)
        .map_err(Error::io("prepare the shim's socket"))?;
    let accepted = futures_util::stream::unfold(listener, |l| async move {
        let stream = l.accept().await.map(|(s, _)| s);
        Some((stream, l))
    });
    let mut server = Server::new()
        .add_listener(Listener::new(accepted))
        .register_service(service::all(&pod));
    server.start().await.map_err(|e| Error::Io {
        doing: "serve".into(),
        source: io::Error::other(e),
    })?;
    tokio::spawn(abandoned::end_if_abandoned(Arc::clone(&pod), caller));
    // A restart of containerd, or a terminal that goes, is no reason to end somebody's pod.
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        let mut signals = signal(kind).map_err(Error::io("watch signals"))?;
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!("Signal ignored: a pod ends by its tasks, not by its shim");
            }
        });
    }
    pod.finished().await;
    // ttrpc says nothing of replies that are written; the one to `Shutdown` itself is under way.
    tokio::time::sleep(LAST_REPLY).await;
    if let Err(e) = server.shutdown().await {
        tracing::debug!("{e}");
    }
    pod.publisher().flush().await;
    Ok(())
}

/// Lines on standard error, which is containerd's log pipe. A full pipe loses lines; it never blocks.
fn init_log(debug: bool) {
    struct Lossy(Arc<File>);
    impl io::Write for Lossy {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            // Lost lines are the price of not blocking on a reader that may be gone.
            let _ = (&*self.0).write(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let Ok(stderr) = nix::unistd::dup(io::stderr()) else {
        return;
    };
    let file = Arc::new(File::from(stderr));
    let level = if debug {
        tracing::Level::DEBUG
    } else {
        tracing::Level::INFO
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false)
        .with_writer(move || Lossy(Arc::clone(&file)));
    // Only fails when a logger exists, which would do as well.
    let _ = log.try_init();
}
