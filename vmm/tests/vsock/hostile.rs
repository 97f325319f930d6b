//! A guest that breaks the rules: it loses the connection, and nothing else happens.

use sealpod_vmm::vsock::{HOST_CID, Header, Limits, Op, SHUTDOWN_SEND, queues};
use vm_memory::{Bytes, GuestAddress};

use crate::guest::{Guest, Random, at_end, read_some};
use crate::kernel::{CID, Kernel, Name};

/// A header that is right in all respects, for a connection on which nothing was sent yet.
fn good(name: Name, op: Op) -> Header {
    Header {
        buf_alloc: 64 << 10,
        ..Kernel::header(name, op)
    }
}

/// What the guest does wrong, after which exactly the attacked connection must be gone.
fn assert_costs_the_connection(what: &str, attack: impl Fn(&mut Guest, Name) -> Vec<Header>) {
    let mut guest = Guest::new(Limits::default());
    let (mut attacked, name) = guest.connected_by_host(1);
    let (mut other, other_name) = guest.connected_by_host(2);
    let answers = attack(&mut guest, name);
    let reset = Header {
        src_cid: HOST_CID,
        dst_cid: CID,
        src_port: name.1,
        dst_port: name.0,
        type_: 1,
        op: Op::Rst as u16,
        ..Header::default()
    };
    assert_eq!(answers, [reset], "{what}");
    while !read_some(&mut attacked).is_empty() {
        guest.step(); // what was sent by the rules still arrives
    }
    assert!(at_end(&mut attacked), "{what}");
    guest.assert_alive(&mut other, other_name);
    assert_eq!(guest.engine.connections(), 1, "{what}");
}

#[test]
fn breaking_a_rule_costs_the_connection_and_nothing_else() {
    type Attack = fn(&mut Guest, Name) -> Vec<Header>;
    let attacks: [(&str, Attack); 11] = [
        ("more payload than credit", |guest, name| {
            let data = vec![0; 64 << 10];
            let mut header = good(name, Op::Rw);
            header.len = data.len() as u32;
            // The client reads nothing: some are taken, then there is no credit.
            for _ in 0..20 {
                let answers = guest.inject(&header, &data);
                if answers.iter().any(|h| h.op == Op::Rst as u16) {
                    return answers;
                }
            }
            Vec::new()
        }),
        ("acknowledging what was never sent", |guest, name| {
            let mut header = good(name, Op::CreditUpdate);
            header.fwd_cnt = 1;
            guest.inject(&header, b"")
        }),
        ("a length beyond the packet", |guest, name| {
            let mut header = good(name, Op::Rw);
            header.len = 10;
            guest.inject(&header, b"123456789")
        }),
        ("the largest length", |guest, name| {
            let mut header = good(name, Op::Rw);
            header.len = u32::MAX;
            guest.inject(&header, b"123456789")
        }),
        ("payload where none belongs", |guest, name| {
            let mut header = good(name, Op::CreditUpdate);
            header.len = 3;
            guest.inject(&header, b"abc")
        }),
        ("data after SHUTDOWN", |guest, name| {
            let mut header = good(name, Op::Shutdown);
            header.flags = SHUTDOWN_SEND;
            assert!(guest.inject(&header, b"").is_empty());
            let mut header = good(name, Op::Rw);
            header.len = 1;
            guest.inject(&header, b"x")
        }),
        ("a second RESPONSE", |guest, name| {
            guest.inject(&good(name, Op::Response), b"")
        }),
        ("a REQUEST for what is open", |guest, name| {
            guest.inject(&good(name, Op::Request), b"")
        }),
        ("operation 0", |guest, name| {
            let mut header = good(name, Op::Rw);
            header.op = 0;
            guest.inject(&header, b"")
        }),
        ("operation 8", |guest, name| {
            let mut header = good(name, Op::Rw);
            header.op = 8;
            guest.inject(&header, b"")
        }),
        ("operation 65535", |guest, name| {
            let mut header = good(name, Op::Rw);
            header.op = u16::MAX;
            guest.inject(&header, b"")
        }),
    ];
    for (what, attack) in attacks {
        assert_costs_the_connection(what, attack);
    }
}

#[test]
fn packets_for_nobody_are_answered_with_a_reset_or_not_at_all() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    let mut expect = |what: &str, change: fn(&mut Header), answered: bool| {
        let mut header = good(name, Op::Rw);
        change(&mut header);
        let answers = guest.inject(&header, b"");
        let wanted: Vec<Header> = answered.then(|| header.reset()).into_iter().collect();
        assert_eq!(answers, wanted, "{what}");
    };
    expect("another guest's CID", |h| h.src_cid = 4, false);
    expect("the host's CID as source", |h| h.src_cid = 2, false);
    expect("the largest CID as source", |h| h.src_cid = u64::MAX, false);
    expect("a CID that is not the host's", |h| h.dst_cid = 5, true);
    expect("its own CID", |h| h.dst_cid = CID, true);
    expect("an unknown port of its own", |h| h.src_port = 77, true);
    expect("an unknown port of the host", |h| h.dst_port = 77, true);
    expect("a datagram", |h| h.type_ = 3, true);
    expect("a seqpacket", |h| h.type_ = 2, true);
    expect("type 0", |h| h.type_ = 0, true);
    expect("a reset for nobody", |h| (h.op, h.dst_port) = (3, 5), false);
    expect(
        "a reset of another type",
        |h| (h.op, h.type_) = (3, 2),
        false,
    );
    expect(
        "a request with payload",
        |h| (h.op, h.dst_port, h.len) = (1, 5, 1),
        true,
    );
    guest.assert_alive(&mut client, name);
}

