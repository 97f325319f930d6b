//! The embedded verifier from challenge to token, with simulated evidence: what is bound to another
//! nonce, pod, key, policy or init-data is refused by name, and every decision is in the audit log.

use std::sync::{Arc, OnceLock};

use sealpod_attestation::appraise::{Embedded, Inputs, Request, Verifier, VerifierError};
use sealpod_attestation::audit::{self, AuditLog};
use sealpod_attestation::binding::{self, EphemeralKey, Nonce, PublicKey};
use sealpod_attestation::evidence::{Bundle, GpuEvidence, Tee, gpu_digest};
use sealpod_attestation::policy::Policy;
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::signer::Signer;
use sealpod_attestation::simulate::{Ca, Defect, GpuClaims, SnpClaims, TdxClaims};
use sealpod_attestation::token::{self, Expected};
use sealpod_attestation::{Collateral, Timestamp, TrustAnchors, init_data};

const NOW: u64 = 1_800_000_000;
const POD: &str = "3f2a7c1e-0000-4000-8000-000000000001";

fn ca() -> &'static Ca {
    static CA: OnceLock<Ca> = OnceLock::new();
    CA.get_or_init(|| Ca::in_memory(Timestamp(NOW as i64)).expect("CA"))
}

fn key(fill: u8) -> PublicKey {
    EphemeralKey::from_random(&[fill; 48])
        .expect("key")
        .public()
}

fn inputs() -> Inputs {
    let references = format!(
        r#"{{"snp":{{"measurement":["{}"],"limits":{{"minimum_tcb":{{"snp":20}}}}}}}}"#,
        "02".repeat(48)
    );
    Inputs {
        anchors: TrustAnchors::from_file_text(&ca().anchors_file()).expect("anchors"),
        allow_simulated: true,
        collateral: Collateral::default(),
        references: ReferenceValues::parse(&references).expect("references"),
        policy: Policy::built_in().expect("policy"),
    }
}

struct Lab {
    dir: tempfile::TempDir,
    verifier: Embedded,
}

impl Lab {
    fn new(inputs: Inputs) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let signer = Arc::new(Signer::generate().expect("key"));
        let log = AuditLog::open(&dir.path().join("audit.log"), Arc::clone(&signer)).expect("log");
        let verifier = Embedded::new(inputs, signer, Some(log), "test");
        Self { dir, verifier }
    }

    /// Events of the log: verdict and check.
    fn events(&self) -> Vec<(String, String)> {
        let path = self.dir.path().join("audit.log");
        let checkpoint =
            std::fs::read_to_string(audit::checkpoint_path(&path)).expect("checkpoint");
        let log = std::fs::File::open(path).expect("log");
        let mut events = Vec::new();
        let key = *self.verifier.signer().public();
        audit::verify(log, &checkpoint, &key, |_, r| {
            events.push((r.verdict.clone(), r.check.clone()));
        })
        .expect("intact");
        events
    }
}

/// What a guest with this nonce, key and init-data sends.
fn bundle(nonce: &Nonce, key: PublicKey, init: &[u8], defect: Option<Defect>) -> Bundle {
    let report_data = binding::report_data(
        nonce,
        &binding::key_digest(&key),
        &gpu_digest(&[]),
        &init_data::digest(init),
        POD,
    );
    let claims = SnpClaims {
        report_data,
        measurement: [2; 48],
        host_data: init_data::host_data(init),
        ..SnpClaims::default()
    };
    let minted = ca().mint_snp(&claims, defect).expect("evidence");
    Bundle {
        tee: Tee::Snp,
        report: minted.report,
        endorsements: minted.endorsements,
        event_log: Vec::new(),
        gpus: Vec::new(),
        key,
        init_data: init.to_vec(),
    }
}

