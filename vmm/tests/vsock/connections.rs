//! How connections come to be and how they end.

use sealpod_vmm::vsock::{Limits, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use std::io::Write;
use std::net::Shutdown;

use crate::guest::{Guest, at_end, noise, read_some, write_some};

#[test]
fn a_host_client_reaches_a_port_of_the_guest() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1025);
    assert!(name.1 >= 1 << 30, "host ports are not those of services");
    guest.assert_alive(&mut client, name);
}

#[test]
fn bytes_that_follow_the_connect_line_are_not_lost() {
    let mut guest = Guest::new(Limits::default());
    guest.kernel.listening.insert(7);
    let mut client = guest.client(b"CONNECT 7\nhello");
    guest.run();
    assert!(read_some(&mut client).starts_with(b"OK "));
    let name = *guest.kernel.sockets.keys().next().unwrap();
    assert_eq!(guest.kernel.read(name, 100), b"hello");
}

#[test]
fn a_port_nobody_listens_on_closes_the_client() {
    let mut guest = Guest::new(Limits::default());
    let mut client = guest.client(b"CONNECT 9\n");
    assert!(!at_end(&mut client));
    guest.run();
    assert!(at_end(&mut client));
    assert_eq!(guest.engine.connections(), 0);
}

#[test]
fn a_client_that_comes_before_the_guest_is_up_is_served_later() {
    let mut guest = Guest::new(Limits::default());
    guest.kernel.listening.insert(1);
    let mut client = guest.client(b"CONNECT 1\n");
    guest.engine.handle_events();
    assert!(!at_end(&mut client));
    guest.run();
    assert!(read_some(&mut client).starts_with(b"OK "));
}

#[test]
fn a_client_that_leaves_before_the_answer_costs_the_guest_a_reset() {
    let mut guest = Guest::new(Limits::default());
    let client = guest.client(b"CONNECT 1\n");
    guest.step();
    drop(client);
    guest.step();
    let ops: Vec<u16> = guest.answers().iter().map(|h| h.op).collect();
    assert_eq!(ops, [Op::Request as u16, Op::Rst as u16]);
    assert_eq!(guest.engine.connections(), 0);

    // A request that the guest has not seen is simply not made.
    let mut idle = Guest::new(Limits::default());
    let client = idle.client(b"CONNECT 1\n");
    idle.engine.handle_events();
    drop(client);
    idle.step();
    assert!(idle.answers().is_empty());
}

#[test]
fn the_guest_reaches_a_service_of_the_host() {
    let mut guest = Guest::new(Limits::default());
    let (mut stream, name) = guest.connected_by_guest(1024);
    guest.assert_alive(&mut stream, name);
}

#[test]
fn a_port_without_a_service_is_refused_to_the_guest() {
    let mut guest = Guest::new(Limits::default());
    let name = guest.kernel.connect(1);
    let other = guest.kernel.connect(u32::MAX);
    drop(guest.service(2)); // its socket file stays, nobody accepts
    let dead = guest.kernel.connect(2);
    guest.run();
    for name in [name, other, dead] {
        assert!(guest.kernel.sockets[&name].reset);
    }
    assert_eq!(guest.engine.connections(), 0);
}

#[test]
fn each_side_can_end_its_direction_and_still_receive() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    guest.run();
    assert_eq!(guest.kernel.sockets[&name].host_ended, SHUTDOWN_SEND);
    assert_eq!(guest.kernel.read(name, 100), b"question");
    assert_eq!(guest.kernel.send(name, b"answer"), 6);
    guest.run();
    assert_eq!(read_some(&mut client), b"answer");
    assert!(!at_end(&mut client));
    guest.kernel.shutdown(name, SHUTDOWN_SEND);
    guest.run();
    assert!(at_end(&mut client));

    let (mut client, name) = guest.connected_by_host(2);
    assert_eq!(guest.kernel.send(name, b"bye"), 3);
    guest.kernel.shutdown(name, SHUTDOWN_SEND);
    guest.run();
    assert_eq!(read_some(&mut client), b"bye");
    assert!(at_end(&mut client));
    client.write_all(b"one more").unwrap();
    guest.run();
    assert_eq!(guest.kernel.read(name, 100), b"one more");
    drop(client);
    guest.run();
    assert!(guest.kernel.sockets[&name].reset);
}

