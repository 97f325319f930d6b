//! What containers of a pod have in common.

use sealpod_protocol::agent::{Network, PidNamespace, SetupSandboxRequest};
use sealpod_protocol::streams::{Header, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use super::guest::{Guest, image, soon, spec};
use super::{Failure, Outcome};
use crate::ensure;

pub(crate) async fn containers_of_a_pod_share_one_pid_namespace(guest: &Guest) -> Outcome {
    image(&guest.share().join("c2/rootfs"))?;
    let shared = PidNamespace::PID_POD;
    let sleeper = spec(&["/bin/sh", "-c", "sleep 1111 & read x"]);
    let made = guest.create_with(&sleeper, |r| {
        r.pid_namespace = shared.into();
        r.stdin = true;
    });
    made.await?;
    guest.start_container("c1").await?;
    let ps = spec(&[
        "/bin/sh",
        "-c",
        "until ps | grep -q '[s]leep 1111'; do :; done; ps",
    ]);
    let made = guest.create_with(&ps, |r| {
        r.pid_namespace = shared.into();
        r.container_id = "c2".into();
        r.rootfs = "c2/rootfs".into();
    });
    made.await?;
    guest.start_container("c2").await?;
    let text = guest.read_all("c2", "", Stdio::Stdout).await?;
    ensure!(
        text.contains("sleep 1111") && text.contains("pause"),
        "{text}"
    );
    // The end of its init ends a container, though the namespace lives on.
    guest.kill("", 9, false).await?;
    for stream in [Stdio::Stdout, Stdio::Stderr] {
        guest.read_all("c1", "", stream).await?;
    }
    guest.wait("c1", "").await?;
    guest.delete("c1").await?;
    guest.delete("c2").await?;
    Ok(())
}

async fn in_guest(guest: &Guest, command: &str) -> Result<String, Failure> {
    let pid = guest.pid.to_string();
    let out = Command::new("nsenter")
        .args(["-t", &pid, "-n", "sh", "-c", command])
        .output()
        .await?;
    ensure!(
        out.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(String::from_utf8(out.stdout)?)
}

pub(crate) async fn a_port_of_the_guest_is_reached_through_a_stream(guest: &Guest) -> Outcome {
    guest
        .agent
        .configure_network(soon(), &Network::new())
        .await?;
    let server = spec(&["/bin/sh", "-c", "echo listening; nc -l -p 8080 -e cat"]);
    guest.create(&server).await?;
    guest.start_container("c1").await?;
    let refused = guest
        .stream(&Header::Tcp { port: 9 })
        .await
        .err()
        .ok_or("port 9 is open")?;
    ensure!(
        refused
            .to_string()
            .contains("ERR connect to port 9 of the guest"),
        "{refused}"
    );
    guest
        .sh(
            "e1",
            "until /bin/busybox netstat -ltn | grep -q :8080; do :; done",
        )
        .await?;
    let mut stream = guest.stream(&Header::Tcp { port: 8080 }).await?;
    stream.write_all(b"ping").await?;
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).await?;
    ensure!(&answer == b"ping", "{answer:?}");
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn the_pod_is_set_up_once_and_a_missing_interface_is_named(
    guest: &Guest,
) -> Outcome {
    let sandbox = SetupSandboxRequest {
        hostname: "pod".into(),
        shm_bytes: 1 << 20,
        sysctls: [("net.ipv4.ip_forward".to_owned(), "1".to_owned())].into(),
        entropy: vec![1; 32],
        ..Default::default()
    };
    guest.set_up_sandbox(sandbox.clone()).await?;
    ensure!(guest.set_up_sandbox(sandbox).await.is_err(), "set up twice");
    let text = in_guest(
        guest,
        "ip -o addr show lo; cat /proc/sys/net/ipv4/ip_forward",
    )
    .await?;
    ensure!(
        text.contains("127.0.0.1") && text.ends_with("1\n"),
        "{text}"
    );
    let missing = Network {
        interfaces: vec![sealpod_protocol::agent::Interface {
            hardware_address: "02:00:00:00:00:01".into(),
            name: "eth0".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let error = guest
        .agent
        .configure_network(soon(), &missing)
        .await
        .err()
        .ok_or("no such device")?;
    ensure!(
        error
            .to_string()
            .contains("Interface eth0: no network device"),
        "{error}"
    );
    Ok(())
}
