//! Clients that are slow, broken, greedy or too many: each loses its own connection, and nobody else's.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::client::{connect, connect_from, get, post, receive, request, send, tcp};
use crate::lab::Server;
use serde_json::json;

/// Waits for the other side to close; how long that took.
fn closed(stream: &mut impl Read) -> Duration {
    let start = Instant::now();
    let mut rest = Vec::new();
    // A connection that is reset is closed, too.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 4096, "{}", String::from_utf8_lossy(&rest));
    start.elapsed()
}

#[test]
fn a_body_beyond_its_cap_is_refused_before_it_is_sent() {
    let server = Server::start();
    for (path, length) in [
        ("/v1/challenge", 16 << 10),
        ("/v1/appraise", 4096 << 10),
        ("/kbs/v0/auth", 16 << 10),
    ] {
        let mut stream = connect(&server);
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n",
            length + 1
        );
        stream.write_all(head.as_bytes()).unwrap();
        let answer = receive(&mut stream).unwrap();
        assert_eq!(answer.status, 413, "{path}: {answer:?}");
    }
    // Without a length, as soon as it is too much; who sends on reads the refusal all the same.
    let mut stream = connect(&server);
    let head =
        "POST /v1/challenge HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = format!("1000\r\n{}\r\n", "x".repeat(0x1000));
    for _ in 0..256 {
        stream.write_all(chunk.as_bytes()).unwrap();
    }
    assert_eq!(receive(&mut stream).unwrap().status, 413);
    assert_eq!(get(&server, "/healthz").0, 200);
}

#[test]
fn a_body_that_is_only_announced_takes_no_memory_from_others() {
    let server = Server::with("[limits]\nmemory_mib = 4\n");
    let held: Vec<_> = (0..16)
        .map(|_| {
            let mut stream = connect(&server);
            let head = "POST /v1/appraise HTTP/1.1\r\nHost: l\r\nContent-Length: 4000000\r\n\r\n{";
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    let answer = post(&server, "/v1/challenge", &json!({ "pod_uid": "pod" }));
    assert_eq!(answer.status, 200, "{answer:?}");
    drop(held);
}

#[test]
fn slow_clients_are_cut_within_their_time() {
    let server = Server::with("[limits]\nheader_seconds = 1\nbody_seconds = 1\n");
    let most = Duration::from_secs(10);
    // Says nothing at all; says something that is not TLS.
    let mut silent = tcp(server.address, [127, 0, 0, 1].into());
    assert!(closed(&mut silent) < most);
    let mut plain = tcp(server.address, [127, 0, 0, 1].into());
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(closed(&mut plain) < most);
    // A head that never ends, byte by byte.
    let mut stream = connect(&server);
    let start = Instant::now();
    while start.elapsed() < most {
        let sent = stream.write_all(b"G").and_then(|()| stream.flush());
        stream
            .sock
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        let mut byte = [0; 64];
        match stream.read(&mut byte) {
            Ok(0) => break,
            Ok(_) => continue,
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock && sent.is_ok() => continue,
            Err(_) => break,
        }
    }
    assert!(start.elapsed() < most);
    // A body that never comes.
    let mut stream = connect(&server);
    let text = request("POST", "/v1/appraise", "", &"x".repeat(1000));
    stream
        .write_all(&text.as_bytes()[..text.len() - 900])
        .unwrap();
    let answer = receive(&mut stream).unwrap();
    assert_eq!(answer.status, 408, "{answer:?}");
    let cut = |reason: &str| {
        server.metric(&format!(
            "sealpod_attest_connections_cut_total{{reason=\"{reason}\"}}"
        ))
    };
    assert!(cut("handshake") >= 2);
    assert_eq!(get(&server, "/healthz").0, 200);
}

#[test]
fn heads_that_are_broken_or_too_long_end_their_connection_alone() {
    let server = Server::start();
    let other = &mut connect(&server);
    for (text, status) in [
        ("GET /healthz HTTP/9.9\r\n\r\n".to_owned(), 400),
        ("\0\0\0\0\r\n\r\n".to_owned(), 400),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(40_000)), 431),
        (
            format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(100)),
            431,
        ),
    ] {
        let mut stream = connect(&server);
        let _ = stream.write_all(text.as_bytes());
        let shown: String = text.chars().take(30).collect();
        // The rest of what was sent can reset the connection before the answer is read.
        if let Some(answer) = receive(&mut stream) {
            assert!(
                [status, 414].contains(&answer.status),
                "{shown}: {answer:?}"
            );
        }
        assert!(closed(&mut stream) < Duration::from_secs(10), "{shown}");
    }
    // Half a request, and gone.
    for path in ["/v1/appraise", "/kbs/v0/attest"] {
        let mut stream = connect(&server);
        let text = request("POST", path, "", "{\"nonce\":\"");
        stream
            .write_all(&text.as_bytes()[..text.len() - 5])
            .unwrap();
        stream.flush().unwrap();
    }
    other
        .write_all(request("GET", "/healthz", "", "").as_bytes())
        .unwrap();
    assert_eq!(receive(other).unwrap().status, 200);
}

#[test]
fn an_address_that_asks_too_often_waits_and_others_do_not() {
    let server = Server::with("[limits]\nrequests_per_second = 1\n");
    let statuses: Vec<u16> = (0..30).map(|_| get(&server, "/healthz").0).collect();
    assert_eq!(statuses[0], 200);
    assert!(statuses.contains(&429), "{statuses:?}");
    let answer = send(&server, "GET", "/healthz", "", "");
    if answer.status == 429 {
        let wait = answer
            .header("retry-after")
            .and_then(|v| v.parse::<u64>().ok());
        assert!(wait.is_some_and(|s| s >= 1), "{answer:?}");
    }
    let mut stream = connect_from(&server, [127, 0, 0, 9].into());
    stream
        .write_all(request("GET", "/healthz", "", "").as_bytes())
        .unwrap();
    assert_eq!(receive(&mut stream).unwrap().status, 200);
}

#[test]
fn an_address_that_holds_many_connections_gets_no_more_and_others_do() {
    let server = Server::with("[limits]\nconnections_per_address = 2\n");
    let from = IpAddr::from([127, 0, 0, 7]);
    let mut held: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = connect_from(&server, from);
            stream
                .write_all(request("GET", "/healthz", "", "").as_bytes())
                .unwrap();
            assert_eq!(receive(&mut stream).unwrap().status, 200);
            stream
        })
        .collect();
    let mut third = tcp(server.address, from);
    assert!(closed(&mut third) < Duration::from_secs(5));
    let answer = post(&server, "/v1/challenge", &json!({ "pod_uid": "pod" }));
    assert_eq!(answer.status, 200);
    // One that goes makes room.
    drop(held.pop());
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let mut stream = connect_from(&server, from);
        let sent = stream.write_all(request("GET", "/healthz", "", "").as_bytes());
        if sent.is_ok() && receive(&mut stream).is_some_and(|a| a.status == 200) {
            break;
        }
        assert!(Instant::now() < end, "no room after a connection ended");
        std::thread::sleep(Duration::from_millis(20));
    }
}
