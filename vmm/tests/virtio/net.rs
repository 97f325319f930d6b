//! The network device with a real tap, in a network namespace that each test has to itself. Skips,
//! loudly, where none can be made.
#![expect(
    unsafe_code,
    reason = "namespaces, taps and packet sockets have no safe wrappers here"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use sealpod_vmm::virtio::{Device, Error, Net, NetConfig};

use crate::driver::{Machine, Random, VERSION_1, private_memory};

const RX: usize = 0;
const TX: usize = 1;
/// Bytes of the header before each frame.
const HEADER: usize = 12;
const MRG_RXBUF: u64 = 1 << 15;
/// Everything that would let the kernel leave work to the guest.
const GUEST_OFFLOADS: u64 = 1 << 1 | 1 << 7 | 1 << 8 | 1 << 9;

pub(crate) const CONFIG: NetConfig = NetConfig {
    mac: [2, 0, 0, 0, 0, 9],
    mtu: 1500,
};

fn ok(result: i32) -> i32 {
    assert!(result >= 0, "{}", std::io::Error::last_os_error());
    result
}

/// A tap in a network namespace of the calling thread, with so many queues, and a socket on the
/// host's side of it.
pub(crate) struct Wire {
    taps: Vec<OwnedFd>,
    host: File,
}

fn ifreq(name: &[u8], flags: i32) -> libc::ifreq {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

impl Wire {
    fn new(queues: usize) -> Option<Self> {
        // SAFETY: no pointers are passed; only this thread changes its namespace.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            eprintln!("SKIPPED: needs a network namespace of its own (root)");
            return None;
        }
        let tun = || File::options().read(true).write(true).open("/dev/net/tun");
        let Ok(_) = tun() else {
            eprintln!("SKIPPED: needs /dev/net/tun");
            return None;
        };
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let taps = (0..queues).map(|_| {
            let tap = tun().unwrap();
            let request = ifreq(b"tap0", flags);
            // SAFETY: `request` is an ifreq that outlives the call (TUNSETIFF).
            ok(unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, &raw const request) });
            OwnedFd::from(tap)
        });
        let taps: Vec<OwnedFd> = taps.collect();
        std::fs::write(
            "/proc/thread-self/root/proc/sys/net/ipv6/conf/tap0/disable_ipv6",
            "1",
        )
        .ok();
        // SAFETY: no pointers are passed; the descriptor is new.
        let socket =
            unsafe { File::from_raw_fd(ok(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0))) };
        let request = ifreq(b"tap0", libc::IFF_UP);
        // SAFETY: `request` is an ifreq that outlives the call.
        ok(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) });
        let mut request = ifreq(b"tap0", 0);
        // SAFETY: as above; the kernel writes the index into it, which is read as such.
        let index = unsafe {
            ok(libc::ioctl(
                socket.as_raw_fd(),
                libc::SIOCGIFINDEX,
                &raw mut request,
            ));
            request.ifr_ifru.ifru_ifindex
        };
        let one: libc::c_int = 1;
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: pointers and lengths are those of `one` and `address`.
        unsafe {
            let size = size_of::<libc::c_int>() as u32;
            let option = (&raw const one).cast();
            let fd = socket.as_raw_fd();
            ok(libc::setsockopt(
                fd,
                libc::SOL_PACKET,
                15, /* PACKET_VNET_HDR */
                option,
                size,
            ));
            let size = size_of::<libc::sockaddr_ll>() as u32;
            ok(libc::bind(fd, (&raw const address).cast(), size));
        }
        Some(Self { taps, host: socket })
    }

    /// Runs `test` with a wire in a thread of its own, and so in a namespace of its own.
    pub(crate) fn with(queues: usize, test: impl FnOnce(Vec<OwnedFd>, File) + Send) {
        std::thread::scope(|scope| {
            let run = || {
                if let Some(wire) = Self::new(queues) {
                    test(wire.taps, wire.host);
                }
            };
            scope.spawn(run).join().unwrap();
        });
    }
}

/// Has the host send a frame, with the header of a packet socket (10 bytes).
pub(crate) fn send(mut host: &File, header: &[u8; 10], frame: &[u8]) {
    host.write_all(&[header, frame].concat()).unwrap();
}

/// Throws away what the host has seen.
pub(crate) fn drain(host: &File) {
    let mut frame = [0_u8; 64];
    // SAFETY: pointer and length are those of `frame`.
    while unsafe {
        let flags = libc::MSG_DONTWAIT;
        libc::recv(
            host.as_raw_fd(),
            frame.as_mut_ptr().cast(),
            frame.len(),
            flags,
        ) >= 0
    } {}
}

/// What the host sees next, without that header.
pub(crate) fn seen(mut host: &File) -> Vec<u8> {
    let mut frame = vec![0; 1 << 17];
    let length = host.read(&mut frame).unwrap();
    frame[10..length].to_vec()
}

/// An Ethernet frame of a local experimental type.
pub(crate) fn frame(payload: &[u8]) -> Vec<u8> {
    [
        &[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 0x88, 0xb5][..],
        payload,
    ]
    .concat()
}

