//! The verifier behind the routes: made from the configuration, made anew on reload, and asked. Turns
//! its answers into HTTP's.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use anyhow::Context;
use hyper::StatusCode;
use sealpod_attestation::appraise::{
    ClientAppraisal, ClientRequest, Embedded, Inputs, Request, Verifier, VerifierError,
};
use sealpod_attestation::audit::{AuditLog, Record};
use sealpod_attestation::binding::Nonce;
use sealpod_attestation::evidence::{self, Bundle};
use sealpod_attestation::policy::{self, Policy};
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::signer::Signer;
use sealpod_attestation::verdict::chain_text;
use sealpod_attestation::{Collateral, TrustAnchors};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;

use super::answer::Answer;
use super::config::Config;
use super::metrics::{Judged, Metrics};
use super::tls;
use crate::input;

/// File names in the state folder.
const KEY: &str = "verifier-key.p8";
const AUDIT: &str = "audit.log";
/// The key's public half, as init-data of pods names it.
const PUBLIC: &str = "verifier.jwk";
/// Longest anchors, reference values and policy.
const MAX_INPUT: u64 = 4 << 20;
/// Longest audience of a token.
const MAX_AUDIENCE: usize = 256;

/// The verifier.
pub(crate) struct Backend {
    verifier: Embedded,
    /// Whether the last audit record could be written.
    audit_works: AtomicBool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ask {
    pod_uid: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Evidence<'a> {
    nonce: Nonce,
    pod_uid: String,
    audience: String,
    #[serde(borrow)]
    bundle: &'a RawValue,
}

impl Backend {
    /// Loads everything; makes the signing key where there is none.
    pub(crate) fn open(config: &Config) -> anyhow::Result<Self> {
        let signer = Arc::new(signing_key(&config.state.join(KEY))?);
        let public = config.state.join(PUBLIC);
        std::fs::write(&public, serde_json::to_vec(signer.public())?)
            .with_context(|| format!("Cannot write {}", public.display()))?;
        let path = config.state.join(AUDIT);
        let audit = AuditLog::open(&path, Arc::clone(&signer))
            .with_context(|| format!("Cannot use {}", path.display()))?;
        let issuer = config.verifier.issuer.clone();
        let verifier = Embedded::new(inputs(config)?, signer, Some(audit), issuer);
        Ok(Self {
            verifier,
            audit_works: AtomicBool::new(true),
        })
    }

    /// Loads anchors, collateral, reference values and policy anew.
    pub(crate) fn reload(&self, config: &Config) -> anyhow::Result<()> {
        self.verifier.replace(inputs(config)?);
        Ok(())
    }

    /// The name of the key that signs tokens.
    pub(crate) fn kid(&self) -> String {
        self.verifier.signer().public().thumbprint()
    }

    /// `GET /.well-known/jwks.json` (RFC 7517).
    pub(crate) fn jwks(&self) -> Answer {
        let keys = self.verifier.keys().into_iter().map(|key| {
            let mut jwk = json!(key);
            jwk["kid"] = key.thumbprint().into();
            jwk["alg"] = "ES384".into();
            jwk["use"] = "sig".into();
            jwk
        });
        Answer::json(&json!({ "keys": keys.collect::<Vec<_>>() }))
    }

    /// `POST /v1/challenge`: `{"pod_uid"}` → the challenge.
    pub(crate) fn challenge(&self, body: &[u8]) -> Answer {
        let asked: Ask = match serde_json::from_slice(body) {
            Ok(asked) => asked,
            Err(error) => return Answer::malformed(&error),
        };
        match self.verifier.challenge(&asked.pod_uid, now()) {
            Ok(challenge) => Answer::json(&challenge),
            Err(error) => self.refused(&error),
        }
    }

    /// `POST /v1/appraise`: `{"nonce", "pod_uid", "audience", "bundle"}` → `{"token"}`.
    pub(crate) fn appraise(&self, metrics: &Metrics, body: &[u8]) -> Answer {
        let asked: Evidence<'_> = match serde_json::from_slice(body) {
            Ok(asked) => asked,
            Err(error) => return Answer::malformed(&error),
        };
        let bundle = match Bundle::from_json(asked.bundle.get().as_bytes()) {
            Ok(bundle) => bundle,
            Err(error) => return Answer::malformed(&error),
        };
        if !(1..=MAX_AUDIENCE).contains(&asked.audience.len()) {
            let text = "audience has 1 to 256 bytes";
            return Answer::error(StatusCode::BAD_REQUEST, "malformed", text);
        }
        let request = Request {
            nonce: asked.nonce,
            pod_uid: &asked.pod_uid,
            audience: &asked.audience,
            bundle: &bundle,
        };
        let start = Instant::now();
        let result = self.verifier.appraise(&request, now());
        metrics.judged(judged(&result), start.elapsed());
        match result {
            Ok(appraisal) => Answer::json(&json!({ "token": appraisal.token })),
            Err(error) => self.refused(&error),
        }
    }

