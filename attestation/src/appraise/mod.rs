//! Appraisal: a guest's bundle in, a token out, or the check that refused it. [`Embedded`] is the
//! verifier as a value, for the shim's process and for the server alike.
//!
//! ```text
//! challenge ─▶ nonce, single use ─▶ appraise: nonce ─▶ CPU evidence ─▶ GPU evidence ─▶ policy
//!                                                       └──────── any refusal ────────┴─▶ audit ─▶ answer
//! ```
//!
//! The verifier computes every binding itself; nothing that the guest says about its own evidence is
//! used. Every decision is in the audit log before it is answered.

mod challenges;
#[cfg(feature = "kbs")]
mod client;
mod input;
mod judge;
mod result;

use std::sync::{Arc, PoisonError, RwLock};

use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use serde::{Deserialize, Serialize};

use crate::anchors::TrustAnchors;
use crate::audit::{AuditError, AuditLog, Record};
use crate::binding::{self, Nonce, PublicKey};
use crate::challenge::{CHALLENGE_LIFE, Challenge, is_pod_uid};
use crate::collateral::Collateral;
use crate::encoding::{self, base64url, hex};
use crate::evidence::{self, Bundle, GpuEvidence};
use crate::init_data;
use crate::nvidia::Device;
use crate::policy::Policy;
use crate::reference::{ReferenceError, ReferenceValues};
use crate::signer::{Signer, SignerError};
use crate::snp;
use crate::token::Claims;

pub use challenges::MAX_CHALLENGES;
#[cfg(feature = "kbs")]
pub use client::{ClientAppraisal, ClientRequest};
pub use input::Subject;

use challenges::{Challenges, Pending};
use judge::{Bound, tee_name};
use result::Answers;

/// The check that refused evidence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("Attestation refused by check {check}: expected {expected}, found {found}")]
pub struct Refusal {
    /// Its name.
    pub check: String,
    /// What is accepted.
    pub expected: String,
    /// What the evidence holds.
    pub found: String,
}