#[test]
fn a_guest_that_stops_receiving_breaks_the_clients_pipe() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    guest.kernel.shutdown(name, SHUTDOWN_RECEIVE);
    guest.run();
    let error = client.write(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    assert_eq!(guest.kernel.send(name, b"still"), 5);
    guest.run();
    assert_eq!(read_some(&mut client), b"still");
    guest.kernel.shutdown(name, SHUTDOWN_SEND);
    guest.run();
    assert!(at_end(&mut client));
    assert!(guest.kernel.sockets[&name].reset);
    assert_eq!(guest.engine.connections(), 0);
}

#[test]
fn what_a_client_sent_before_it_left_reaches_the_guest_before_the_end() {
    let mut guest = Guest::new(Limits::default());
    guest.kernel.window = 4096;
    let (mut client, name) = guest.connected_by_host(1);
    let data = noise(1, 100_000);
    assert_eq!(write_some(&mut client, &data), data.len());
    drop(client);
    guest.run();
    // The guest learns at once that nobody reads any more, and has not lost a byte.
    assert_eq!(guest.kernel.sockets[&name].host_ended, SHUTDOWN_RECEIVE);
    let mut got = Vec::new();
    while got.len() < data.len() {
        let piece = guest.kernel.read(name, 1000);
        assert!(!piece.is_empty());
        got.extend(piece);
        guest.run();
    }
    assert_eq!(got, data);
    assert_eq!(guest.kernel.sockets[&name].host_ended, SHUTDOWN_BOTH);
}

/// Sends all of `data` to a client that does not read yet; returns nothing before it is all sent.
fn send_all(guest: &mut Guest, name: (u32, u32), data: &[u8]) {
    let mut done = 0;
    while done < data.len() {
        let count = guest.kernel.send(name, &data[done..]);
        assert!(count > 0, "out of credit after {done} bytes");
        done += count;
        guest.run();
    }
}

#[test]
fn what_the_guest_sent_before_it_left_reaches_the_client_before_the_end() {
    let data = noise(2, 300_000); // more than a socket holds, less than socket and window
    for reset in [false, true] {
        let mut guest = Guest::new(Limits::default());
        let (mut client, name) = guest.connected_by_host(1);
        client.write_all(b"never read by the guest").unwrap();
        send_all(&mut guest, name, &data);
        if reset {
            guest.kernel.abort(name);
        } else {
            guest.kernel.shutdown(name, SHUTDOWN_BOTH);
        }
        guest.run();
        assert!(guest.kernel.sockets[&name].reset, "the guest need not wait");
        assert_eq!(
            guest.engine.connections(),
            1,
            "the rest is still on its way"
        );

        // Its ports may already be used anew.
        guest.kernel.sockets.remove(&name);
        guest.kernel.listening.insert(1);
        let (mut second, again) = guest.connected_by_host(1);
        guest.assert_alive(&mut second, again);

        let mut got = Vec::new();
        while got.len() < data.len() {
            let piece = read_some(&mut client);
            assert!(!piece.is_empty(), "lost after {} bytes", got.len());
            got.extend(piece);
            guest.run();
        }
        assert_eq!(got, data);
        assert!(at_end(&mut client));
        assert_eq!(guest.engine.connections(), 1);
    }
}

#[test]
fn a_guest_that_starts_anew_finds_a_device_without_connections() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    let (mut service, _) = guest.connected_by_guest(1024);
    let data = noise(3, 300_000);
    send_all(&mut guest, name, &data);
    let mut waiting = guest.client(b"CONN");
    guest.run();

    guest.reboot();
    assert!(at_end(&mut service));
    let mut got = read_some(&mut client);
    while got.len() < data.len() {
        guest.run();
        got.extend(read_some(&mut client));
    }
    assert_eq!(got, data);
    assert!(at_end(&mut client));

    // A client the old guest never heard of is served by the new one.
    guest.kernel.listening.insert(5);
    waiting.write_all(b"ECT 5\n").unwrap();
    guest.run();
    assert!(read_some(&mut waiting).starts_with(b"OK "));
    let (mut client, name) = guest.connected_by_host(1);
    guest.assert_alive(&mut client, name);
}

#[test]
fn a_closed_engine_delivers_what_it_has_and_takes_nobody_new() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    let data = noise(4, 300_000);
    send_all(&mut guest, name, &data);
    let mut waiting = guest.client(b"CONNECT 1\n");
    guest.engine.handle_events();
    guest.engine.close();
    assert!(at_end(&mut waiting));
    assert!(!guest.uds().exists());
    let mut got = read_some(&mut client);
    while got.len() < data.len() {
        guest.engine.handle_events();
        got.extend(read_some(&mut client));
    }
    assert_eq!(got, data);
    assert!(at_end(&mut client));
    assert_eq!(guest.engine.connections(), 0);
}
