//! The socket device as a transport: what the engine itself does is tested in `tests/vsock`.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use sealpod_vmm::virtio::{Device, Error, Remote, Vsock, Window};
use sealpod_vmm::vsock::{
    Config, Engine, HEADER_LEN, Header, Limits, Op, TYPE_STREAM, VhostUserVsock,
};

use crate::driver::{Machine, Random, private_memory};

const RX: usize = 0;
const TX: usize = 1;
const EVENTS: usize = 2;

pub(crate) fn device(dir: &Path) -> Vsock {
    let config = Config {
        uds: dir.join("vsock.sock"),
        guest_cid: 3,
        limits: Limits::default(),
    };
    Vsock::new(Engine::new(&config).unwrap())
}

/// Offers receive buffers.
pub(crate) fn refill<D: Device>(guest: &mut Machine<D>) {
    for _ in 0..16 {
        guest.offer(RX, &[], &[4096]);
    }
}

/// The next packet for the guest.
fn receive<D: Device>(guest: &mut Machine<D>) -> Option<(Header, Vec<u8>)> {
    let (_, mut packet) = guest.done(RX)?;
    let payload = packet.split_off(HEADER_LEN);
    Some((
        Header::decode(packet.as_slice().try_into().unwrap()),
        payload,
    ))
}

fn send(guest: &mut Machine<Vsock>, to: &Header, op: Op, payload: &[u8]) {
    let header = Header {
        op: op as u16,
        len: payload.len() as u32,
        buf_alloc: 1 << 16,
        ..to.reset()
    };
    guest.ask(TX, &[&header.encode(), payload], &[]);
}

/// A client of port 7 whose connection the guest has accepted.
fn connected(guest: &mut Machine<Vsock>, dir: &Path) -> (UnixStream, Header) {
    let mut client = UnixStream::connect(dir.join("vsock.sock")).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    guest.run();
    let (request, _) = receive(guest).expect("a request for the guest");
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 7));
    send(guest, &request, Op::Response, b"");
    let mut line = [0; 64];
    let count = std::io::Read::read(&mut client, &mut line).unwrap();
    assert!(line[..count].starts_with(b"OK "));
    (client, request)
}

#[test]
fn bytes_go_both_ways_and_the_guest_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Machine::new(device(dir.path()));
    refill(&mut guest);
    let (mut client, name) = connected(&mut guest, dir.path());
    guest.interrupts(RX);
    client.write_all(b"to the guest").unwrap();
    guest.run();
    assert_eq!(receive(&mut guest).unwrap().1, b"to the guest");
    assert_eq!(guest.interrupts(RX), 1);
    send(&mut guest, &name, Op::Rw, b"to the host");
    let mut text = [0; 11];
    std::io::Read::read_exact(&mut client, &mut text).unwrap();
    assert_eq!(&text, b"to the host");
}

#[test]
fn a_client_that_comes_before_the_driver_is_served_when_it_is_up() {
    let dir = tempfile::tempdir().unwrap();
    let device = device(dir.path());
    let mut client = UnixStream::connect(dir.path().join("vsock.sock")).unwrap();
    client.write_all(b"CONNECT 9\n").unwrap();
    let mut guest = Machine::new(device);
    refill(&mut guest);
    guest.kick(RX);
    guest.run();
    assert_eq!(receive(&mut guest).unwrap().0.dst_port, 9);
}

#[test]
fn what_was_sent_right_before_a_reset_arrives_and_then_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut guest = Machine::new(device(dir.path()));
    refill(&mut guest);
    let (mut client, name) = connected(&mut guest, dir.path());
    let header = Header {
        op: Op::Rw as u16,
        len: 4,
        buf_alloc: 1 << 16,
        ..name.reset()
    };
    guest.offer(TX, &[&header.encode(), b"last"], &[]); // never kicked
    guest.reboot();
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut client, &mut text).unwrap();
    assert_eq!(text, b"last");
    refill(&mut guest);
    connected(&mut guest, dir.path());
}

#[test]
fn a_moved_guest_is_told_that_its_connections_are_gone() {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut guest = Machine::new(device(old.path()));
    refill(&mut guest);
    for _ in 0..8 {
        guest.offer(EVENTS, &[], &[4]);
    }
    let (mut client, _) = connected(&mut guest, old.path());
    let mut guest = guest.moved_to(device(new.path()));
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut client, &mut rest).unwrap();
    guest.run();
    assert_eq!(guest.done(EVENTS).unwrap().1, [0; 4]); // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    assert!(guest.interrupts(EVENTS) > 0);
    assert!(guest.done(EVENTS).is_none());
    connected(&mut guest, new.path());
}

#[test]
fn the_configuration_is_the_guests_cid() {
    let dir = tempfile::tempdir().unwrap();
    let mut cid = [0; 8];
    device(dir.path()).read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 3);
}

/// Milliseconds after which something hangs.
const PATIENCE: i32 = 20_000;

/// An engine as the shim has it, and the device with which a VMM shows it.
pub(crate) fn remote(dir: &Path, window: Option<Window>) -> (VhostUserVsock, Remote) {
    let path = dir.join("vhost.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let config = Config {
        uds: dir.join("vsock.sock"),
        guest_cid: 3,
        limits: Limits::default(),
    };
    let engine = VhostUserVsock::start(listener, &config).unwrap();
    let socket = UnixStream::connect(path).unwrap();
    (engine, Remote::vsock(socket, 3, window).unwrap())
}