#[test]
fn what_comes_before_the_first_connection_is_of_another_time_and_not_answered() {
    let mut guest = Guest::new(Limits::default());
    let stray = good((1024, 77), Op::CreditUpdate);
    assert_eq!(guest.inject(&stray, b""), []);
    let (mut host, name) = guest.connected_by_guest(5);
    assert_eq!(guest.inject(&stray, b""), [stray.reset()]);
    guest.assert_alive(&mut host, name);
    guest.reboot();
    assert_eq!(guest.inject(&stray, b""), []);
}

#[test]
fn an_answer_before_the_question_is_refused() {
    let mut guest = Guest::new(Limits::default());
    let mut client = guest.client(b"CONNECT 1\n");
    guest.engine.handle_events(); // the REQUEST is not sent yet; its port can be guessed
    let header = good((1, 1 << 30), Op::Response);
    assert!(guest.driver.send(&header, b""));
    guest.step();
    let ops: Vec<u16> = guest.answers().iter().map(|h| h.op).collect();
    assert_eq!(ops, [Op::Rst as u16]);
    assert!(at_end(&mut client));
}

#[test]
fn windows_that_shrink_stop_the_host_and_do_not_confuse_it() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    std::io::Write::write_all(&mut client, &[1; 5000]).unwrap();
    guest.run();
    let mut header = good(name, Op::CreditUpdate);
    header.buf_alloc = 10; // 5000 bytes are under way
    assert!(guest.inject(&header, b"").is_empty());
    std::io::Write::write_all(&mut client, b"more").unwrap();
    guest.step();
    assert!(guest.answers().is_empty());
    header.fwd_cnt = 5000;
    let answers = guest.inject(&header, b"");
    assert_eq!(answers[0].len, 4);
}

#[test]
fn packets_too_short_for_a_header_are_ignored() {
    let mut guest = Guest::new(Limits::default());
    let (mut client, name) = guest.connected_by_host(1);
    for length in 1..44 {
        assert!(guest.driver.send_raw(&vec![3; length]));
        guest.step();
    }
    assert!(guest.answers().is_empty());
    assert_eq!(guest.driver.untaken(), 0);
    guest.assert_alive(&mut client, name);
}

/// A header whose fields are wrong about half of the time, but not so wrong that nothing happens.
fn nonsense(random: &mut Random, names: &[Name]) -> (Header, Vec<u8>) {
    let mut pick = |likely: u64, wild: bool| match random.below(if wild { 4 } else { 40 }) {
        0 => random.next(),
        _ => likely,
    };
    let length = pick(0, true) % 70_000;
    let op = pick(0, false);
    let header = Header {
        src_cid: pick(CID, false),
        dst_cid: pick(HOST_CID, false),
        type_: pick(1, false) as u16,
        flags: pick(0, true) as u32,
        buf_alloc: pick(65536, true) as u32,
        fwd_cnt: pick(0, false) as u32,
        len: pick(length, false) as u32,
        op: if op == 0 {
            1 + random.below(7) as u16
        } else {
            op as u16
        },
        ..Header::default()
    };
    let (src_port, dst_port) = match random.below(3) {
        0 => (random.below(5) as u32, 1020 + random.below(6) as u32),
        _ => names[random.below(names.len() as u64) as usize],
    };
    let header = Header {
        src_port,
        dst_port,
        ..header
    };
    (header, vec![0x5a; length as usize])
}

#[test]
fn a_hundred_thousand_senseless_packets_leave_a_working_device() {
    let mut guest = Guest::new(Limits::default());
    let mut random = Random(0x5ea1_90d0);
    let service = guest.service(1024);
    service.set_nonblocking(true).unwrap();
    let (mut clients, mut names) = (Vec::new(), vec![(1, 1)]);
    for round in 0..100_000 {
        if round % 500 == 0 {
            clients.truncate(5);
            let port = random.below(5) as u32;
            clients.insert(0, guest.client(format!("CONNECT {port}\n").as_bytes()));
            if let Ok((stream, _)) = service.accept() {
                clients.insert(0, stream);
            }
        }
        let (header, payload) = nonsense(&mut random, &names);
        assert!(guest.driver.send(&header, &payload));
        guest.step();
        for header in guest.answers() {
            names.push((header.dst_port, header.src_port));
        }
        names.drain(..names.len().saturating_sub(20));
    }
    drop(clients);
    guest.step();
    guest.reboot();
    let (mut client, name) = guest.connected_by_host(4000);
    guest.assert_alive(&mut client, name);
}

#[test]
fn senseless_rings_are_survived() {
    let mut random = Random(42);
    for round in 0..3000 {
        let mut guest = Guest::new(Limits::default());
        guest.client(b"CONNECT 1\n");
        // Descriptors, ring entries and indices at random: some small, so that they hit something.
        let mut ring = |base: u64, bytes: u64| {
            for at in (base..base + bytes).step_by(2) {
                let value = match random.below(3) {
                    0 => 0,
                    1 => random.below(128) as u16,
                    _ => random.next() as u16,
                };
                (guest.driver.memory)
                    .write_obj(value, GuestAddress(at))
                    .unwrap();
            }
        };
        for queue in [0x1_0000, 0x2_0000] {
            ring(queue, 1024);
            ring(queue + 0x1000, 134);
        }
        let (mut rx, mut tx) = (guest.driver.rx.device_side(), guest.driver.tx.device_side());
        for _ in 0..10 {
            let memory = &guest.driver.memory;
            let done = queues::service(&mut guest.engine, memory, &mut rx, &mut tx);
            guest.engine.check();
            if done.is_err() || round % 2 == 0 {
                break;
            }
        }
    }
}