/// A TCP segment over IPv4 of any length, to be cut up by whoever sends it on: header for a packet
/// socket, and frame.
fn segmented(payload: &[u8]) -> ([u8; 10], Vec<u8>) {
    let total = (40 + payload.len()) as u16;
    let mut ip = vec![
        0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum: u32 = ip
        .chunks(2)
        .map(|c| u32::from(u16::from_be_bytes([c[0], c[1]])))
        .sum();
    let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    let mut tcp = vec![0; 20];
    tcp[..4].copy_from_slice(&[0x10, 0, 0x20, 0]);
    (tcp[12], tcp[13]) = (5 << 4, 0x10);
    let ethernet = [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0];
    let frame = [&ethernet[..], &ip, &tcp, payload].concat();
    // needs a checksum; TCP over IPv4; 54 bytes of headers; segments of 1448; checksum at 34 + 16
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0], frame)
}

fn refill(guest: &mut Machine<Net>, count: usize, size: u32) {
    for _ in 0..count {
        guest.offer(RX, &[], &[size]);
    }
}

#[test]
fn frames_go_both_ways_unchanged() {
    Wire::with(1, |taps, host| {
        let mut guest = Machine::new(Net::new(taps, CONFIG).unwrap());
        refill(&mut guest, 64, 2048);
        guest.kick(RX);
        guest.run();
        guest.interrupts(RX);
        let mut random = Random(5);
        for length in [46, 100, 1486] {
            let sent = frame(&random.bytes(length));
            send(&host, &[0; 10], &sent);
            guest.run();
            let (_, got) = guest.done(RX).unwrap();
            assert_eq!(got[10..HEADER], [1, 0], "number of buffers");
            assert_eq!(got[HEADER..], sent);
            assert_eq!(guest.interrupts(RX), 1);

            let sent = frame(&random.bytes(length));
            guest.ask(TX, &[&[0; HEADER], &sent[..9], &sent[9..]], &[]);
            while seen(&host) != sent {} // the host also sees what it sent itself
        }
    });
}

#[test]
fn a_segmented_frame_takes_as_many_buffers_as_it_needs() {
    Wire::with(1, |taps, host| {
        let mut guest = Machine::new(Net::new(taps, CONFIG).unwrap());
        refill(&mut guest, 60, 1536);
        guest.kick(RX);
        guest.run();
        guest.interrupts(RX);
        let (header, sent) = segmented(&Random(6).bytes(60_000));
        send(&host, &header, &sent);
        guest.run();
        let (_, first) = guest.done(RX).unwrap();
        let count = u16::from_le_bytes([first[10], first[11]]);
        assert_eq!(usize::from(count), (HEADER + sent.len()).div_ceil(1536));
        assert_eq!(first[1], 1, "TCP over IPv4");
        let mut got = first[HEADER..].to_vec();
        for _ in 1..count {
            got.extend(guest.done(RX).unwrap().1);
        }
        // The checksum's place holds what of it is known, which is the kernel's affair.
        assert!(got.len() == sent.len() && got[54..] == sent[54..]);
        assert_eq!(guest.interrupts(RX), 1);
        // What was taken and not needed was put back: the next frame finds it.
        send(&host, &[0; 10], &frame(&[7; 50]));
        refill(&mut guest, 40, 1536);
        guest.kick(RX);
        guest.run();
        assert_eq!(guest.done(RX).unwrap().1[HEADER..], frame(&[7; 50]));
    });
}

#[test]
fn a_guest_that_segments_nothing_is_given_small_frames() {
    Wire::with(1, |taps, host| {
        let net = Net::new(taps, CONFIG).unwrap();
        let features = net.features() & !GUEST_OFFLOADS & !MRG_RXBUF;
        let mut guest = Machine::with(net, features, private_memory());
        refill(&mut guest, 64, 1600);
        guest.kick(RX);
        guest.run();
        let (header, sent) = segmented(&[3; 20_000]);
        send(&host, &header, &sent);
        guest.run();
        let mut bytes = 0;
        while let Some((_, got)) = guest.done(RX) {
            assert!(got.len() <= HEADER + 1514);
            assert_eq!((got[0], got[1]), (0, 0), "nothing is left to the guest");
            bytes += got.len() - HEADER - 54;
        }
        assert_eq!(bytes, 20_000);
    });
}

#[test]
fn frames_wait_while_the_guest_has_no_room_and_come_when_it_has() {
    Wire::with(1, |taps, host| {
        let mut guest = Machine::new(Net::new(taps, CONFIG).unwrap());
        for n in 0..10 {
            send(&host, &[0; 10], &frame(&[n; 60]));
        }
        guest.run();
        assert!(guest.done(RX).is_none());
        refill(&mut guest, 80, 2048);
        guest.kick(RX);
        guest.run();
        for n in 0..10 {
            assert_eq!(guest.done(RX).unwrap().1[HEADER..], frame(&[n; 60]));
        }
    });
}