    /// Judges the evidence of a key broker's client. Its refusal is told in the broker's form.
    pub(crate) fn appraise_client(
        &self,
        metrics: &Metrics,
        request: ClientRequest<'_>,
    ) -> Result<ClientAppraisal, Answer> {
        let start = Instant::now();
        let result = self.verifier.appraise_client(request, now());
        metrics.judged(judged(&result), start.elapsed());
        result.map_err(|error| match error {
            VerifierError::Refused(refusal) => Answer::kbs_error(
                StatusCode::UNAUTHORIZED,
                "AttestationFailed",
                &refusal.to_string(),
            ),
            other => self.refused(&other),
        })
    }

    /// Notes that a resource was given out; only then it is.
    pub(crate) fn released(&self, path: &str, evidence: &str) -> Result<(), Answer> {
        let record = Record {
            event: "resource".into(),
            time: now(),
            audience: path.into(),
            evidence: evidence.into(),
            verdict: "released".into(),
            ..Record::default()
        };
        self.verifier
            .record(record)
            .map_err(|error| self.refused(&VerifierError::Audit(error)))
    }

    /// How many nonces wait for an answer.
    pub(crate) fn challenges(&self) -> usize {
        self.verifier.waiting()
    }

    /// Whether decisions can be made.
    pub(crate) fn healthy(&self) -> Result<(), &'static str> {
        match self.audit_works.load(Relaxed) {
            true => Ok(()),
            false => Err("The last decision could not be written to the audit log"),
        }
    }

    /// What a client is told in place of a token.
    fn refused(&self, error: &VerifierError) -> Answer {
        match error {
            VerifierError::Refused(refusal) => Answer::refused(refusal),
            VerifierError::Busy => Answer::busy(60),
            other => {
                if matches!(other, VerifierError::Audit(_)) {
                    self.audit_works.store(false, Relaxed);
                }
                eprintln!("sealpod-attest: {}", chain_text(other));
                let text = "The verifier could not come to a decision";
                Answer::error(StatusCode::INTERNAL_SERVER_ERROR, "internal", text)
            }
        }
    }
}

/// How a result is counted.
fn judged<T>(result: &Result<T, VerifierError>) -> Judged {
    match result {
        Ok(_) => Judged::Accepted,
        Err(VerifierError::Refused(_)) => Judged::Refused,
        Err(_) => Judged::Failed,
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    u64::try_from(input::now(None).0).unwrap_or(0)
}

fn signing_key(path: &Path) -> anyhow::Result<Signer> {
    if !path.exists() {
        let made = Signer::generate()?;
        tls::secret(path, &made.to_pkcs8()?)?;
        eprintln!("sealpod-attest: made {}", path.display());
    }
    let bytes = input::read_up_to(path, 4096)?;
    Signer::from_pkcs8(&bytes).with_context(|| format!("{} cannot be used", path.display()))
}

/// Reads what evidence is compared with.
fn inputs(config: &Config) -> anyhow::Result<Inputs> {
    let text = |path: &PathBuf, most: u64| {
        let bytes = input::read_up_to(path, most)?;
        String::from_utf8(bytes).with_context(|| format!("{} is not text", path.display()))
    };
    let unusable = |path: &Path| format!("{} cannot be used", path.display());
    let v = &config.verifier;
    let anchors = match &v.anchors {
        Some(path) => {
            TrustAnchors::from_file_text(&text(path, MAX_INPUT)?).with_context(|| unusable(path))?
        }
        None => TrustAnchors::production(),
    };
    let mut collateral = Collateral::default();
    if let Some(path) = &v.collateral {
        input::add_collateral(&mut collateral, path)?;
    }
    let references = match &v.reference_values {
        Some(path) => {
            ReferenceValues::parse(&text(path, MAX_INPUT)?).with_context(|| unusable(path))?
        }
        None => ReferenceValues::default(),
    };
    let policy = match &v.policy {
        Some(path) => Policy::from_rego(&text(path, policy::MAX_POLICY as u64)?)
            .with_context(|| unusable(path))?,
        None => Policy::built_in()?,
    };
    Ok(Inputs {
        allow_simulated: anchors.simulated,
        anchors,
        collateral,
        references,
        policy,
    })
}

const _: () = assert!(
    evidence::MAX_BUNDLE <= 4 << 20,
    "limits.body_kib covers a bundle"
);
