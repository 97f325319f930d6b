//! Messages of the KBS attestation protocol (Trustee, version 0.4): what a client sends, read with
//! limits, and what it is answered, encrypted to the key that its evidence vouches for. No socket,
//! no session and no file here; the service keeps those.
//!
//! Protocol: `kbs/docs/kbs_attestation_protocol.md` of confidential-containers/trustee.

mod evidence;
mod jwe;

use std::collections::BTreeMap;

pub use evidence::{Evidence, EvidenceError};
pub use jwe::{JweError, encrypt};
pub use kbs_types::{Attestation, Challenge, ErrorInformation, Request, Response, Tee, TeePubKey};
use serde_json::{Value, json};

use crate::crypto;

/// Protocol versions that are spoken: this one and its patches.
pub const VERSION: &str = "0.4";
/// What `extra-params` of a request calls the algorithms that the client has.
const OFFERED: &str = "supported-hash-algorithms";
/// What `extra-params` of a challenge calls the algorithm that was chosen.
const CHOSEN: &str = "selected-hash-algorithm";
/// Longest member of a public key: RSA of 8192 bits in base64url.
const MAX_KEY_MEMBER: usize = 1366;

/// Why a message is refused before any evidence was looked at.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Not JSON of the protocol's form.
    #[error("Message is not of the protocol's form")]
    Form(#[from] serde_json::Error),
    /// Another protocol version.
    #[error("Protocol version {0:?} is not spoken; {VERSION} is")]
    Version(String),
    /// A TEE that this verifier does not know.
    #[error("TEE {0} is not verified here; snp and tdx are")]
    Tee(Tee),
    /// A member of the public key that is longer than any key.
    #[error("Public key member of {0} characters; at most {MAX_KEY_MEMBER}")]
    Key(usize),
}

/// The digest that binds a client's key and nonce to its evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// SHA-512, which fills REPORT_DATA. Chosen where the client has it.
    Sha512,
    /// SHA-384, the protocol's default: REPORT_DATA is the digest and 16 bytes of zero, all 64
    /// compared.
    Sha384,
}

impl Binding {
    fn digest(self, message: &[u8]) -> [u8; 64] {
        let mut data = [0; 64];
        match self {
            Self::Sha512 => data = crypto::sha512(message),
            Self::Sha384 => data[..48].copy_from_slice(&crypto::sha384(message)),
        }
        data
    }

    /// REPORT_DATA that evidence must hold: the digest of the canonical JSON (RFC 8785) of nonce,
    /// public key and the evidence of further devices.
    pub fn report_data(self, nonce: &str, key: &TeePubKey, additional: &str) -> [u8; 64] {
        self.digest(&canonical(nonce, key, Some(additional)))
    }

    /// The nonce that a GPU's report must hold: the first 32 bytes of the digest of nonce and key.
    pub fn device_nonce(self, nonce: &str, key: &TeePubKey) -> [u8; 32] {
        let mut out = [0; 32];
        out.copy_from_slice(&self.digest(&canonical(nonce, key, None))[..32]);
        out
    }
}

/// The members of a public key, by their names in JSON.
fn members(key: &TeePubKey) -> Vec<(&'static str, &str)> {
    match key {
        TeePubKey::RSA { alg, k_mod, k_exp } => {
            vec![("kty", "RSA"), ("alg", alg), ("n", k_mod), ("e", k_exp)]
        }
        TeePubKey::EC { crv, alg, x, y } => {
            vec![
                ("kty", "EC"),
                ("crv", crv),
                ("alg", alg),
                ("x", x),
                ("y", y),
            ]
        }
        TeePubKey::AKP { alg, public_key } => {
            vec![("kty", "AKP"), ("alg", alg), ("pub", public_key)]
        }
    }
}

/// Canonical JSON of the runtime data. All keys are ASCII, so that the order of a `BTreeMap` is that
/// of RFC 8785, and all values are strings, which serde_json escapes as RFC 8785 wants.
fn canonical(nonce: &str, key: &TeePubKey, additional: Option<&str>) -> Vec<u8> {
    let text = |text: &str| Value::from(text).to_string();
    let key: BTreeMap<&str, &str> = members(key).into_iter().collect();
    let key: Vec<String> = key
        .iter()
        .map(|(k, v)| format!("{}:{}", text(k), text(v)))
        .collect();
    let mut outer = BTreeMap::from([
        ("nonce", text(nonce)),
        ("tee-pubkey", format!("{{{}}}", key.join(","))),
    ]);
    if let Some(additional) = additional {
        outer.insert("additional-evidence", text(additional));
    }
    let outer: Vec<String> = outer
        .iter()
        .map(|(k, v)| format!("{}:{v}", text(k)))
        .collect();
    format!("{{{}}}", outer.join(",")).into_bytes()
}

