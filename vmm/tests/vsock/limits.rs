//! What one guest, and clients that do not behave, can use up.

use sealpod_vmm::vsock::{Limits, Op};
use std::io::Write;

use crate::guest::{Guest, at_end, noise, read_some, write_some};
use crate::kernel::Kernel;

fn few() -> Limits {
    Limits {
        host_connections: 3,
        guest_connections: 2,
        greetings: 4,
        window: 4096,
        memory: 64 << 10,
    }
}

#[test]
fn one_guest_connection_too_many_is_refused_and_the_host_still_gets_through() {
    let mut guest = Guest::new(few());
    let listener = guest.service(1024);
    let names: Vec<_> = (0..3).map(|_| guest.kernel.connect(1024)).collect();
    guest.run();
    let refused = names.iter().map(|name| guest.kernel.sockets[name].reset);
    assert_eq!(refused.collect::<Vec<_>>(), [false, false, true]);
    let (mut client, name) = guest.connected_by_host(1);
    guest.assert_alive(&mut client, name);

    // One that ends makes room for another.
    drop(listener.accept().unwrap());
    guest.run();
    let name = guest.kernel.connect(1024);
    guest.run();
    assert!(guest.kernel.sockets[&name].connected);
}

#[test]
fn one_client_too_many_is_closed_and_the_guest_still_gets_through() {
    let mut guest = Guest::new(few());
    let open: Vec<_> = (1..=3).map(|port| guest.connected_by_host(port)).collect();
    let mut refused = guest.client(b"CONNECT 1\n");
    guest.run();
    assert!(at_end(&mut refused));
    let (mut stream, name) = guest.connected_by_guest(1024);
    guest.assert_alive(&mut stream, name);
    drop(open);
    guest.run();
    guest.connected_by_host(4);
}

#[test]
fn a_guest_that_never_confirms_an_end_keeps_nobody_out() {
    let mut guest = Guest::new(few());
    for port in 1..=20 {
        let (mut client, name) = guest.connected_by_host(port);
        // Unread data: the model kernel does not answer the SHUTDOWN of both directions.
        client.write_all(b"unread").unwrap();
        guest.run();
        drop(client);
        guest.run();
        assert!(port > 17 || guest.engine.connections() <= 3);
        assert!(!guest.kernel.sockets[&name].inbox.is_empty());
    }
    assert_eq!(guest.engine.connections(), 3);
}

#[test]
fn slow_clients_do_not_keep_others_from_connecting() {
    let mut guest = Guest::new(few());
    guest.kernel.listening.insert(1);
    let mut slow: Vec<_> = (0..4).map(|_| guest.client(b"CONNECT")).collect();
    guest.run();
    let mut client = guest.client(b"CONNECT 1\n");
    guest.run();
    assert!(read_some(&mut client).starts_with(b"OK "));
    assert!(at_end(&mut slow[0]), "the oldest had to go");
    for (n, client) in slow.iter_mut().enumerate().skip(1) {
        assert!(!at_end(client), "client {n} was closed");
    }
    for piece in [&b" "[..], b"1", b"\n"] {
        slow[1].write_all(piece).unwrap();
        guest.run();
    }
    assert!(read_some(&mut slow[1]).starts_with(b"OK "));
}

#[test]
fn clients_that_do_not_speak_the_protocol_are_closed() {
    let mut guest = Guest::new(few());
    for bad in [
        &b"GET / HTTP/1.0\r\n\r\n"[..],
        &[0; 32],
        b"CONNECT x\n",
        b"\n",
    ] {
        let mut client = guest.client(bad);
        guest.run();
        assert!(at_end(&mut client), "{bad:?}");
    }
    assert_eq!(guest.engine.connections(), 0);
}

#[test]
fn late_connections_get_smaller_windows_and_still_work() {
    let limits = Limits::default();
    let mut guest = Guest::new(limits);
    let mut all: Vec<_> = (0..192).map(|n| guest.connected_by_host(n)).collect();
    all.extend((1000..1064).map(|n| guest.connected_by_guest(n)));
    guest.engine.check();
    for (stream, name) in &mut all {
        guest.assert_alive(stream, *name);
    }
    // Nobody reads: all of the guest's credit is used, and the sum keeps within the limit.
    let data = noise(1, 1 << 20);
    for (_, name) in &all {
        while guest.kernel.send(*name, &data) > 0 {
            guest.run();
        }
    }
    guest.engine.check();
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to_until_it_does() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    // Use up all receive buffers without giving any back.
    write_some(&mut client, &noise(1, 200_000));
    guest.step();
    let mut held = Vec::new();
    let mut flooded = 0;
    for port in 0..100_000 {
        let packet = Kernel::header((port, 9), Op::Rw);
        if !guest.driver.send(&packet, b"") {
            break;
        }
        flooded += 1;
        guest.step();
    }
    assert!(flooded < 200, "{flooded} packets were taken");
    assert!(guest.driver.untaken() > 0);
    // As soon as it takes its answers, everything goes on.
    loop {
        let before = held.len();
        while let Some((header, payload)) = guest.driver.receive() {
            held.push((header, payload));
        }
        guest.driver.refill();
        guest.step();
        if held.len() == before {
            break;
        }
    }
    assert_eq!(guest.driver.untaken(), 0);
    let resets = held.iter().filter(|(h, _)| h.op == Op::Rst as u16).count();
    assert_eq!(resets, flooded);
    for (header, payload) in held.iter().filter(|(h, _)| h.op != Op::Rst as u16) {
        guest.kernel.receive(header, payload);
    }
    assert!(!guest.kernel.sockets[&name].reset);
}
