//! 64 clients at once, good ones and bad ones: every good one is served, no nonce is answered twice, no
//! decision is missing in the audit log, and the memory stays within its bounds.

use std::collections::BTreeSet;
use std::io::Write;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

use sealpod_attestation::appraise::Verifier;
use sealpod_attestation::evidence::Tee;
use serde_json::{Value, json};

use crate::client::{connect_from, receive, request};
use crate::lab::{Guest, Server};

const CLIENTS: u8 = 64;
const ROUNDS: usize = 4;
/// Most that the server may take at its peak, KiB, in a build without optimisation.
const MOST_MEMORY: u64 = 160 << 10;

#[derive(Default)]
struct Counts {
    accepted: AtomicUsize,
    refused: AtomicUsize,
    tokens: Mutex<BTreeSet<String>>,
    done: AtomicBool,
}

/// One request from an address of its own: status and body.
fn ask(server: &Server, from: IpAddr, path: &str, body: &Value) -> Option<(u16, Value)> {
    let mut stream = connect_from(server, from);
    let text = request("POST", path, "", &body.to_string());
    stream.write_all(text.as_bytes()).ok()?;
    let answer = receive(&mut stream)?;
    Some((answer.status, answer.json()))
}

/// A pod that attests, and then tries its luck with the same evidence, twice at once.
fn good(server: &Server, from: IpAddr, counts: &Counts) {
    let pod = format!("pod-{from}");
    let guest = Guest::new(Tee::Snp, &pod);
    for _ in 0..ROUNDS {
        let (status, challenge) =
            ask(server, from, "/v1/challenge", &json!({ "pod_uid": pod })).unwrap();
        assert_eq!(status, 200, "{challenge}");
        let nonce = challenge["nonce"].clone();
        let bundle = guest.bundle(&serde_json::from_value(nonce.clone()).unwrap());
        let body = json!({ "nonce": nonce, "pod_uid": pod, "audience": "gate", "bundle": bundle });
        let accepted = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..3)
                .map(|_| scope.spawn(|| ask(server, from, "/v1/appraise", &body).unwrap()))
                .collect();
            let answers = tries.into_iter().map(|t| t.join().unwrap());
            answers
                .filter(|(status, answer)| {
                    match *status {
                        200 => {
                            let token = answer["token"].as_str().unwrap().to_owned();
                            assert!(counts.tokens.lock().unwrap().insert(token));
                            counts.accepted.fetch_add(1, SeqCst);
                        }
                        403 => {
                            assert_eq!(answer["refused"]["check"], "nonce");
                            counts.refused.fetch_add(1, SeqCst);
                        }
                        other => panic!("{other}: {answer}"),
                    }
                    *status == 200
                })
                .count()
        });
        assert_eq!(accepted, 1, "a nonce was answered {accepted} times");
    }
}

/// Opens connections and is slow, half or greedy until the good ones are done.
fn bad(server: &Server, from: IpAddr, kind: u8, counts: &Counts) {
    while !counts.done.load(SeqCst) {
        let mut stream = connect_from(server, from);
        let _ = match kind {
            // Half a request, then nothing for a while.
            0 => stream.write_all(b"POST /v1/appraise HTTP/1.1\r\nHost: l"),
            // A body that is announced, and comes in part.
            1 => {
                let head =
                    "POST /v1/appraise HTTP/1.1\r\nHost: l\r\nContent-Length: 4000000\r\n\r\n";
                let sent = stream.write_all(head.as_bytes());
                sent.and_then(|()| stream.write_all(&[b'['; 100_000]))
            }
            // As large as is allowed, and deep.
            2 => {
                let body = "[".repeat(1 << 20);
                let sent = stream.write_all(request("POST", "/v1/appraise", "", &body).as_bytes());
                assert!(receive(&mut stream).is_none_or(|a| a.status != 200));
                sent
            }
            // Noise.
            _ => stream.write_all(&[0xff; 5000]),
        };
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

#[test]
fn many_clients_at_once_with_bad_ones_among_them_lose_nothing() {
    // Slow clients hold their places for their time: there have to be more places than clients.
    let server = Server::with("[limits]\nheader_seconds = 2\nbody_seconds = 2\nmemory_mib = 32\n");
    let idle = server.memory_kib("VmRSS");
    let counts = Counts::default();
    std::thread::scope(|scope| {
        let mut pods = Vec::new();
        for n in 0..CLIENTS {
            let from = IpAddr::from([127, 0, 1, n + 1]);
            let (server, counts) = (&server, &counts);
            if n % 2 == 0 {
                pods.push(scope.spawn(move || good(server, from, counts)));
            } else {
                scope.spawn(move || bad(server, from, n / 2 % 4, counts));
            }
        }
        let results: Vec<_> = pods.into_iter().map(|p| p.join()).collect();
        counts.done.store(true, SeqCst);
        assert!(
            results.iter().all(Result::is_ok),
            "a good client was not served"
        );
    });
    let (accepted, refused) = (counts.accepted.load(SeqCst), counts.refused.load(SeqCst));
    let expected = usize::from(CLIENTS) / 2 * ROUNDS;
    assert_eq!((accepted, refused), (expected, expected * 2));
    assert_eq!(counts.tokens.lock().unwrap().len(), expected);
    let records = server.records();
    let of = |verdict: &str| records.iter().filter(|r| r.verdict == verdict).count();
    assert_eq!((of("affirming"), of("refused")), (accepted, refused));
    let numbers: BTreeSet<&str> = (records.iter())
        .filter(|r| !r.jti.is_empty())
        .map(|r| r.jti.as_str())
        .collect();
    assert_eq!(numbers.len(), accepted);
    let peak = server.memory_kib("VmHWM");
    println!(
        "{CLIENTS} clients: {accepted} accepted, {refused} refused; memory {idle} KiB idle, {peak} KiB at its peak"
    );
    assert!(peak < MOST_MEMORY, "{peak} KiB");
    // It still serves.
    let remote = server.remote();
    remote.challenge("pod", 0).unwrap();
}