/// Reads the message that opens a session, and chooses the digest.
///
/// # Errors
/// When it is not of the protocol's form, version or TEEs.
pub fn parse_request(body: &[u8]) -> Result<(Request, Binding), MessageError> {
    let request: Request = serde_json::from_slice(body)?;
    let spoken = request
        .version
        .strip_prefix(VERSION)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    if !spoken {
        let version = request.version.chars().take(40).collect();
        return Err(MessageError::Version(version));
    }
    if !matches!(request.tee, Tee::Snp | Tee::Tdx) {
        return Err(MessageError::Tee(request.tee));
    }
    let offered = request.extra_params.get(OFFERED).and_then(Value::as_array);
    let sha512 = offered.is_some_and(|list| {
        list.iter().any(|name| {
            name.as_str()
                .is_some_and(|n| n.eq_ignore_ascii_case("sha512"))
        })
    });
    let binding = if sha512 {
        Binding::Sha512
    } else {
        Binding::Sha384
    };
    Ok((request, binding))
}

/// The answer to a request.
pub fn challenge(nonce: &str, binding: Binding) -> Challenge {
    let chosen = match binding {
        Binding::Sha512 => "sha512",
        Binding::Sha384 => "sha384",
    };
    Challenge {
        nonce: nonce.to_owned(),
        extra_params: json!({ CHOSEN: chosen }),
    }
}

/// Reads the message that brings evidence.
///
/// # Errors
/// When it is not of the protocol's form.
pub fn parse_attestation(body: &[u8]) -> Result<Attestation, MessageError> {
    let attestation: Attestation = serde_json::from_slice(body)?;
    let longest = members(&attestation.runtime_data.tee_pubkey)
        .iter()
        .map(|(_, value)| value.len())
        .max();
    match longest {
        Some(length) if length > MAX_KEY_MEMBER => Err(MessageError::Key(length)),
        _ => Ok(attestation),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> TeePubKey {
        TeePubKey::EC {
            crv: "P-256".into(),
            alg: "ECDH-ES+A256KW".into(),
            x: "eA".into(),
            y: "eQ".into(),
        }
    }

    #[test]
    fn runtime_data_is_canonical_json() {
        let text = canonical("n\"\u{1}é", &key(), Some(""));
        assert_eq!(
            String::from_utf8(text).unwrap(),
            concat!(
                r#"{"additional-evidence":"","nonce":"n\"\u0001é","#,
                r#""tee-pubkey":{"alg":"ECDH-ES+A256KW","crv":"P-256","kty":"EC","x":"eA","y":"eQ"}}"#
            )
        );
    }

    #[test]
    fn report_data_depends_on_everything_that_is_bound() {
        let first = Binding::Sha512.report_data("n", &key(), "");
        assert_ne!(first, Binding::Sha512.report_data("m", &key(), ""));
        assert_ne!(first, Binding::Sha512.report_data("n", &key(), "{}"));
        assert_eq!(Binding::Sha384.report_data("n", &key(), "")[48..], [0; 16]);
    }

    #[test]
    fn sha512_is_chosen_where_it_is_offered() {
        let request = |extra: &str| {
            let text = format!(r#"{{"version":"0.4.0","tee":"snp","extra-params":{extra}}}"#);
            parse_request(text.as_bytes()).unwrap().1
        };
        assert_eq!(request(r#""""#), Binding::Sha384);
        assert_eq!(
            request(r#"{"supported-hash-algorithms":["sha256","sha384"]}"#),
            Binding::Sha384
        );
        assert_eq!(
            request(r#"{"supported-hash-algorithms":["sha384","sha512"]}"#),
            Binding::Sha512
        );
    }

    #[test]
    fn other_versions_and_tees_are_refused() {
        let parse = |version: &str, tee: &str| {
            let text = format!(r#"{{"version":"{version}","tee":"{tee}","extra-params":""}}"#);
            parse_request(text.as_bytes())
        };
        assert!(parse("0.4.7", "tdx").is_ok());
        assert!(matches!(
            parse("0.40", "tdx"),
            Err(MessageError::Version(_))
        ));
        assert!(matches!(
            parse("1.0.0", "tdx"),
            Err(MessageError::Version(_))
        ));
        assert!(matches!(
            parse("0.4.0", "sample"),
            Err(MessageError::Tee(_))
        ));
        assert!(matches!(parse("0.4.0", "nope"), Err(MessageError::Form(_))));
    }
}
