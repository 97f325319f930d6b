//! Bytes in numbers: none lost, none out of order, none kept for one who does not read.

use sealpod_vmm::vsock::{HEADER_LEN, Limits, Op, SHUTDOWN_SEND};
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use crate::guest::{Guest, Random, at_end, noise, read_some, write_some};
use crate::kernel::{Kernel, Name};

/// One connection with data still to go both ways.
struct Transfer {
    stream: UnixStream,
    name: Name,
    data: [Vec<u8>; 2],
    sent: [usize; 2],
    got: [Vec<u8>; 2],
}

impl Transfer {
    fn new(stream: UnixStream, name: Name, seed: u64, size: usize) -> Self {
        Self {
            stream,
            name,
            data: [noise(seed, size), noise(!seed, size)],
            sent: [0; 2],
            got: [Vec::new(), Vec::new()],
        }
    }

    /// Moves some bytes at each end; returns whether all have arrived.
    fn turn(&mut self, guest: &mut Guest, random: &mut Random) -> bool {
        let [to_guest, to_host] = &self.data;
        self.sent[0] += write_some(&mut self.stream, &to_guest[self.sent[0]..]);
        let some = 1 + random.below(20_000) as usize;
        let end = to_host.len().min(self.sent[1] + some);
        self.sent[1] += guest.kernel.send(self.name, &to_host[self.sent[1]..end]);
        guest.run();
        let some = random.below(20_000) as usize;
        self.got[0].extend(guest.kernel.read(self.name, some));
        self.got[1].extend(read_some(&mut self.stream));
        self.got[0].len() == to_guest.len() && self.got[1].len() == to_host.len()
    }
}

fn assert_transfers(guest: &mut Guest, transfers: &mut [Transfer]) {
    let mut random = Random(99);
    for _ in 0..1_000_000 {
        let done = transfers
            .iter_mut()
            .map(|t| t.turn(guest, &mut random))
            .fold(true, |all, one| all & one);
        if done {
            for t in transfers {
                assert!(t.got == t.data, "bytes were changed on their way");
            }
            return;
        }
    }
    panic!("the bytes do not arrive");
}

#[test]
fn megabytes_arrive_unchanged_both_ways_through_small_windows() {
    let mut guest = Guest::new(Limits {
        window: 4096,
        ..Limits::default()
    });
    guest.kernel.window = 5000;
    let (stream, name) = guest.connected_by_host(1);
    assert_transfers(&mut guest, &mut [Transfer::new(stream, name, 7, 3 << 20)]);
}

#[test]
fn megabytes_arrive_unchanged_through_large_windows() {
    let mut guest = Guest::new(Limits::default());
    guest.kernel.window = 256 << 10;
    guest.driver.rx_layout = vec![60_000];
    let (stream, name) = guest.connected_by_guest(1024);
    assert_transfers(&mut guest, &mut [Transfer::new(stream, name, 8, 8 << 20)]);
}

#[test]
fn packets_may_lie_in_guest_memory_in_any_pieces() {
    for (layout, cuts) in [
        (vec![44, 4096], vec![44]),
        (vec![10, 34, 100, 1000], vec![20, 44, 50]),
        (vec![50, 1, 1, 3000], vec![1, 2, 3]),
        (vec![45], vec![45]),
    ] {
        let mut guest = Guest::new(Limits::default());
        guest.driver.rx_layout = layout;
        guest.driver.tx_cuts = cuts;
        guest.reboot();
        let (stream, name) = guest.connected_by_host(1);
        assert_transfers(&mut guest, &mut [Transfer::new(stream, name, 9, 8_000)]);
    }
}

#[test]
fn a_hundred_connections_at_once_do_not_mix() {
    let mut guest = Guest::new(Limits::default());
    let mut transfers = Vec::new();
    for n in 0..50 {
        let (stream, name) = guest.connected_by_host(100 + n);
        transfers.push(Transfer::new(stream, name, u64::from(n) + 1, 40_000));
        let (stream, name) = guest.connected_by_guest(1000 + n);
        transfers.push(Transfer::new(stream, name, u64::from(n) + 77, 40_000));
    }
    assert_eq!(guest.engine.connections(), 100);
    assert_transfers(&mut guest, &mut transfers);
}

