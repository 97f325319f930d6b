//! `sealpod-attest` from minting to audit: what a CI pipeline does with simulated evidence.

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

use sealpod_attestation::audit::{AuditLog, Record};
use sealpod_attestation::binding::{EphemeralKey, Nonce};
use sealpod_attestation::encoding::hex;
use sealpod_attestation::signer::Signer;
use sealpod_attestation::token::{
    CPU, Claims, Confirmation, PROFILE, Submodule, Tier, TrustVector, VerifierId,
};

fn attest(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sealpod-attest"))
        .args(args)
        .current_dir(dir)
        .output()
        .expect("run")
}

fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr].concat();
    String::from_utf8_lossy(&all).into_owned()
}

#[track_caller]
fn ends(output: &Output, code: i32, part: &str) {
    let text = text(output);
    assert!(
        output.status.code() == Some(code) && text.contains(part),
        "expected {code} and {part:?}, got {:?}: {text}",
        output.status.code()
    );
}

#[test]
fn minted_evidence_is_accepted_under_its_anchors_and_refused_without_them() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    ends(
        &attest(dir, &["simulate", "ca", "ca"]),
        0,
        "ca/anchors.json",
    );
    for entry in std::fs::read_dir(dir.join("ca")).unwrap() {
        let entry = entry.unwrap();
        let secret = entry.path().extension().is_some_and(|e| e == "p8");
        let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, if secret { 0o600 } else { 0o644 }, "{entry:?}");
    }
    ends(
        &attest(dir, &["simulate", "ca", "ca"]),
        2,
        "holds a simulator CA already",
    );
    for (kind, defect, check) in [
        ("snp", "debug", "policy-debug"),
        ("tdx", "revoked", "pck-revocation"),
        ("gpu", "tampered-collateral", "driver-rim-signature"),
    ] {
        let mint = |output: &str, more: &[&str]| {
            let args = ["simulate", kind, "--ca", "ca", "--output", output];
            attest(dir, &[&args[..], more].concat())
        };
        let verify = |folder: &str, more: &[&str]| {
            let report = format!("{folder}/report.bin");
            let collateral = format!("{folder}/collateral");
            let args = ["verify", &report, "--collateral", &collateral];
            attest(dir, &[&args[..], more].concat())
        };
        let (good, bad) = (format!("{kind}-good"), format!("{kind}-bad"));
        ends(&mint(&good, &[]), 0, "report.bin");
        let anchors = ["--anchors", "ca/anchors.json"];
        ends(&verify(&good, &anchors), 0, "SIMULATED trust anchors");
        ends(&verify(&good, &[]), 1, "REFUSED");
        ends(&mint(&bad, &["--defect", defect]), 0, "report.bin");
        ends(&verify(&bad, &anchors), 1, check);
        ends(&mint(&bad, &["--defect", "none-such"]), 2, "known are");
    }
    ends(&attest(dir, &["simulate", "defects"]), 0, "rim-overlap");
}

#[test]
fn a_policy_decides_on_top_of_the_checks() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mint = [
        "simulate",
        "snp",
        "--ca",
        "ca",
        "--output",
        "out",
        "--measurement",
        &"ab".repeat(48),
    ];
    ends(&attest(dir, &mint), 0, "report.bin");
    let references = format!(
        r#"{{"snp":{{"measurement":["{}"],"limits":{{"minimum_tcb":{{"snp":20}}}}}}}}"#,
        "ab".repeat(48)
    );
    std::fs::write(dir.join("references.json"), references).unwrap();
    let verify = |more: &[&str]| {
        let base = [
            "verify",
            "out/report.bin",
            "--collateral",
            "out/collateral",
            "--anchors",
            "ca/anchors.json",
        ];
        attest(dir, &[&base[..], more].concat())
    };
    let zeros = |n: usize| hex(&vec![0; n]);
    let (data, host) = (zeros(64), zeros(32));
    let bound = [
        "--reference-values",
        "references.json",
        "--report-data",
        &data,
        "--host-data",
        &host,
        "--policy",
    ];
    ends(&verify(&[&bound[..], &["default"]].concat()), 0, "policy");
    ends(
        &verify(&["--policy", "default"]),
        1,
        "check measurement was not made",
    );
    std::fs::write(
        dir.join("never.rego"),
        "package sealpod\nimport rego.v1\nallow := false\ndeny contains \"closed today\"",
    )
    .unwrap();
    ends(&verify(&["--policy", "never.rego"]), 1, "closed today");
    std::fs::write(dir.join("broken.rego"), "package sealpod\nallow if {").unwrap();
    ends(
        &verify(&["--policy", "broken.rego"]),
        2,
        "broken.rego cannot be used",
    );
}

