//! First inputs for the attestation targets: what the simulator mints, and one of every message.

use sealpod_attestation::binding::{self, EphemeralKey, Nonce};
use sealpod_attestation::encoding::base64;
use sealpod_attestation::evidence::{Bundle, Tee};
use sealpod_attestation::init_data::InitData;
use sealpod_attestation::simulate::{Ca, GpuClaims, Minted, SnpClaims, TdxClaims};
use sealpod_attestation::{Timestamp, snp};
use serde_json::json;

use crate::write;

fn tagged(choice: u8, bytes: &[u8]) -> Vec<u8> {
    [&[choice][..], bytes].concat()
}

/// A report with its length before it and collateral behind.
fn with_collateral(choice: u8, report: &[u8], collateral: &[u8]) -> Vec<u8> {
    let length = (report.len() as u16).to_le_bytes();
    [&[choice][..], &length, report, collateral].concat()
}

/// Writes all of them.
pub fn seeds(folder: &std::path::Path) -> std::io::Result<()> {
    let ca = Ca::in_memory(Timestamp(1_795_219_200)).map_err(std::io::Error::other)?;
    let minted = |minted: Result<Minted, _>| minted.map_err(std::io::Error::other);
    let snp = minted(ca.mint_snp(&SnpClaims::default(), None))?;
    let tdx = minted(ca.mint_tdx(&TdxClaims::default(), None))?;
    let gpu = minted(ca.mint_gpu(&GpuClaims::default(), None))?;
    write(folder, "attestation_evidence", &evidence(&snp, &tdx, &gpu))?;
    let files: Vec<_> = [&snp, &tdx, &gpu]
        .iter()
        .flat_map(|m| &m.collateral)
        .collect();
    let mut collateral: Vec<Vec<u8>> = Vec::new();
    for choice in [0, 1, 2, 3, 4, 5, 6] {
        collateral.extend(files.iter().map(|(_, bytes)| tagged(choice, bytes)));
    }
    for certificate in snp::cert_table(&snp.endorsements).unwrap_or_default() {
        collateral.push(tagged(0, &certificate));
    }
    collateral.push(tagged(9, &gpu.endorsements));
    collateral.push(tagged(8, ca.anchors_file().as_bytes()));
    let references = format!(
        r#"{{"snp":{{"measurement":["{}"],"limits":{{"minimum_tcb":{{"snp":8}}}}}},"nvidia":{{"gpus":8}}}}"#,
        "ab".repeat(48)
    );
    collateral.push(tagged(7, references.as_bytes()));
    write(folder, "attestation_collateral", &collateral)?;
    write(folder, "attestation_messages", &messages(&snp, &tdx))
}

fn bundle(snp: &Minted) -> Option<Vec<u8>> {
    let key = EphemeralKey::from_random(&[1; 48]).ok()?.public();
    let bundle = Bundle {
        tee: Tee::Snp,
        report: snp.report.clone(),
        endorsements: snp.endorsements.clone(),
        event_log: Vec::new(),
        gpus: Vec::new(),
        key,
        init_data: InitData::default().to_text().into_bytes(),
    };
    bundle.to_json().ok()
}

fn evidence(snp: &Minted, tdx: &Minted, gpu: &Minted) -> Vec<Vec<u8>> {
    let list = json!([{ "arch": "HOPPER", "evidence": base64(&gpu.report), "certificate": base64(&gpu.endorsements) }]);
    let mut seeds = vec![
        with_collateral(0, &snp.report, &snp.endorsements),
        with_collateral(0, &tdx.report, &[]),
        tagged(1, &snp.endorsements),
        tagged(4, &gpu.report),
        tagged(5, list.to_string().as_bytes()),
    ];
    seeds.extend(tdx.collateral.iter().map(|(_, bytes)| tagged(2, bytes)));
    seeds.extend(bundle(snp).map(|json| tagged(6, &json)));
    seeds
}

fn messages(snp: &Minted, tdx: &Minted) -> Vec<Vec<u8>> {
    let key = json!({ "kty": "EC", "crv": "P-256", "alg": "ECDH-ES+A256KW",
        "x": "axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY", "y": "T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU" });
    let attestation = |primary: serde_json::Value| {
        json!({ "init-data": null, "runtime-data": { "nonce": "bm9uY2U=", "tee-pubkey": key },
            "tee-evidence": { "primary_evidence": primary, "additional_evidence": "" } })
    };
    let request = json!({ "version": "0.4.0", "tee": "snp", "extra-params": { "supported-hash-algorithms": ["sha512"] } });
    let input = json!({ "version": 1, "now": 1, "pod": { "uid": "p" }, "audience": "a", "simulated": false,
        "allow_simulated": false, "gpus": [], "init_data": {},
        "cpu": { "tee": "snp", "claims": { "policy": { "debug": false } },
            "checks": { "report-data": "fail", "host-data": "pass", "measurement": "pass", "tcb-minimum": "pass" } } });
    let challenge = json!({ "nonce": Nonce([1; 32]), "pod_uid": "p", "policy_digest": "00", "issued": 1,
        "expires": 61, "signature": "AAAA" });
    let header = "eyJhbGciOiJFUzM4NCIsImtpZCI6ImsiLCJ0eXAiOiJKV1QifQ";
    let jwk = EphemeralKey::from_random(&[1; 48]).map(|k| json!(k.public()));
    vec![
        tagged(0, format!("{header}.e30.AAAA").as_bytes()),
        tagged(1, challenge.to_string().as_bytes()),
        tagged(2, InitData::default().to_text().as_bytes()),
        tagged(
            2,
            b"version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"a\" = '''\nb\n'''\n",
        ),
        tagged(3, request.to_string().as_bytes()),
        tagged(
            4,
            attestation(json!({ "quote": base64(&tdx.report) }))
                .to_string()
                .as_bytes(),
        ),
        tagged(
            4,
            attestation(json!({ "attestation_report": base64(&snp.report), "cert_chain": [] }))
                .to_string()
                .as_bytes(),
        ),
        tagged(5, input.to_string().as_bytes()),
        tagged(6, jwk.unwrap_or_default().to_string().as_bytes()),
        tagged(4, &binding::gpu_nonce(&Nonce([1; 32]), &[0; 48])),
    ]
}
