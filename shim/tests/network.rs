//! The pod's network end to end, in network namespaces made for each test: a veth pair between a
//! "network" and a "pod", the mirror, and a guest played by hand on the tap's descriptor.
//! Nothing of the machine's own network is touched. Needs root.

use std::{
    fs::File,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, UdpSocket},
    time::Duration,
};

use futures_util::TryStreamExt;
use rtnetlink::{Handle, LinkUnspec, LinkVeth, RouteMessageBuilder};
use sealpod_shim::ledger::Ledger;
use sealpod_shim::network::{PodNetns, PodNetwork, mac_text};

const POD: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
/// struct virtio_net_hdr, which precedes each frame on a tap with IFF_VNET_HDR.
const VNET_HDR: usize = 10;

/// Without root there are no namespaces to make; says so instead of passing silently.
fn is_root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    root
}

/// A pod's network, its ledger in a folder that lives as long as the test.
async fn pod_network(netns: &PodNetns) -> (PodNetwork, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("tempdir");
    let ledger = Ledger::open(dir.path()).expect("ledger");
    (
        PodNetwork::new(netns.clone(), ledger)
            .await
            .expect("network"),
        dir,
    )
}

async fn netlink(netns: &PodNetns) -> Handle {
    let runtime = tokio::runtime::Handle::current();
    let (connection, handle, _) = netns
        .run(move || {
            let _in_runtime = runtime.enter();
            rtnetlink::new_connection().expect("netlink")
        })
        .await
        .expect("netns");
    tokio::spawn(connection);
    handle
}

async fn index(netlink: &Handle, name: &str) -> u32 {
    let mut links = netlink.link().get().match_name(name).execute();
    let link = links.try_next().await.expect("link").expect("link");
    link.header.index
}

async fn up(netlink: &Handle, index: u32, mtu: u32) {
    let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
    netlink.link().set(message).execute().await.expect("up");
}