/// The next packet for the guest, which another thread brings.
fn await_packet(guest: &mut Machine<Remote>) -> (Header, Vec<u8>) {
    loop {
        if let Some(packet) = receive(guest) {
            return packet;
        }
        assert!(guest.events.turn(PATIENCE).unwrap());
    }
}

/// Answers the request of a client of port 7; returns the client.
pub(crate) fn connected_remotely(guest: &mut Machine<Remote>, dir: &Path) -> (UnixStream, Header) {
    let mut client = UnixStream::connect(dir.join("vsock.sock")).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    let (request, _) = await_packet(guest);
    assert_eq!(
        (request.op, request.type_),
        (Op::Request as u16, TYPE_STREAM)
    );
    let response = Header {
        op: Op::Response as u16,
        buf_alloc: 1 << 16,
        ..request.reset()
    };
    guest.offer(TX, &[&response.encode()], &[]);
    guest.kick(TX);
    guest.run();
    let mut line = [0; 3];
    std::io::Read::read_exact(&mut client, &mut line).unwrap();
    assert_eq!(&line, b"OK ");
    (client, request)
}

#[test]
fn an_engine_in_another_process_keeps_its_connections_while_the_guest_is_written_down() {
    let dir = tempfile::tempdir().unwrap();
    let (_engine, device) = remote(dir.path(), None);
    let mut guest = Machine::new(device);
    refill(&mut guest);
    guest.kick(RX);
    let (mut client, _) = connected_remotely(&mut guest, dir.path());
    let saved = guest.device().save().unwrap();
    assert_eq!(saved.queues[TX].next_available, 1);
    client.write_all(b"still here").unwrap();
    assert_eq!(await_packet(&mut guest).1, b"still here");
}

/// A guest that had an engine in shared memory goes on with another one.
fn move_to_a_new_engine(window: Option<Window>) {
    let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (first, device) = remote(old.path(), None);
    let mut guest = Machine::new(device);
    refill(&mut guest);
    for _ in 0..8 {
        guest.offer(EVENTS, &[], &[4]);
    }
    guest.kick(RX);
    let (mut client, _) = connected_remotely(&mut guest, old.path());
    let (_second, device) = remote(new.path(), window);
    let mut guest = guest.moved_to(device);
    first.stop();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut client, &mut rest).unwrap();
    assert_eq!(guest.done(EVENTS).unwrap().1, [0; 4]); // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
    assert!(guest.interrupts(EVENTS) > 0);
    connected_remotely(&mut guest, new.path());
}

#[test]
fn a_moved_guest_gets_a_new_engine_and_is_told_that_its_connections_are_gone() {
    move_to_a_new_engine(None);
}

#[test]
fn a_moved_guest_whose_memory_nobody_shares_does_too() {
    move_to_a_new_engine(Some(Window::new().unwrap()));
}

#[test]
fn copies_of_what_an_engine_and_a_guest_say_arrive_whole_and_in_order() {
    let dir = tempfile::tempdir().unwrap();
    let (_engine, device) = remote(dir.path(), Some(Window::new().unwrap()));
    let features = device.features();
    let mut guest = Machine::with(device, features, private_memory());
    refill(&mut guest);
    guest.kick(RX);
    let (mut client, request) = connected_remotely(&mut guest, dir.path());
    // To the guest: more than all its buffers hold, which come back one by one.
    let text = Random(3).bytes(600 << 10);
    let said = text.clone();
    let mut writer = client.try_clone().unwrap();
    let writing = std::thread::spawn(move || writer.write_all(&said).unwrap());
    let mut heard = Vec::new();
    while heard.len() < text.len() {
        let (header, piece) = await_packet(&mut guest);
        assert_eq!(header.op, Op::Rw as u16);
        heard.extend(piece);
        guest.offer(RX, &[], &[4096]);
        let credit = Header {
            op: Op::CreditUpdate as u16,
            buf_alloc: 1 << 16,
            fwd_cnt: heard.len() as u32,
            ..request.reset()
        };
        guest.offer(TX, &[&credit.encode()], &[]);
        guest.kick(RX);
        guest.kick(TX);
        guest.run();
        while guest.done(TX).is_some() {}
    }
    writing.join().unwrap();
    assert!(heard == text);
    // The rest of the line that says that the connection is there.
    let mut byte = [0];
    while byte != *b"\n" {
        std::io::Read::read_exact(&mut client, &mut byte).unwrap();
    }
    // And from it, in as large pieces as there can be.
    let said: Vec<_> = text.chunks(32 << 10).take(6).collect();
    for piece in &said {
        let header = Header {
            op: Op::Rw as u16,
            len: piece.len() as u32,
            buf_alloc: 1 << 16,
            fwd_cnt: text.len() as u32,
            ..request.reset()
        };
        guest.offer(TX, &[&header.encode(), piece], &[]);
        guest.kick(TX);
        guest.run();
        let mut heard = vec![0; piece.len()];
        std::io::Read::read_exact(&mut client, &mut heard).unwrap();
        assert!(&heard == piece);
    }
    let saved = guest.device().save();
    assert!(matches!(saved, Err(Error::NotSaved { kind: 19, .. })));
}
