//! Pods: a challenge, evidence, a token; and every way in which evidence is not what was asked for.

use sealpod_attestation::appraise::{Request, Verifier, VerifierError};
use sealpod_attestation::binding::Nonce;
use sealpod_attestation::evidence::Tee;
use sealpod_attestation::remote::{Remote, read_pin};
use sealpod_attestation::simulate::Defect;
use sealpod_attestation::token::{self, Expected};
use serde_json::json;

use crate::client::{get, post};
use crate::lab::{Guest, Server, key, now};

const POD: &str = "3f2a7c1e-0000-4000-8000-000000000001";

/// Asks for a token: the token, or the check that refused.
pub(crate) fn ask(remote: &Remote, nonce: &Nonce, guest: &Guest) -> Result<String, String> {
    let request = Request {
        nonce: *nonce,
        pod_uid: &guest.pod,
        audience: "gate",
        bundle: &guest.bundle(nonce),
    };
    match remote.appraise(&request, 0) {
        Ok(appraisal) => Ok(appraisal.token),
        Err(VerifierError::Refused(refusal)) => Err(refusal.check),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn good_evidence_of_every_kind_gets_a_token_that_a_gate_accepts() {
    let server = Server::start();
    let remote = server.remote();
    let keys = remote.keys();
    assert_eq!(keys[0].thumbprint(), server.kid);
    for (tee, gpus) in [(Tee::Snp, 0), (Tee::Tdx, 0), (Tee::Snp, 1), (Tee::Tdx, 1)] {
        let guest = Guest {
            gpus,
            ..Guest::new(tee, POD)
        };
        let challenge = remote.challenge(POD, 0).unwrap();
        challenge.verify(&keys[0]).unwrap();
        let token = ask(&remote, &challenge.nonce, &guest).unwrap();
        let devices = vec!["0000:00:00.0".to_owned(); gpus];
        let expected = Expected {
            verifiers: &keys,
            audience: "gate",
            pod_uid: POD,
            confirmation: Some(&guest.key),
            nonce: Some(&challenge.nonce),
            init_data_digest: None,
            now: now(),
            allow_simulated: true,
            devices: &devices,
        };
        let claims = token::check(&token, &expected).unwrap();
        assert!(claims.sim, "{tee:?}");
        // The verdict of simulated evidence is worth nothing at a production gate.
        let production = Expected {
            allow_simulated: false,
            ..expected
        };
        assert!(token::check(&token, &production).is_err());
    }
    let verdicts: Vec<String> = server.records().into_iter().map(|r| r.verdict).collect();
    assert_eq!(verdicts, ["affirming"; 4]);
}

#[test]
fn evidence_that_answers_anything_else_is_refused_by_name_and_written_down() {
    let server = Server::start();
    let remote = server.remote();
    let fresh = || remote.challenge(POD, 0).unwrap().nonce;
    let guest = Guest::new(Tee::Snp, POD);
    let spent = fresh();
    ask(&remote, &spent, &guest).unwrap();
    let refused = |nonce: &Nonce, guest: &Guest| ask(&remote, nonce, guest).unwrap_err();
    // Once more, and never given out.
    assert_eq!(refused(&spent, &guest), "nonce");
    assert_eq!(refused(&Nonce([7; 32]), &guest), "nonce");
    // Of another pod.
    let other = Guest::new(Tee::Snp, "another-pod");
    assert_eq!(refused(&fresh(), &other), "nonce-pod");
    // Evidence for another nonce, and of another guest's key.
    let send = |asked: &Nonce, bundle: &sealpod_attestation::evidence::Bundle| {
        let request = Request {
            nonce: *asked,
            pod_uid: POD,
            audience: "gate",
            bundle,
        };
        match remote.appraise(&request, 0) {
            Err(VerifierError::Refused(refusal)) => refusal.check,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(send(&fresh(), &guest.bundle(&fresh())), "report-data");
    let nonce = fresh();
    let mut stolen = guest.bundle(&nonce);
    stolen.key = key(2);
    assert_eq!(send(&nonce, &stolen), "report-data");
    // What is wrong with the guest itself.
    let defect = |defect| Guest {
        defect: Some(defect),
        ..guest.clone()
    };
    assert_eq!(refused(&fresh(), &defect(Defect::Debug)), "policy-debug");
    let checks: Vec<String> = server.records().into_iter().map(|r| r.check).collect();
    let expected = [
        "",
        "nonce",
        "nonce",
        "nonce-pod",
        "report-data",
        "report-data",
        "policy-debug",
    ];
    assert_eq!(checks, expected);
}

#[test]
fn a_server_with_another_key_is_not_spoken_to() {
    let server = Server::start();
    let url = format!("https://{}", server.address);
    let pin = "ab".repeat(48);
    let mut remote = Remote::new(&url, read_pin(&pin).unwrap(), Vec::new()).unwrap();
    let error = format!("{:?}", remote.fetch_keys().unwrap_err());
    assert!(error.contains("ApplicationVerificationFailure"), "{error}");
    assert!(remote.challenge(POD, 0).is_err());
    // The pin can also be read from the certificate.
    let pem = std::fs::read_to_string(server.dir.path().join("state/tls-certificate.pem")).unwrap();
    assert_eq!(read_pin(&pem).unwrap(), read_pin(&server.pin).unwrap());
}

#[test]
fn a_token_of_an_unknown_verifier_is_not_passed_on() {
    let server = Server::start();
    let url = format!("https://{}", server.address);
    let pin = read_pin(&server.pin).unwrap();
    let remote = Remote::new(&url, pin, vec![key(9)]).unwrap();
    let nonce = remote.challenge(POD, 0).unwrap().nonce;
    let guest = Guest::new(Tee::Snp, POD);
    let request = Request {
        nonce,
        pod_uid: POD,
        audience: "gate",
        bundle: &guest.bundle(&nonce),
    };
    let error = remote.appraise(&request, 0).unwrap_err().to_string();
    assert!(error.contains("not a trusted verifier's"), "{error}");
}

#[test]
fn requests_that_are_none_are_told_what_is_wrong() {
    let server = Server::start();
    for (path, body, status) in [
        ("/v1/challenge", json!({}), 400),
        ("/v1/challenge", json!({ "pod_uid": 7 }), 400),
        ("/v1/challenge", json!({ "pod_uid": "a", "more": 1 }), 400),
        ("/v1/challenge", json!({ "pod_uid": "a b" }), 403),
        ("/v1/challenge", json!({ "pod_uid": "a".repeat(200) }), 403),
        ("/v1/appraise", json!({ "nonce": "AA" }), 400),
        (
            "/v1/appraise",
            json!({ "nonce": "A".repeat(43), "pod_uid": "p", "audience": "", "bundle": {} }),
            400,
        ),
        ("/v1/appraise", json!([[[[]]]]), 400),
        (
            "/kbs/v0/auth",
            json!({ "version": "0.1.0", "tee": "snp", "extra-params": "" }),
            401,
        ),
        (
            "/kbs/v0/auth",
            json!({ "version": "0.4.0", "tee": "sample", "extra-params": "" }),
            401,
        ),
    ] {
        let answer = post(&server, path, &body);
        assert_eq!(answer.status, status, "{path} {body}: {answer:?}");
        assert!(answer.json().is_object());
    }
    assert_eq!(get(&server, "/v1/challenge").0, 405);
    assert_eq!(get(&server, "/").0, 404);
    assert_eq!(get(&server, "/healthz"), (200, "ok\n".into()));
    let jwks: serde_json::Value =
        serde_json::from_str(&get(&server, "/.well-known/jwks.json").1).unwrap();
    assert_eq!(jwks["keys"][0]["kid"], server.kid);
    // Nothing of this was a decision about evidence.
    assert!(!server.dir.path().join("state/audit.log").exists() || server.records().is_empty());
}