#[test]
fn tokens_are_checked_as_a_gate_does() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let signer = Signer::generate().unwrap();
    let part = Submodule {
        status: Tier::Affirming,
        trust: TrustVector::default(),
        policy: String::new(),
        tee: "snp".into(),
        sim: true,
        measurement: None,
        device_id: None,
    };
    let claims = Claims {
        eat_profile: PROFILE.into(),
        iss: "verifier".into(),
        aud: "gate".into(),
        jti: "1".into(),
        iat: 1000,
        nbf: 1000,
        exp: 1300,
        eat_nonce: Nonce([1; 32]),
        verifier: VerifierId {
            build: "test".into(),
            developer: "test".into(),
        },
        submods: [(CPU.to_owned(), part)].into(),
        cnf: Confirmation {
            jwk: EphemeralKey::from_random(&[1; 48]).unwrap().public(),
        },
        pod_uid: "pod".into(),
        policy_digest: String::new(),
        evidence_digest: String::new(),
        init_data_digest: String::new(),
        devices: Vec::new(),
        sim: true,
    };
    std::fs::write(dir.join("token"), signer.token(&claims).unwrap()).unwrap();
    let key = serde_json::to_string(signer.public()).unwrap();
    std::fs::write(dir.join("set.json"), format!(r#"{{"keys":[{key}]}}"#)).unwrap();
    std::fs::write(dir.join("key.json"), key).unwrap();
    let verify = |more: &[&str]| {
        let base = ["token", "verify", "token", "--audience", "gate", "--now"];
        attest(dir, &[&base[..], more].concat())
    };
    for key in ["key.json", "set.json"] {
        let good = ["1100", "--key", key, "--pod", "pod", "--allow-simulated"];
        ends(&verify(&good), 0, "accepted: pod pod");
    }
    let key = ["--key", "key.json", "--pod", "pod"];
    ends(&verify(&[&["1100"], &key[..]].concat()), 1, "simulated");
    ends(&verify(&[&["1300"], &key[..]].concat()), 1, "expired");
    std::fs::write(dir.join("token"), "no token").unwrap();
    ends(
        &verify(&[&["1100"], &key[..]].concat()),
        2,
        "documented form",
    );
}

#[test]
fn an_audit_log_is_shown_and_an_edited_one_found_broken() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let signer = Arc::new(Signer::generate().unwrap());
    let key = serde_json::to_string(signer.public()).unwrap();
    std::fs::write(dir.join("key.json"), key).unwrap();
    let path = dir.join("audit.log");
    let log = AuditLog::open(&path, signer).unwrap();
    for reason in ["first", "second\u{1b}[31m"] {
        let record = Record {
            event: "appraisal".into(),
            verdict: "refused".into(),
            check: "measurement".into(),
            reason: reason.into(),
            ..Record::default()
        };
        log.append(record).unwrap();
    }
    let run = |command: &str| attest(dir, &["audit", command, "audit.log", "--key", "key.json"]);
    ends(&run("verify"), 0, "intact: 2 records");
    let shown = run("show");
    ends(&shown, 0, "check=measurement reason=first");
    assert!(!text(&shown).contains('\u{1b}'));
    let changed = std::fs::read_to_string(&path)
        .unwrap()
        .replace("first", "other");
    std::fs::write(&path, changed).unwrap();
    ends(&run("verify"), 1, "broken: Line 2");
    std::fs::write(&path, "").unwrap();
    ends(&run("verify"), 1, "broken: Line 0");
}
