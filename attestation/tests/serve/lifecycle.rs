//! Start, reload, drain, restart: what stays and what does not.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use rustix::process::Signal;
use sealpod_attestation::appraise::Verifier;
use sealpod_attestation::evidence::Tee;
use sealpod_attestation::remote::{Remote, read_pin};
use serde_json::json;

use crate::client::{connect, receive, request};
use crate::lab::{Guest, Server};
use crate::pods::ask;

const POD: &str = "pod";

#[test]
fn a_restart_keeps_keys_certificate_and_log_and_forgets_every_nonce() {
    let server = Server::start();
    let guest = Guest::new(Tee::Snp, POD);
    let remote = server.remote();
    ask(&remote, &remote.challenge(POD, 0).unwrap().nonce, &guest).unwrap();
    let before = remote.challenge(POD, 0).unwrap().nonce;
    let (pin, kid) = (server.pin.clone(), server.kid.clone());
    let server = server.restart();
    assert_eq!((&server.pin, &server.kid), (&pin, &kid));
    let remote = server.remote();
    assert_eq!(ask(&remote, &before, &guest).unwrap_err(), "nonce");
    ask(&remote, &remote.challenge(POD, 0).unwrap().nonce, &guest).unwrap();
    let verdicts: Vec<String> = server.records().into_iter().map(|r| r.verdict).collect();
    assert_eq!(verdicts, ["affirming", "refused", "affirming"]);
    for (file, mode) in [
        ("tls-key.pem", 0o600),
        ("verifier-key.p8", 0o600),
        (".", 0o700),
    ] {
        let path = server.dir.path().join("state").join(file);
        let found = std::fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(found & 0o777, mode, "{file}");
    }
}

#[test]
fn a_server_that_ends_finishes_what_was_begun_and_takes_nothing_new() {
    let mut server = Server::start();
    let body = json!({ "pod_uid": POD }).to_string();
    let text = request("POST", "/v1/challenge", "Expect: 100-continue\r\n", &body);
    let (begun, rest) = text.split_at(text.len() - body.len());
    let mut stream = connect(&server);
    stream.write_all(begun.as_bytes()).unwrap();
    stream.flush().unwrap();
    // The server has the request's head, and asks for its body.
    let mut go_on = [0; b"HTTP/1.1 100 Continue\r\n\r\n".len()];
    stream.read_exact(&mut go_on).unwrap();
    server.signal(Signal::TERM);
    server.wait_for_log("draining");
    stream.write_all(rest.as_bytes()).unwrap();
    let answer = receive(&mut stream).unwrap();
    assert_eq!(answer.status, 200, "{answer:?}");
    assert!(std::net::TcpStream::connect(server.address).is_err());
    assert_eq!(server.ended(), Some(0));
    server.wait_for_log("drained");
}

#[test]
fn a_reload_changes_what_is_judged_by_and_loses_no_request() {
    let server = Server::start();
    let guest = Guest::new(Tee::Snp, POD);
    let remote = server.remote();
    let judge = || ask(&remote, &remote.challenge(POD, 0).unwrap().nonce, &guest);
    judge().unwrap();
    // Requests go on while it reloads, again and again.
    let busy = std::thread::scope(|scope| {
        let busy = scope.spawn(|| (0..60).filter(|_| remote.challenge(POD, 0).is_ok()).count());
        for _ in 0..5 {
            server.signal(Signal::HUP);
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        busy.join().unwrap()
    });
    assert_eq!(busy, 60);
    server.wait_for_log("reloaded");
    let references = server.dir.path().join("references.json");
    let text = std::fs::read_to_string(&references).unwrap();
    // What cannot be read changes nothing.
    std::fs::write(&references, "{").unwrap();
    server.signal(Signal::HUP);
    server.wait_for_log("not reloaded");
    judge().unwrap();
    let done = || server.metric("sealpod_attest_reloads_total{result=\"done\"}");
    let before = done();
    std::fs::write(
        &references,
        text.replace(&"02".repeat(48), &"03".repeat(48)),
    )
    .unwrap();
    server.signal(Signal::HUP);
    while done() == before {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert_eq!(judge().unwrap_err(), "measurement");
}

#[test]
fn a_reload_takes_a_new_certificate() {
    let server = Server::start();
    let state = server.dir.path().join("state");
    let other = Server::start();
    for file in ["tls-key.pem", "tls-certificate.pem"] {
        let from = other.dir.path().join("state").join(file);
        std::fs::copy(from, state.join(file)).unwrap();
    }
    server.signal(Signal::HUP);
    server.wait_for_log("reloaded");
    let url = format!("https://{}", server.address);
    let fetch = |pin: &str| {
        let mut remote = Remote::new(&url, read_pin(pin).unwrap(), Vec::new()).unwrap();
        remote.fetch_keys().is_ok()
    };
    assert!(fetch(&other.pin) && !fetch(&server.pin));
}

#[test]
fn configuration_with_errors_is_named_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("serve.toml");
    for (text, parts) in [
        (
            "[limits]\nconections = 1\n",
            &[
                "serve.toml",
                "line 2",
                "conections",
                "connections_per_address",
            ][..],
        ),
        (
            "[limits]\nconnections = 0\n",
            &["limits.connections", "1 to 65536"],
        ),
        ("listen = 7\n", &["serve.toml", "listen"]),
        (
            "state = \"s\"\n[verifier]\nanchors = \"none.json\"\n",
            &["none.json"],
        ),
        ("state = \"s\"\n[kbs]\nresources = \"none\"\n", &["none"]),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_sealpod-attest"))
            .args(["serve", "--listen", "127.0.0.1:0", "--config"])
            .arg(&file)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{text}: {said}");
        assert!(parts.iter().all(|p| said.contains(p)), "{text}: {said}");
        let own = said.lines().all(|l| l.starts_with("sealpod-attest: "));
        assert!(own, "more than one line for an error: {said}");
    }
}
