//! Port forwarding, in a network namespace made for the test, with the guest's ports played by the
//! test. Needs root.

use std::{future::Future, net::SocketAddr};

use sealpod_shim::{
    ledger::Ledger,
    network::{
        PodNetns, PodNetwork,
        portforward::{MAX_CONNECTIONS, PortForward},
    },
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// A guest's TCP ports, as the agent would serve them: port 80 echoes, all others refuse.
async fn guest_port(port: u16) -> std::io::Result<tokio::net::UnixStream> {
    if port != 80 {
        return Err(std::io::ErrorKind::ConnectionRefused.into());
    }
    let (host, mut guest) = tokio::net::UnixStream::pair()?;
    tokio::spawn(async move {
        let mut all = Vec::new();
        // Reads up to the client's half-close before it answers: both halves must work alone.
        guest.read_to_end(&mut all).await?;
        guest.write_all(&all).await
    });
    Ok(host)
}

/// A namespace with its loopback up; none without root, and says so.
async fn pod() -> Option<PodNetns> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return None;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let ledger = Ledger::open(dir.path()).expect("ledger");
    let netns = PodNetns::create().await.expect("netns");
    let network = PodNetwork::new(netns, ledger).await.expect("network");
    Some(network.netns().clone())
}

async fn in_netns<T: Send + 'static, D: Future<Output = T>>(
    netns: &PodNetns,
    f: impl FnOnce() -> D + Send + 'static,
) -> T {
    netns
        .run(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("runtime");
            runtime.block_on(f())
        })
        .await
        .expect("netns")
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_to_the_namespaces_loopback_ends_in_the_guest() {
    let Some(pod) = pod().await else { return };
    let forward = PortForward::start(&pod, guest_port).await.expect("forward");
    for address in ["127.0.0.1:80", "[::1]:80"] {
        let address: SocketAddr = address.parse().expect("address");
        let echoed = in_netns(&pod, move || async move {
            let mut stream = tokio::net::TcpStream::connect(address).await?;
            stream.write_all(&vec![b'x'; 300_000]).await?;
            stream.shutdown().await?;
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await?;
            std::io::Result::Ok(all.len())
        })
        .await
        .expect("echo");
        assert_eq!(echoed, 300_000, "{address}");
    }
    let refused = in_netns(&pod, || async {
        let mut stream = tokio::net::TcpStream::connect("127.0.0.1:81").await?;
        stream.read(&mut [0; 1]).await
    })
    .await
    .expect_err("nobody listens in the guest");
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionReset);

    drop(forward);
    let after = in_netns(&pod, || tokio::net::TcpStream::connect("127.0.0.1:80")).await;
    assert_eq!(
        after.expect_err("no longer steered").kind(),
        std::io::ErrorKind::ConnectionRefused
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_above_the_limit_are_reset_and_the_others_live() {
    let Some(pod) = pod().await else { return };
    // Both ends of every connection, and of every stream to the guest, are in this process.
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files).expect("limit");
    nix::sys::resource::setrlimit(files, most, most).expect("descriptors");
    let _forward = PortForward::start(&pod, guest_port).await.expect("forward");
    in_netns(&pod, || async {
        let connect = || tokio::net::TcpStream::connect("127.0.0.1:80");
        let mut open = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            open.push(connect().await.expect("connect"));
        }
        // Accepted in order, so this one finds every place taken.
        let mut above = connect().await.expect("connect");
        let error = above.read(&mut [0; 1]).await.expect_err("above the limit");
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

        for mut stream in open {
            stream.write_all(b"still here").await.expect("write");
            stream.shutdown().await.expect("shutdown");
            let mut all = Vec::new();
            stream.read_to_end(&mut all).await.expect("read");
            assert_eq!(all, b"still here");
        }
    })
    .await;
}
