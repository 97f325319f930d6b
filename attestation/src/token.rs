//! The token: what a verifier says about a pod, and the one check that both gates make. An EAT
//! attestation result (draft-ietf-rats-ear) as a JWT of one algorithm, ES384 (RFC 7515, RFC 7518
//! section 3.4). This is linked into the guest's agent; signing is the verifier's ([`crate::signer`]).
//!
//! The checker chooses everything: the keys, the algorithm, the audience, the pod. Nothing that the
//! token says about itself is believed before its signature has been verified.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::binding::{Nonce, PublicKey};
use crate::encoding::{base64url, unbase64url};

/// Longest token that is read.
pub const MAX_TOKEN: usize = 64 << 10;
/// Longest life of a token, seconds.
pub const MAX_LIFE: u64 = 300;
/// How far the clocks of verifier and checker may be apart, seconds.
pub const LEEWAY: u64 = 10;
/// EAT profile of attestation results, as Veraison and Trustee write it.
pub const PROFILE: &str = "tag:github.com,2023:veraison/ear";
/// Submodule of the CPU's evidence.
pub const CPU: &str = "cpu0";

/// Why a token opens nothing. Each variant is one check.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TokenError {
    /// Not a JWT in compact form with the documented claims.
    #[error("Token is not of the documented form: {0}")]
    Form(&'static str),
    /// Another algorithm, or header members that change the meaning.
    #[error("Token header is not alg ES384 with a kid and without crit")]
    Header,
    /// A key that is not trusted.
    #[error("Token is signed by key {0:?}, which is not a trusted verifier's")]
    Key(String),
    /// The signature is not that key's.
    #[error("Token signature is not its key's")]
    Signature,
    /// Another profile.
    #[error("Token profile is {0:?}, not {PROFILE}")]
    Profile(String),
    /// For somebody else.
    #[error("Token is for audience {found:?}, not {expected:?}")]
    Audience {
        /// Who checks.
        expected: String,
        /// Whom it is for.
        found: String,
    },
    /// Of another pod.
    #[error("Token is of pod {found:?}, not {expected:?}")]
    Pod {
        /// The pod at the gate.
        expected: String,
        /// The pod in the token.
        found: String,
    },
    /// Not valid yet.
    #[error("Token holds from {0}, now is {1}")]
    Early(u64, u64),
    /// No longer valid.
    #[error("Token has expired at {0}, now is {1}")]
    Expired(u64, u64),
    /// Valid for too long.
    #[error("Token lives for {0} s; at most {MAX_LIFE} s are accepted")]
    Life(u64),
    /// An answer to another question.
    #[error("Token answers another nonce")]
    Nonce,
    /// Issued for another key.
    #[error("Token is bound to another key than this guest's")]
    Confirmation,
    /// Other init-data.
    #[error("Token is of a guest with other init-data")]
    InitData,
    /// From simulated evidence where only real is believed.
    #[error("Token rests on simulated evidence")]
    Simulated,
    /// A part that is not affirmed.
    #[error("Token does not affirm {part}: {found}")]
    Status {
        /// Submodule or device.
        part: String,
        /// Its status, or that it is missing.
        found: String,
    },
}

/// EAR status of one part (draft-ietf-rats-ear section 3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// Nothing can be said.
    None,
    /// Everything is as it should be.
    Affirming,
    /// Something is doubtful.
    Warning,
    /// Something is wrong.
    Contraindicated,
}

/// The verifier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifierId {
    /// Program and version.
    pub build: String,
    /// Who made it.
    pub developer: String,
}

/// What is confirmed: the guest holds this key (RFC 7800).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confirmation<K = PublicKey> {
    /// K.
    pub jwk: K,
}

/// AR4SI trustworthiness claims (draft-ietf-rats-ar4si section 2.3); 2 is affirming, 0 says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[expect(missing_docs, reason = "the names are those of the draft")]
pub struct TrustVector {
    pub instance_identity: i8,
    pub configuration: i8,
    pub executables: i8,
    pub hardware: i8,
}

/// What is said about the CPU or one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Submodule {
    /// The result.
    #[serde(rename = "ear.status")]
    pub status: Tier,
    /// What it rests on.
    #[serde(rename = "ear.trustworthiness-vector", default)]
    pub trust: TrustVector,
    /// The policy that was applied: `sha384:` and its digest.
    #[serde(rename = "ear.appraisal-policy-id", default)]
    pub policy: String,
    /// `snp`, `tdx` or `nvidia`.
    pub tee: String,
    /// Whether the anchors it rests on are simulated.
    pub sim: bool,
    /// MEASUREMENT or MRTD in hexadecimal; of the CPU only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measurement: Option<String>,
    /// The device's name in the guest; of devices only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_id: Option<String>,
}