#[test]
fn buffers_too_small_for_a_frame_cost_that_frame_only() {
    Wire::with(1, |taps, host| {
        let net = Net::new(taps, CONFIG).unwrap();
        let features = net.features() & !MRG_RXBUF;
        let mut guest = Machine::with(net, features, private_memory());
        guest.offer(RX, &[], &[100]);
        guest.kick(RX);
        guest.run();
        send(&host, &[0; 10], &frame(&[1; 200]));
        send(&host, &[0; 10], &frame(&[2; 60]));
        guest.run();
        assert_eq!(guest.done(RX).unwrap().1[HEADER..], frame(&[2; 60]));
    });
}

#[test]
fn senseless_frames_of_the_guest_are_lost_and_nothing_else() {
    Wire::with(1, |taps, host| {
        let mut guest = Machine::new(Net::new(taps, CONFIG).unwrap());
        let mut random = Random(8);
        for _ in 0..40 {
            let length = random.below(3000) as usize;
            let mut packet = random.bytes(length);
            if random.below(2) == 0 {
                packet.splice(0..packet.len().min(HEADER), [0; HEADER]);
            }
            guest.ask(TX, &[&packet], &[]);
        }
        guest.ask(TX, &[], &[64]); // nothing to send, but room
        let last = frame(b"a good one, long enough to be a frame of its own");
        guest.ask(TX, &[&[0; HEADER], &last], &[]);
        while seen(&host) != last {}
    });
}

#[test]
fn queue_pairs_are_used_as_the_driver_asks() {
    Wire::with(4, |taps, host| {
        let mut guest = Machine::new(Net::new(taps, CONFIG).unwrap());
        let control = 8;
        let mut config = [0; 12];
        guest.device().read_config(0, &mut config);
        assert_eq!(config, [2, 0, 0, 0, 0, 9, 0, 0, 4, 0, 0xdc, 5]);
        for (message, answer) in [
            (&[4, 0, 4, 0][..], 0),
            (&[4, 0, 0, 0], 1),
            (&[4, 0, 5, 0], 1),
            (&[4, 0, 255, 255], 1),
            (&[4, 1, 1, 0], 1),
            (&[0, 0, 1, 0], 1),
            (&[4, 0, 1], 1),
            (&[], 1),
            (&[4, 0, 2, 0], 0),
        ] {
            let answered = guest.ask(control, &[message], &[1]);
            assert_eq!(answered, [answer], "{message:?}");
        }
        let sent = frame(b"through the second pair, to be seen by the host");
        guest.ask(3, &[&[0; HEADER], &sent], &[]);
        while seen(&host) != sent {}
        // With one pair, every frame arrives in the first.
        assert_eq!(guest.ask(control, &[&[4, 0, 1, 0]], &[1]), [0]);
        refill(&mut guest, 120, 2048);
        guest.kick(RX);
        for n in 0..50 {
            send(&host, &[0; 10], &frame(&[n; 60]));
        }
        guest.run();
        for n in 0..50 {
            assert_eq!(guest.done(RX).unwrap().1[HEADER..], frame(&[n; 60]));
        }
    });
}

#[test]
fn a_restarted_guest_and_a_moved_one_have_a_network() {
    Wire::with(1, |taps, host| {
        let copies = taps.iter().map(|tap| tap.try_clone().unwrap()).collect();
        let mut guest = Machine::new(Net::new(taps, CONFIG).unwrap());
        guest.reboot();
        refill(&mut guest, 60, 2048);
        guest.kick(RX);
        guest.run();
        send(&host, &[0; 10], &frame(&[1; 60]));
        guest.run();
        assert_eq!(guest.done(RX).unwrap().1[HEADER..], frame(&[1; 60]));
        let mut guest = guest.moved_to(Net::new(copies, CONFIG).unwrap());
        assert!(guest.told.queues[RX].load(Ordering::SeqCst) > 0);
        send(&host, &[0; 10], &frame(&[2; 60]));
        guest.run();
        assert_eq!(guest.done(RX).unwrap().1[HEADER..], frame(&[2; 60]));
    });
}

#[test]
fn what_cannot_be_a_network_device_is_refused() {
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(matches!(
        Net::new(vec![null()], CONFIG),
        Err(Error::Resource { .. })
    ));
    assert!(matches!(
        Net::new(vec![], CONFIG),
        Err(Error::Configuration(_))
    ));
    let many = (0..17).map(|_| null()).collect();
    assert!(matches!(
        Net::new(many, CONFIG),
        Err(Error::Configuration(_))
    ));
    let config = NetConfig { mtu: 67, ..CONFIG };
    assert!(matches!(
        Net::new(vec![null()], config),
        Err(Error::Configuration(_))
    ));
}

#[test]
fn offloads_that_contradict_each_other_are_survived() {
    Wire::with(1, |taps, _host| {
        let net = Net::new(taps, CONFIG).unwrap();
        let mut guest = Machine::stopped(net, private_memory());
        for offloads in [1 << 9, 1 << 7, 1 << 1 | 1 << 9, GUEST_OFFLOADS, u64::MAX] {
            guest.start(VERSION_1 | offloads).unwrap();
            guest.device().reset();
        }
    });
}