#[test]
fn a_client_that_does_not_read_stops_the_guest_and_nobody_else() {
    let mut guest = Guest::new(Limits::default());
    let (mut lazy, name) = guest.connected_by_host(1);
    let (mut other, other_name) = guest.connected_by_host(2);
    let data = noise(5, 4 << 20);
    let mut sent = 0;
    loop {
        let count = guest.kernel.send(name, &data[sent..]);
        if count == 0 {
            break;
        }
        sent += count;
        guest.run();
    }
    assert!(
        sent < 1 << 20,
        "the guest could send {sent} bytes to nobody"
    );
    assert_eq!(guest.kernel.sockets[&name].credit(), 0);
    guest.assert_alive(&mut other, other_name);

    let mut got: Vec<u8> = Vec::new();
    while got.len() < data.len() {
        let piece = read_some(&mut lazy);
        got.extend(&piece);
        guest.run();
        sent += guest.kernel.send(name, &data[sent..]);
        guest.run();
        assert!(!piece.is_empty() || got.len() < sent, "stuck at {sent}");
    }
    assert!(got == data);
}

#[test]
fn a_guest_that_does_not_read_stops_the_client_and_nobody_else() {
    let mut guest = Guest::new(Limits::default());
    guest.kernel.window = 10_000;
    let (mut client, name) = guest.connected_by_host(1);
    let (mut other, other_name) = guest.connected_by_host(2);
    let data = noise(6, 2 << 20);
    let mut sent = write_some(&mut client, &data);
    guest.run();
    sent += write_some(&mut client, &data[sent..]);
    guest.run();
    assert!(sent < 1 << 20);
    assert_eq!(guest.kernel.sockets[&name].inbox.len(), 10_000);
    assert!(
        !guest.engine.has_output(),
        "the engine is busy with nothing"
    );
    guest.assert_alive(&mut other, other_name);

    let mut got = Vec::new();
    while got.len() < data.len() {
        sent += write_some(&mut client, &data[sent..]);
        let piece = guest.kernel.read(name, 9_999);
        assert!(!piece.is_empty());
        got.extend(piece);
        guest.run();
    }
    assert!(got == data);
}

#[test]
fn a_half_closed_stream_ends_after_its_last_byte() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    let data = noise(10, 300_000);
    let mut sent = 0;
    while sent < data.len() {
        sent += guest.kernel.send(name, &data[sent..]);
        guest.run();
    }
    guest.kernel.shutdown(name, SHUTDOWN_SEND);
    guest.run();
    let mut got = Vec::new();
    while got.len() < data.len() {
        got.extend(read_some(&mut client));
        guest.run();
    }
    assert!(got == data);
    assert!(at_end(&mut client));
    client.write_all(b"thanks").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    guest.run();
    assert_eq!(guest.kernel.read(name, 100), b"thanks");
}

#[test]
fn a_guest_that_asks_for_credit_is_told() {
    let mut guest = Guest::new(Limits::default());
    let (_client, name) = guest.connected_by_host(1);
    let mut ask = Kernel::header(name, Op::CreditRequest);
    ask.buf_alloc = 1000;
    let answers = guest.inject(&ask, b"");
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].op, Op::CreditUpdate as u16);
    assert_eq!(answers[0].buf_alloc, Limits::default().window);
}

#[test]
fn a_receive_buffer_without_room_for_a_byte_is_given_back_unused() {
    let mut guest = Guest::new(Limits::default());
    guest.driver.rx_layout = vec![HEADER_LEN as u32];
    guest.reboot();
    guest.client(b"CONNECT 1\n");
    guest.step();
    assert!(guest.driver.receive().is_none());
    assert!(
        guest.engine.has_output(),
        "the request waits for a real buffer"
    );
}