fn ask(
    lab: &Lab,
    nonce: Nonce,
    pod_uid: &str,
    bundle: &Bundle,
    now: u64,
) -> Result<String, String> {
    let request = Request {
        nonce,
        pod_uid,
        audience: "gate",
        bundle,
    };
    match lab.verifier.appraise(&request, now) {
        Ok(appraisal) => Ok(appraisal.token),
        Err(VerifierError::Refused(refusal)) => Err(refusal.check),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn good_evidence_gets_a_token_that_the_gate_accepts_once() {
    let lab = Lab::new(inputs());
    let init = init_data::InitData::default().to_text();
    let challenge = lab.verifier.challenge(POD, NOW).unwrap();
    challenge.verify(lab.verifier.signer().public()).unwrap();
    let bundle = bundle(&challenge.nonce, key(1), init.as_bytes(), None);
    let token = ask(&lab, challenge.nonce, POD, &bundle, NOW + 2).unwrap();
    let expected = Expected {
        verifiers: &lab.verifier.keys(),
        audience: "gate",
        pod_uid: POD,
        confirmation: Some(&key(1)),
        nonce: Some(&challenge.nonce),
        init_data_digest: Some(&init_data::digest(init.as_bytes())),
        now: NOW + 3,
        allow_simulated: true,
        devices: &[],
    };
    let claims = token::check(&token, &expected).unwrap();
    assert!(claims.sim && claims.exp == NOW + 302);
    assert_eq!(claims.submods["cpu0"].measurement, Some("02".repeat(48)));
    let strict = Expected {
        allow_simulated: false,
        ..expected
    };
    assert_eq!(
        token::check(&token, &strict),
        Err(token::TokenError::Simulated)
    );
    let again = ask(&lab, challenge.nonce, POD, &bundle, NOW + 3);
    assert_eq!(again, Err("nonce".into()));
    assert_eq!(
        lab.events(),
        [
            ("affirming".into(), String::new()),
            ("refused".into(), "nonce".into())
        ]
    );
}

#[test]
fn evidence_bound_to_anything_else_is_refused_by_name() {
    let lab = Lab::new(inputs());
    let fresh = || lab.verifier.challenge(POD, NOW).unwrap().nonce;

    let n = fresh();
    let late = ask(&lab, n, POD, &bundle(&n, key(1), b"", None), NOW + 60);
    assert_eq!(late, Err("nonce".into()));
    let n = fresh();
    let stale = ask(&lab, fresh(), POD, &bundle(&n, key(1), b"", None), NOW);
    assert_eq!(stale, Err("report-data".into()));
    let unknown = Nonce([7; 32]);
    let made_up = ask(
        &lab,
        unknown,
        POD,
        &bundle(&unknown, key(1), b"", None),
        NOW,
    );
    assert_eq!(made_up, Err("nonce".into()));
    let n = fresh();
    let other_pod = ask(&lab, n, "other", &bundle(&n, key(1), b"", None), NOW);
    assert_eq!(other_pod, Err("nonce-pod".into()));
    // Evidence of this pod presented with a nonce of another one.
    let n = lab.verifier.challenge("other", NOW).unwrap().nonce;
    let other_pod = ask(&lab, n, "other", &bundle(&n, key(1), b"", None), NOW);
    assert_eq!(other_pod, Err("report-data".into()));
    let n = fresh();
    let mut stolen = bundle(&n, key(1), b"", None);
    stolen.key = key(2);
    assert_eq!(ask(&lab, n, POD, &stolen, NOW), Err("report-data".into()));
    let n = fresh();
    let init = init_data::InitData::default().to_text();
    let mut swapped = bundle(&n, key(1), b"", None);
    swapped.init_data = init.into_bytes();
    assert_eq!(ask(&lab, n, POD, &swapped, NOW), Err("report-data".into()));
    let n = fresh();
    let broken = ask(&lab, n, POD, &bundle(&n, key(1), b"no toml", None), NOW);
    assert_eq!(broken, Err("init-data".into()));
    assert!(lab.events().iter().all(|(verdict, _)| verdict == "refused"));
    assert_eq!(lab.events().len(), 8);
}

#[test]
fn defects_of_the_evidence_and_the_policy_are_refused_by_name() {
    let lab = Lab::new(inputs());
    for (defect, check) in [
        (Defect::Measurement, "measurement"),
        (Defect::Debug, "policy-debug"),
        (Defect::ExpiredCertificate, "vek-chain"),
        (Defect::HostData, "host-data"),
    ] {
        let n = lab.verifier.challenge(POD, NOW).unwrap().nonce;
        let found = ask(&lab, n, POD, &bundle(&n, key(1), b"", Some(defect)), NOW);
        assert_eq!(found, Err(check.into()));
    }
    let unnamed = Lab::new(Inputs {
        allow_simulated: false,
        ..inputs()
    });
    let n = unnamed.verifier.challenge(POD, NOW).unwrap().nonce;
    let found = ask(&unnamed, n, POD, &bundle(&n, key(1), b"", None), NOW);
    assert_eq!(found, Err("policy".into()));
    let production = Lab::new(Inputs {
        anchors: TrustAnchors::production(),
        ..inputs()
    });
    let n = production.verifier.challenge(POD, NOW).unwrap().nonce;
    let found = ask(&production, n, POD, &bundle(&n, key(1), b"", None), NOW);
    assert_eq!(found, Err("vek-chain".into()));
}

#[test]
fn a_nonce_of_another_policy_is_refused_after_the_inputs_were_replaced() {
    let lab = Lab::new(inputs());
    let n = lab.verifier.challenge(POD, NOW).unwrap().nonce;
    let text = "package sealpod\nimport rego.v1\nallow := true";
    lab.verifier.replace(Inputs {
        policy: Policy::from_rego(text).unwrap(),
        ..inputs()
    });
    let found = ask(&lab, n, POD, &bundle(&n, key(1), b"", None), NOW);
    assert_eq!(found, Err("nonce-policy".into()));
    let n = lab.verifier.challenge(POD, NOW).unwrap().nonce;
    assert!(ask(&lab, n, POD, &bundle(&n, key(1), b"", None), NOW).is_ok());
}

#[test]
fn a_td_with_a_gpu_gets_a_token_for_both_and_another_nonce_in_the_gpu_is_refused() {
    let references = format!(
        r#"{{"tdx":{{"mr_td":["{}"]}},"nvidia":{{"require_rims":true,"require_revocation":true}}}}"#,
        "02".repeat(48)
    );
    let mut with = inputs();
    with.references = ReferenceValues::parse(&references).unwrap();
    let sample = ca().mint_tdx(&TdxClaims::default(), None).unwrap();
    let gpu = ca().mint_gpu(&GpuClaims::default(), None).unwrap();
    for (name, bytes) in sample.collateral.iter().chain(&gpu.collateral) {
        if name != "event-log.bin" {
            with.collateral.add(bytes).unwrap();
        }
    }
    let lab = Lab::new(with);
    // What a TD with one GPU sends; the GPU was asked with `asked`.
    let bundle = |nonce: &Nonce, asked: &Nonce| {
        let key = key(1);
        let h_k = binding::key_digest(&key);
        let claims = GpuClaims {
            nonce: binding::gpu_nonce(asked, &h_k),
            ..GpuClaims::default()
        };
        let gpu = ca().mint_gpu(&claims, None).unwrap();
        let gpus = vec![GpuEvidence {
            device_id: "0000:01:00.0".into(),
            report: gpu.report,
            certificates: gpu.endorsements,
        }];
        let claims = TdxClaims {
            report_data: binding::report_data(
                nonce,
                &h_k,
                &gpu_digest(&gpus),
                &init_data::digest(b""),
                POD,
            ),
            mr_td: [2; 48],
            ..TdxClaims::default()
        };
        let td = ca().mint_tdx(&claims, None).unwrap();
        Bundle {
            tee: Tee::Tdx,
            report: td.report,
            endorsements: Vec::new(),
            event_log: td.collateral[1].1.clone(),
            gpus,
            key,
            init_data: Vec::new(),
        }
    };
    let n = lab.verifier.challenge(POD, NOW).unwrap().nonce;
    let token = ask(&lab, n, POD, &bundle(&n, &n), NOW).unwrap();
    let expected = Expected {
        verifiers: &lab.verifier.keys(),
        audience: "gate",
        pod_uid: POD,
        confirmation: Some(&key(1)),
        nonce: Some(&n),
        init_data_digest: None,
        now: NOW,
        allow_simulated: true,
        devices: &["0000:01:00.0".to_owned()],
    };
    let claims = token::check(&token, &expected).unwrap();
    assert_eq!(claims.devices, ["0000:01:00.0"]);
    assert_eq!(claims.submods["gpu0"].tee, "nvidia");

    let n = lab.verifier.challenge(POD, NOW).unwrap().nonce;
    let other = ask(&lab, n, POD, &bundle(&n, &Nonce([9; 32])), NOW);
    assert_eq!(other, Err("nonce".into()));

    // The CRLs were made for 29 days: a token that begins 100 s before their end lives for 100 s.
    let late = NOW + 29 * 86_400 - 100;
    let n = lab.verifier.challenge(POD, late).unwrap().nonce;
    let token = ask(&lab, n, POD, &bundle(&n, &n), late).unwrap();
    let (_, claims) = token::peek(&token).unwrap();
    assert_eq!(claims["exp"], late + 100);
}