/// The claims of a token. A gate's guest has a key K; a key broker's client has one of another kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims<K = PublicKey> {
    /// [`PROFILE`].
    pub eat_profile: String,
    /// The verifier's name.
    pub iss: String,
    /// Who may use it.
    pub aud: String,
    /// Its own number.
    pub jti: String,
    /// Issued at, seconds since 1970.
    pub iat: u64,
    /// Not before.
    pub nbf: u64,
    /// Expires.
    pub exp: u64,
    /// The nonce that was answered.
    pub eat_nonce: Nonce,
    /// The verifier's program.
    #[serde(rename = "ear.verifier-id")]
    pub verifier: VerifierId,
    /// The parts: [`CPU`], `gpu0`, `gpu1`, ….
    pub submods: BTreeMap<String, Submodule>,
    /// The guest's key.
    pub cnf: Confirmation<K>,
    /// The pod.
    pub pod_uid: String,
    /// SHA-384 of the policy's text, hexadecimal.
    pub policy_digest: String,
    /// [`crate::evidence::Bundle::digest`], hexadecimal.
    pub evidence_digest: String,
    /// [`crate::init_data::digest`], hexadecimal.
    pub init_data_digest: String,
    /// Names of the affirmed devices.
    pub devices: Vec<String>,
    /// Whether any of it rests on simulated anchors.
    pub sim: bool,
}

/// What a gate demands of a token.
#[derive(Clone, Copy, Debug)]
pub struct Expected<'a> {
    /// Keys of the verifiers that are trusted.
    pub verifiers: &'a [PublicKey],
    /// Who checks.
    pub audience: &'a str,
    /// The pod at the gate.
    pub pod_uid: &'a str,
    /// K, where the checker holds or knows it.
    pub confirmation: Option<&'a PublicKey>,
    /// The nonce, where the checker asked for it.
    pub nonce: Option<&'a Nonce>,
    /// [`crate::init_data::digest`] of the guest's init-data, where the checker knows it.
    pub init_data_digest: Option<&'a [u8; 48]>,
    /// Seconds since 1970.
    pub now: u64,
    /// Whether tokens from simulated evidence are believed.
    pub allow_simulated: bool,
    /// Devices that must be affirmed, by their names in the guest.
    pub devices: &'a [String],
}

#[derive(Serialize, Deserialize)]
struct Header {
    alg: String,
    kid: String,
    typ: String,
    #[serde(default, skip_serializing)]
    crit: Option<serde::de::IgnoredAny>,
}

/// Header and claims as they are signed: `base64url(header).base64url(claims)`.
///
/// # Errors
/// Never for claims that can be JSON, which all are.
pub fn signing_input<K: Serialize>(
    key: &PublicKey,
    claims: &Claims<K>,
) -> Result<String, TokenError> {
    let header = Header {
        alg: "ES384".into(),
        kid: key.thumbprint(),
        typ: "JWT".into(),
        crit: None,
    };
    let json = (serde_json::to_vec(&header), serde_json::to_vec(claims));
    let (Ok(header), Ok(claims)) = json else {
        return Err(TokenError::Form("claims"));
    };
    Ok(format!("{}.{}", base64url(&header), base64url(&claims)))
}

/// The signature (`r ‖ s`) put to its [`signing_input`].
pub fn assemble(input: &str, signature: &[u8]) -> String {
    format!("{input}.{}", base64url(signature))
}

/// Header and claims, unverified: for people to look at.
///
/// # Errors
/// When it is no compact JWT.
pub fn peek(token: &str) -> Result<(serde_json::Value, serde_json::Value), TokenError> {
    let parts = Parts::split(token)?;
    let json = |text: &str| {
        let bytes = unbase64url(text).map_err(|_| TokenError::Form("base64url"))?;
        serde_json::from_slice(&bytes).map_err(|_| TokenError::Form("JSON"))
    };
    Ok((json(parts.header)?, json(parts.claims)?))
}

struct Parts<'a> {
    header: &'a str,
    claims: &'a str,
    signature: &'a str,
    signed: &'a str,
}