/// A veth pair: `eth0` in `pod` and `out0` in `outside`, with addresses, up.
async fn join(outside: &PodNetns, pod: &PodNetns, mtu: u32) {
    let (out, inn) = (netlink(outside).await, netlink(pod).await);
    out.link()
        .add(LinkVeth::new("out0", "eth0").build())
        .execute()
        .await
        .expect("veth");
    let eth0 = index(&out, "eth0").await;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&std::os::fd::AsFd::as_fd(pod));
    let mv = LinkUnspec::new_with_index(eth0).setns_by_fd(fd).build();
    out.link().set(mv).execute().await.expect("move");
    for (netlink, name, address) in [(&out, "out0", OUTSIDE), (&inn, "eth0", POD)] {
        let index = index(netlink, name).await;
        up(netlink, index, mtu).await;
        netlink
            .address()
            .add(index, IpAddr::V4(address), 24)
            .execute()
            .await
            .expect("address");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_cross_the_mirror_both_ways_and_the_host_stack_stays_silent() {
    if !is_root() {
        return;
    }
    let (outside, pod) = (
        PodNetns::create().await.expect("netns"),
        PodNetns::create().await.expect("netns"),
    );
    join(&outside, &pod, 1400).await;
    let (mut network, _dir) = pod_network(&pod).await;
    let mut nics = network.attach().await.expect("attach");
    assert_eq!(nics.len(), 1);
    let nic = nics.remove(0);
    assert_eq!(nic.mtu, Some(1400));

    let guest = Guest {
        tap: nic.tap.into(),
        mac: nic.mac,
    };
    std::thread::spawn(move || guest.echo_udp());
    let answer = outside
        .run(|| {
            let socket = UdpSocket::bind((OUTSIDE, 0)).expect("bind");
            socket
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("timeout");
            // Port 9 is nobody's: had the host's stack seen this, it would refuse the connection.
            socket.connect((POD, 9)).expect("connect");
            socket.send(b"hello through the mirror").expect("send");
            let mut answer = [0; 64];
            let n = socket.recv(&mut answer).expect("an answer from the guest");
            answer[..n].to_vec()
        })
        .await
        .expect("netns");
    assert_eq!(answer, b"hello through the mirror");

    network.detach().await.expect("detach");
    network.detach().await.expect("a second time");
}

#[tokio::test(flavor = "multi_thread")]
async fn guest_is_told_of_addresses_routes_neighbours_and_mtu() {
    if !is_root() {
        return;
    }
    let (outside, pod) = (
        PodNetns::create().await.expect("netns"),
        PodNetns::create().await.expect("netns"),
    );
    join(&outside, &pod, 1400).await;
    let n = netlink(&pod).await;
    let eth0 = index(&n, "eth0").await;
    let v6: IpAddr = "fd00:9::2".parse().expect("ip");
    n.address()
        .add(eth0, v6, 64)
        .execute()
        .await
        .expect("address");
    let default = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(OUTSIDE)
        .output_interface(eth0)
        .priority(7)
        .build();
    n.route().add(default).execute().await.expect("route");
    let far = RouteMessageBuilder::<Ipv4Addr>::new()
        .destination_prefix(Ipv4Addr::new(192, 0, 2, 0), 24)
        .gateway(Ipv4Addr::new(169, 254, 1, 1))
        .pref_source(POD)
        .output_interface(eth0)
        .onlink()
        .build();
    n.route().add(far).execute().await.expect("route");
    let other_table = RouteMessageBuilder::<Ipv4Addr>::new()
        .gateway(OUTSIDE)
        .output_interface(eth0)
        .table_id(100)
        .build();
    n.route().add(other_table).execute().await.expect("route");
    n.neighbours()
        .add(eth0, OUTSIDE.into())
        .link_layer_address(&[2, 0, 0, 0, 0, 1])
        .execute()
        .await
        .expect("neighbour");

    let (mut network, _dir) = pod_network(&pod).await;
    let nics = network.attach().await.expect("attach");
    let given = network.to_proto();
    assert_eq!(given.interfaces.len(), 1);
    let i = &given.interfaces[0];
    assert_eq!(
        (i.name.as_str(), i.mtu, i.position, i.noarp),
        ("eth0", 1400, 0, false)
    );
    assert_eq!(i.hardware_address, mac_text(nics[0].mac));
    assert_eq!(i.addresses, ["10.9.0.2/24", "fd00:9::2/64"]);
    let route = |d: &str| {
        given
            .routes
            .iter()
            .find(|r| r.destination == d)
            .unwrap_or_else(|| panic!("no {d}"))
    };
    assert_eq!(given.routes.len(), 2, "{:?}", given.routes);
    let default = route("0.0.0.0/0");
    assert_eq!(
        (
            default.gateway.as_str(),
            default.interface.as_str(),
            default.metric
        ),
        ("10.9.0.1", "eth0", 7)
    );
    let far = route("192.0.2.0/24");
    assert_eq!(
        (far.gateway.as_str(), far.source.as_str(), far.onlink),
        ("169.254.1.1", "10.9.0.2", true)
    );
    assert_eq!(given.neighbours.len(), 1);
    let neighbour = &given.neighbours[0];
    assert_eq!(
        (
            neighbour.address.as_str(),
            neighbour.hardware_address.as_str()
        ),
        ("10.9.0.1", "02:00:00:00:00:01")
    );

    let again = network.update().await.expect("update");
    assert!(
        again.network.is_none() && again.added.is_empty(),
        "nothing changed: {again:?}"
    );
    network.detach().await.expect("detach");
}

#[tokio::test(flavor = "multi_thread")]
async fn spare_nic_is_joined_to_an_interface_that_comes_later() {
    if !is_root() {
        return;
    }
    let (outside, pod) = (
        PodNetns::create().await.expect("netns"),
        PodNetns::create().await.expect("netns"),
    );
    let (mut network, _dir) = pod_network(&pod).await;
    let mut nics = network.attach().await.expect("attach");
    assert_eq!((nics.len(), nics[0].mtu), (1, None));
    assert!(network.to_proto().interfaces.is_empty());

    join(&outside, &pod, 1500).await;
    let update = network.update().await.expect("update");
    assert!(update.added.is_empty());
    let given = update.network.expect("a network");
    assert_eq!(
        (given.interfaces.len(), given.interfaces[0].position),
        (1, 0)
    );
    assert_ne!(given.interfaces[0].hardware_address, mac_text(nics[0].mac));

    // A second interface needs a NIC of its own.
    let n = netlink(&pod).await;
    n.link()
        .add(LinkVeth::new("net1", "far1").build())
        .execute()
        .await
        .expect("veth");
    let net1 = index(&n, "net1").await;
    up(&n, net1, 1500).await;
    let update = network.update().await.expect("update");
    assert_eq!(update.added.len(), 1);
    assert_eq!(update.network.expect("a network").interfaces[1].position, 1);

    // When it goes, its NIC is free again.
    n.link().del(net1).execute().await.expect("del");
    let update = network.update().await.expect("update");
    assert_eq!(update.network.expect("a network").interfaces.len(), 1);

    let guest = Guest {
        tap: nics.remove(0).tap.into(),
        mac: parse_mac(&given.interfaces[0].hardware_address),
    };
    std::thread::spawn(move || guest.echo_udp());
    let answered = outside
        .run(|| {
            let socket = UdpSocket::bind((OUTSIDE, 0)).expect("bind");
            socket
                .set_read_timeout(Some(Duration::from_secs(20)))
                .expect("timeout");
            socket.send_to(b"late", (POD, 9)).expect("send");
            socket.recv(&mut [0; 8]).expect("an answer")
        })
        .await
        .expect("netns");
    assert_eq!(answered, 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn interface_works_in_the_namespace_again_after_detach() {
    if !is_root() {
        return;
    }
    let (outside, pod) = (
        PodNetns::create().await.expect("netns"),
        PodNetns::create().await.expect("netns"),
    );
    join(&outside, &pod, 1500).await;
    let (mut network, _dir) = pod_network(&pod).await;
    let nics = network.attach().await.expect("attach");
    // The interface is taken: another pod is refused, and its clean-up takes nothing away.
    let (mut rival, _dir3) = pod_network(&pod).await;
    assert!(rival.attach().await.is_err(), "taken twice");
    rival.detach().await.expect("nothing to detach");
    assert!(rival.attach().await.is_err(), "still taken");
    drop((rival, nics));
    network.detach().await.expect("detach");
    // The tap went with its descriptor, the qdisc with detach: a second pod can take the namespace.
    // It dies without detaching; what it wrote down is enough to clean up, any number of times.
    let by_path = PodNetns::open(&pod.path()).await.expect("open");
    let (mut second, dir2) = pod_network(&by_path).await;
    drop(second.attach().await.expect("attach again"));
    drop(second);
    for _ in 0..2 {
        let report = sealpod_shim::ledger::clean(dir2.path());
        assert!(report.is_clean(), "{report:?}");
    }
    let server = pod
        .run(|| UdpSocket::bind((POD, 9)).expect("bind"))
        .await
        .expect("netns");
    server
        .set_read_timeout(Some(Duration::from_secs(20)))
        .expect("timeout");
    outside
        .run(|| {
            UdpSocket::bind((OUTSIDE, 0))
                .expect("bind")
                .send_to(b"host", (POD, 9))
                .expect("send");
        })
        .await
        .expect("netns");
    assert_eq!(
        server
            .recv(&mut [0; 8])
            .expect("received by the host's stack"),
        4
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn interface_that_no_vm_can_have_is_refused_by_name() {
    if !is_root() {
        return;
    }
    let pod = PodNetns::create().await.expect("netns");
    let tun = pod
        .run(|| {
            // A tap of somebody else.
            let status = std::process::Command::new("ip")
                .args(["tuntap", "add", "foreign0", "mode", "tap"])
                .status();
            let up = std::process::Command::new("ip")
                .args(["link", "set", "foreign0", "up"])
                .status();
            status.is_ok_and(|s| s.success()) && up.is_ok_and(|s| s.success())
        })
        .await
        .expect("netns");
    if !tun {
        eprintln!("SKIPPED: `ip` is not installed");
        return;
    }
    let (mut network, _dir) = pod_network(&pod).await;
    let error = network
        .attach()
        .await
        .expect_err("a foreign tap")
        .to_string();
    assert!(
        error.starts_with("Interface foreign0 (kind `tun`) cannot be given to a VM"),
        "{error}"
    );
}

/// Plays the guest: answers ARP for POD and echoes UDP, until the tap is closed.
struct Guest {
    tap: File,
    mac: [u8; 6],
}

impl Guest {
    fn echo_udp(mut self) {
        let mut buffer = [0; 65536];
        loop {
            let mut ready = [nix::poll::PollFd::new(
                std::os::fd::AsFd::as_fd(&self.tap),
                nix::poll::PollFlags::POLLIN,
            )];
            if nix::poll::poll(&mut ready, 20_000_u16).is_err() {
                return;
            }
            let Ok(n) = self.tap.read(&mut buffer) else {
                return;
            };
            let Some(answer) = answer(self.mac, &buffer[VNET_HDR..n]) else {
                continue;
            };
            let mut frame = vec![0; VNET_HDR];
            frame.extend(answer);
            if self.tap.write_all(&frame).is_err() {
                return;
            }
        }
    }
}

fn answer(mac: [u8; 6], frame: &[u8]) -> Option<Vec<u8>> {
    let (ethernet, payload) = frame.split_at_checked(14)?;
    let mut out = Vec::new();
    out.extend(&ethernet[6..12]);
    out.extend(mac);
    out.extend(&ethernet[12..14]);
    match ethernet[12..14] {
        // ARP request for POD.
        [8, 6] if payload[6..8] == [0, 1] && payload[24..28] == POD.octets() => {
            out.extend([0, 1, 8, 0, 6, 4, 0, 2]);
            out.extend(mac);
            out.extend(POD.octets());
            out.extend(&payload[8..18]);
            Some(out)
        }
        // UDP over IPv4: addresses and ports swapped, which keeps the header's checksum; a UDP
        // checksum of 0 means none.
        [8, 0] if payload[9] == 17 => {
            let mut packet = payload.to_vec();
            packet[12..16].copy_from_slice(&payload[16..20]);
            packet[16..20].copy_from_slice(&payload[12..16]);
            packet[20..22].copy_from_slice(&payload[22..24]);
            packet[22..24].copy_from_slice(&payload[20..22]);
            packet[26..28].fill(0);
            out.extend(packet);
            Some(out)
        }
        _ => None,
    }
}

fn parse_mac(text: &str) -> [u8; 6] {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|b| u8::from_str_radix(b, 16).expect("hex"))
        .collect();
    bytes.try_into().expect("six bytes")
}