impl Refusal {
    fn new(
        check: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self {
            check: check.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum VerifierError {
    /// The evidence is refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Too many nonces wait for an answer.
    #[error("Verifier has given out {MAX_CHALLENGES} nonces that nobody answered; try again later")]
    Busy,
    /// The decision could not be written down, so there is none.
    #[error("Audit log")]
    Audit(#[from] AuditError),
    /// Token or nonce could not be made.
    #[error("Verifier key")]
    Signer(#[from] SignerError),
    /// Reference values that are not values.
    #[error("Reference values")]
    Reference(#[from] ReferenceError),
    /// The verifier is elsewhere and cannot be reached, or does not speak the protocol.
    #[error("Remote verifier: {0}")]
    Remote(String),
}

/// One appraisal to make.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// The nonce that was answered.
    pub nonce: Nonce,
    /// The pod the caller speaks for; must be the one that the nonce was given out for.
    pub pod_uid: &'a str,
    /// Who will use the token.
    pub audience: &'a str,
    /// The evidence.
    pub bundle: &'a Bundle,
}

/// What a verifier says about a bundle that it accepts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appraisal {
    /// The token, compact.
    pub token: String,
    /// Its claims.
    pub claims: Claims,
}

/// A verifier: in this process or elsewhere. `now` is the caller's time; a remote one uses its own.
pub trait Verifier: Send + Sync {
    /// Gives out a nonce for a pod.
    ///
    /// # Errors
    /// When too many wait, or the verifier cannot be reached.
    fn challenge(&self, pod_uid: &str, now: u64) -> Result<Challenge, VerifierError>;

    /// Appraises a bundle.
    ///
    /// # Errors
    /// The refusal, or why there was no decision; both mean no.
    fn appraise(&self, request: &Request<'_>, now: u64) -> Result<Appraisal, VerifierError>;

    /// The keys whose tokens are this verifier's.
    fn keys(&self) -> Vec<PublicKey>;
}

/// What a verifier compares evidence with; can be replaced while it runs.
#[derive(Clone, Debug)]
pub struct Inputs {
    /// The roots.
    pub anchors: TrustAnchors,
    /// Whether evidence under roots from a file gets a token (which says `sim: true`).
    pub allow_simulated: bool,
    /// Certificates, CRLs, TDX collateral, RIMs, OCSP responses.
    pub collateral: Collateral,
    /// Reference values.
    pub references: ReferenceValues,
    /// The policy.
    pub policy: Policy,
}

/// The verifier as a value.
#[derive(Debug)]
pub struct Embedded {
    inputs: RwLock<Arc<Inputs>>,
    signer: Arc<Signer>,
    audit: Option<AuditLog>,
    issuer: String,
    challenges: Challenges,
}

impl Embedded {
    /// A verifier. Without an audit log nothing is written down; gates should have one.
    pub fn new(
        inputs: Inputs,
        signer: Arc<Signer>,
        audit: Option<AuditLog>,
        issuer: impl Into<String>,
    ) -> Self {
        Self {
            inputs: RwLock::new(Arc::new(inputs)),
            signer,
            audit,
            issuer: issuer.into(),
            challenges: Challenges::default(),
        }
    }

    /// Replaces what evidence is compared with. Appraisals that have begun end with the old inputs;
    /// nonces that were given out under another policy are refused.
    pub fn replace(&self, inputs: Inputs) {
        *self.inputs.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(inputs);
    }

    /// What evidence is compared with now.
    pub fn inputs(&self) -> Arc<Inputs> {
        Arc::clone(&self.inputs.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The signing key.
    pub fn signer(&self) -> &Arc<Signer> {
        &self.signer
    }

    /// How many nonces wait for an answer.
    pub fn waiting(&self) -> usize {
        self.challenges.len()
    }

    /// Writes to the audit log, if there is one.
    ///
    /// # Errors
    /// When the record is not on the disk.
    pub fn record(&self, record: Record) -> Result<(), AuditError> {
        self.audit.as_ref().map_or(Ok(()), |log| log.append(record))
    }

    /// The decision, without the audit log.
    fn decide(
        &self,
        inputs: &Inputs,
        request: &Request<'_>,
        now: u64,
    ) -> Result<Claims, VerifierError> {
        self.check_nonce(inputs, request, now)?;
        let bundle = request.bundle;
        let bound = bound(request)?;
        let findings = judge::judge(inputs, &bound, now)?;
        let answers = Answers {
            nonce: request.nonce,
            key: bundle.key,
            evidence_digest: hex(&bundle.digest()),
        };
        result::claims(&self.issuer, inputs, &bound, &findings, answers, now)
    }

    /// Writes a decision down, and only then gives out the token.
    fn conclude<K: Serialize>(
        &self,
        mut record: Record,
        decision: Result<Claims<K>, VerifierError>,
    ) -> Result<(String, Claims<K>), VerifierError> {
        match decision {
            Ok(claims) => {
                let token = self.signer.token(&claims)?;
                record.verdict = "affirming".into();
                record.jti.clone_from(&claims.jti);
                record.devices.clone_from(&claims.devices);
                record.sim = claims.sim;
                self.record(record)?;
                Ok((token, claims))
            }
            Err(VerifierError::Refused(refusal)) => {
                record.verdict = "refused".into();
                record.check = shown(&refusal.check);
                let reason = format!("expected {}, found {}", refusal.expected, refusal.found);
                record.reason = reason.chars().take(2000).collect();
                self.record(record)?;
                Err(refusal.into())
            }
            Err(other) => {
                record.verdict = "undecided".into();
                record.reason = crate::verdict::chain_text(&other);
                self.record(record)?;
                Err(other)
            }
        }
    }

    fn check_nonce(&self, inputs: &Inputs, request: &Request<'_>, now: u64) -> Result<(), Refusal> {
        let pending = self.challenges.take(&request.nonce, now).map_err(|found| {
            let expected = "a nonce of this verifier, not answered yet, not older than 60 s";
            Refusal::new("nonce", expected, found)
        })?;
        if pending.pod_uid != request.pod_uid {
            let found = format!("asked for by {:?}", pending.pod_uid);
            let expected = format!("a nonce of pod {:?}", shown(request.pod_uid));
            return Err(Refusal::new("nonce-pod", expected, found));
        }
        if pending.policy_digest != *inputs.policy.digest() {
            let found = hex(&pending.policy_digest);
            return Err(Refusal::new(
                "nonce-policy",
                hex(inputs.policy.digest()),
                found,
            ));
        }
        Ok(())
    }
}

fn shown(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(128).collect()
}

impl Verifier for Embedded {
    fn challenge(&self, pod_uid: &str, now: u64) -> Result<Challenge, VerifierError> {
        if !is_pod_uid(pod_uid) {
            let expected = "1 to 128 printable characters without spaces";
            return Err(Refusal::new("pod-uid", expected, shown(pod_uid)).into());
        }
        let mut nonce = [0; 32];
        let random = SystemRandom::new().fill(&mut nonce);
        random.map_err(|_| SignerError::Library)?;
        let policy_digest = *self.inputs().policy.digest();
        let pending = Pending {
            pod_uid: pod_uid.to_owned(),
            policy_digest,
            issued: now,
        };
        if !self.challenges.insert(Nonce(nonce), pending) {
            return Err(VerifierError::Busy);
        }
        let mut challenge = Challenge {
            nonce: Nonce(nonce),
            pod_uid: pod_uid.to_owned(),
            policy_digest: hex(&policy_digest),
            issued: now,
            expires: now.saturating_add(CHALLENGE_LIFE),
            signature: String::new(),
        };
        challenge.signature = base64url(&self.signer.sign(&challenge.signed())?);
        Ok(challenge)
    }

    fn appraise(&self, request: &Request<'_>, now: u64) -> Result<Appraisal, VerifierError> {
        let inputs = self.inputs();
        let decision = self.decide(&inputs, request, now);
        let record = Record {
            event: "appraisal".into(),
            time: now,
            pod_uid: shown(request.pod_uid),
            audience: shown(request.audience),
            tee: tee_name(request.bundle.tee).into(),
            evidence: hex(&request.bundle.digest()),
            policy: hex(inputs.policy.digest()),
            init_data: hex(&init_data::digest(&request.bundle.init_data)),
            ..Record::default()
        };
        let (token, claims) = self.conclude(record, decision)?;
        Ok(Appraisal { token, claims })
    }

    fn keys(&self) -> Vec<PublicKey> {
        vec![*self.signer.public()]
    }
}

/// A bundle's evidence, with the bindings as this side computes them.
fn bound<'a>(request: &Request<'a>) -> Result<Bound<'a>, Refusal> {
    let bundle = request.bundle;
    let key_digest = binding::key_digest(&bundle.key);
    let certificates = if bundle.endorsements.is_empty() {
        Vec::new()
    } else {
        snp::cert_table(&bundle.endorsements)
            .map_err(|e| refused("endorsements", "AMD's certificate table", &e))?
    };
    Ok(Bound {
        tee: bundle.tee,
        report: &bundle.report,
        certificates,
        event_log: &bundle.event_log,
        devices: bundle.gpus.iter().map(device).collect::<Result<_, _>>()?,
        init_data: &bundle.init_data,
        report_data: binding::report_data(
            &request.nonce,
            &key_digest,
            &evidence::gpu_digest(&bundle.gpus),
            &init_data::digest(&bundle.init_data),
            request.pod_uid,
        ),
        device_nonce: binding::gpu_nonce(&request.nonce, &key_digest),
        pod_uid: request.pod_uid,
        audience: request.audience,
    })
}

fn device(gpu: &GpuEvidence) -> Result<Device, Refusal> {
    let expected = "a certificate chain in PEM";
    let text = std::str::from_utf8(&gpu.certificates)
        .map_err(|e| refused("chain-format", expected, &e))?;
    let blocks = encoding::pem_blocks(text).map_err(|e| refused("chain-format", expected, &e))?;
    if blocks.is_empty() {
        return Err(Refusal::new("chain-format", expected, "none"));
    }
    Ok(Device {
        name: gpu.device_id.clone(),
        report: gpu.report.clone(),
        chain: blocks.into_iter().map(|b| b.1).collect(),
    })
}

fn refused(check: &str, expected: &str, error: &dyn std::error::Error) -> Refusal {
    Refusal::new(check, expected, crate::verdict::chain_text(error))
}