impl<'a> Parts<'a> {
    fn split(token: &'a str) -> Result<Self, TokenError> {
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Form("longer than 64 KiB"));
        }
        let form = TokenError::Form("not three parts with points between them");
        let Some((signed, signature)) = token.rsplit_once('.') else {
            return Err(form);
        };
        match signed.split_once('.') {
            Some((header, claims)) if !claims.contains('.') => Ok(Self {
                header,
                claims,
                signature,
                signed,
            }),
            _ => Err(form),
        }
    }
}

/// Checks a token against what a gate demands.
///
/// # Errors
/// The first check that failed.
pub fn check(token: &str, expected: &Expected<'_>) -> Result<Claims, TokenError> {
    let claims = authenticate(token, expected.verifiers)?;
    check_scope(&claims, expected)?;
    check_time(&claims, expected.now)?;
    check_parts(&claims, expected)?;
    Ok(claims)
}

/// The claims of a token that one of these keys signed; says nothing about what they are good for.
///
/// # Errors
/// When it is not a token, or not signed by one of them.
pub fn authenticate(token: &str, verifiers: &[PublicKey]) -> Result<Claims, TokenError> {
    let parts = Parts::split(token)?;
    let bytes = unbase64url(parts.header).map_err(|_| TokenError::Header)?;
    let header: Header = serde_json::from_slice(&bytes).map_err(|_| TokenError::Header)?;
    if header.alg != "ES384" || header.crit.is_some() {
        return Err(TokenError::Header);
    }
    let key = verifiers.iter().find(|k| k.thumbprint() == header.kid);
    let key = key.ok_or_else(|| TokenError::Key(shown(&header.kid)))?;
    let signature = unbase64url(parts.signature).map_err(|_| TokenError::Signature)?;
    if !key.verifies(parts.signed.as_bytes(), &signature) {
        return Err(TokenError::Signature);
    }
    let bytes = unbase64url(parts.claims).map_err(|_| TokenError::Form("base64url"))?;
    let claims: Claims = serde_json::from_slice(&bytes).map_err(|_| TokenError::Form("claims"))?;
    if claims.eat_profile != PROFILE {
        return Err(TokenError::Profile(shown(&claims.eat_profile)));
    }
    Ok(claims)
}

fn check_scope(claims: &Claims, expected: &Expected<'_>) -> Result<(), TokenError> {
    if claims.aud != expected.audience {
        return Err(TokenError::Audience {
            expected: expected.audience.into(),
            found: shown(&claims.aud),
        });
    }
    if claims.pod_uid != expected.pod_uid {
        return Err(TokenError::Pod {
            expected: expected.pod_uid.into(),
            found: shown(&claims.pod_uid),
        });
    }
    if expected.nonce.is_some_and(|n| *n != claims.eat_nonce) {
        return Err(TokenError::Nonce);
    }
    if expected.confirmation.is_some_and(|k| *k != claims.cnf.jwk) {
        return Err(TokenError::Confirmation);
    }
    let other = |d: &[u8; 48]| crate::encoding::hex(d) != claims.init_data_digest;
    if expected.init_data_digest.is_some_and(other) {
        return Err(TokenError::InitData);
    }
    Ok(())
}

fn check_time(claims: &Claims, now: u64) -> Result<(), TokenError> {
    let life = claims.exp.saturating_sub(claims.iat.min(claims.nbf));
    if life > MAX_LIFE {
        return Err(TokenError::Life(life));
    }
    let start = claims.nbf.max(claims.iat);
    if start > now.saturating_add(LEEWAY) {
        return Err(TokenError::Early(start, now));
    }
    if now >= claims.exp {
        return Err(TokenError::Expired(claims.exp, now));
    }
    Ok(())
}

/// The CPU, every device asked for, and nothing in the token that is not affirmed.
fn check_parts(claims: &Claims, expected: &Expected<'_>) -> Result<(), TokenError> {
    let simulated = claims.sim || claims.submods.values().any(|s| s.sim);
    if simulated && !expected.allow_simulated {
        return Err(TokenError::Simulated);
    }
    let status = |part: &str, found: String| TokenError::Status {
        part: shown(part),
        found,
    };
    if !claims.submods.contains_key(CPU) {
        return Err(status(CPU, "it is not in the token".into()));
    }
    for (name, part) in &claims.submods {
        if part.status != Tier::Affirming {
            return Err(status(name, format!("{:?}", part.status).to_lowercase()));
        }
    }
    for device in expected.devices {
        let affirmed = claims
            .submods
            .iter()
            .any(|(name, s)| name != CPU && s.device_id.as_ref() == Some(device));
        if !affirmed || !claims.devices.contains(device) {
            return Err(status(device, "it is not in the token".into()));
        }
    }
    Ok(())
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}
