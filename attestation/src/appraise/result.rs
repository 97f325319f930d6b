//! The claims of a token, from what was found: an EAT attestation result whose life ends with the
//! first thing that it rests on.

use std::collections::BTreeMap;

use aws_lc_rs::rand::{SecureRandom, SystemRandom};

use super::judge::{Bound, Findings};
use super::{Inputs, Refusal, VerifierError};
use crate::binding::Nonce;
use crate::encoding::{base64url, hex};
use crate::init_data;
use crate::signer::SignerError;
use crate::token::{
    CPU, Claims, Confirmation, MAX_LIFE, PROFILE, Submodule, Tier, TrustVector, VerifierId,
};
use crate::verdict::{Outcome, Verdict};

/// AR4SI: affirming.
const AFFIRMING: i8 = 2;

/// What the token answers: the question, and whom.
pub(super) struct Answers<K> {
    pub(super) nonce: Nonce,
    pub(super) key: K,
    /// Hexadecimal.
    pub(super) evidence_digest: String,
}

pub(super) fn claims<K>(
    issuer: &str,
    inputs: &Inputs,
    bound: &Bound<'_>,
    findings: &Findings,
    answers: Answers<K>,
    now: u64,
) -> Result<Claims<K>, VerifierError> {
    let policy = hex(inputs.policy.digest());
    let part = |verdict: &Verdict, trust| Submodule {
        status: Tier::Affirming,
        trust,
        policy: format!("sha384:{policy}"),
        tee: verdict.tee.to_string(),
        sim: verdict.simulated,
        measurement: None,
        device_id: None,
    };
    let mut cpu = part(
        &findings.cpu,
        trust(&findings.cpu, &["measurement", "mr-td"]),
    );
    let name = match bound.tee {
        crate::evidence::Tee::Snp => "measurement",
        crate::evidence::Tee::Tdx => "mr_td",
    };
    let measurement = findings.cpu.claims.get(name).and_then(|m| m.as_str());
    cpu.measurement = measurement.map(str::to_owned);
    let mut submods = BTreeMap::from([(CPU.to_owned(), cpu)]);
    let mut devices = Vec::new();
    if let Some(verdict) = &findings.gpus {
        let trust = trust(verdict, &["measurements", "0/measurements"]);
        for (n, gpu) in bound.devices.iter().enumerate() {
            let mut device = part(verdict, trust);
            device.device_id = Some(gpu.name.clone());
            submods.insert(format!("gpu{n}"), device);
            devices.push(gpu.name.clone());
        }
    }

    let collateral = findings
        .all()
        .filter_map(|v| v.expires)
        .map(|e| u64::try_from(e.0).unwrap_or(0))
        .min();
    let exp = now
        .saturating_add(MAX_LIFE)
        .min(collateral.unwrap_or(u64::MAX));
    if exp <= now {
        let expected = "endorsements and collateral that outlive the token";
        return Err(Refusal::new("collateral", expected, "they end now").into());
    }
    Ok(Claims {
        eat_profile: PROFILE.into(),
        iss: issuer.into(),
        aud: bound.audience.into(),
        jti: number()?,
        iat: now,
        nbf: now,
        exp,
        eat_nonce: answers.nonce,
        verifier: VerifierId {
            build: concat!("sealpod-attestation ", env!("CARGO_PKG_VERSION")).into(),
            developer: "sealpod".into(),
        },
        submods,
        cnf: Confirmation { jwk: answers.key },
        pod_uid: bound.pod_uid.into(),
        policy_digest: policy,
        evidence_digest: answers.evidence_digest,
        init_data_digest: hex(&init_data::digest(bound.init_data)),
        devices,
        sim: findings.all().any(|v| v.simulated),
    })
}

/// What the checks say about the four AR4SI claims. Accepted evidence is of genuine, current hardware
/// whose identity was verified; whether the software is known depends on reference values.
fn trust(verdict: &Verdict, software: &[&str]) -> TrustVector {
    let known = software.iter().any(|name| {
        verdict
            .check(name)
            .is_some_and(|c| c.outcome == Outcome::Pass)
    });
    TrustVector {
        instance_identity: AFFIRMING,
        configuration: AFFIRMING,
        executables: if known { AFFIRMING } else { 0 },
        hardware: AFFIRMING,
    }
}

/// A token's number: 16 random bytes.
fn number() -> Result<String, VerifierError> {
    let mut bytes = [0; 16];
    let random = SystemRandom::new().fill(&mut bytes);
    random.map_err(|_| SignerError::Library)?;
    Ok(base64url(&bytes))
}
