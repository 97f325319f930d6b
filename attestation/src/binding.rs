//! What ties evidence to one question, one pod and one key: the nonce, the guest's key, and the
//! digests that stand in REPORT_DATA and in a GPU's nonce. Both ends compute them here.
//!
//! Every hash is over a transcript: a domain tag and then the fields, each preceded by its length as
//! eight bytes, little endian. No two different lists of fields make the same transcript.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256, Sha384, Sha512};

use crate::encoding::{base64url, unbase64url};

/// Bytes of an uncompressed point on P-384 (SEC 1 section 2.3.3).
pub const POINT_LENGTH: usize = 97;

/// Why a key or nonce is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BindingError {
    /// Not a point on the curve, or not uncompressed.
    #[error("Not an uncompressed public key on P-384")]
    Point,
    /// Zero or beyond the group's order; ask for other random bytes.
    #[error("Random bytes are no private key of P-384")]
    Secret,
    /// A JSON web key of another kind.
    #[error("JSON web key is not kty EC, crv P-384 with x and y of 48 bytes in base64url")]
    Jwk,
    /// A nonce of another length.
    #[error("Nonce is not 32 bytes in base64url")]
    Nonce,
}

/// The verifier's question: 32 random bytes, used once. Text form: base64url without padding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nonce(pub [u8; 32]);

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&base64url(&self.0))
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({self})")
    }
}

impl std::str::FromStr for Nonce {
    type Err = BindingError;

    fn from_str(text: &str) -> Result<Self, BindingError> {
        let bytes = unbase64url(text).map_err(|_| BindingError::Nonce)?;
        bytes.try_into().map(Self).map_err(|_| BindingError::Nonce)
    }
}

impl Serialize for Nonce {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?
            .parse()
            .map_err(serde::de::Error::custom)
    }
}

/// A public key on P-384 that is known to lie on the curve. In JSON it is a JWK (RFC 7518 section
/// 6.2.1): `kty`, `crv`, `x`, `y`; other members are ignored.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct PublicKey([u8; POINT_LENGTH]);

impl PublicKey {
    /// From an uncompressed point.
    ///
    /// # Errors
    /// When the bytes are no such point of the curve.
    pub fn from_point(bytes: &[u8]) -> Result<Self, BindingError> {
        let point: [u8; POINT_LENGTH] = bytes.try_into().map_err(|_| BindingError::Point)?;
        if point[0] != 4 || p384::PublicKey::from_sec1_bytes(&point).is_err() {
            return Err(BindingError::Point);
        }
        Ok(Self(point))
    }

    /// The uncompressed point: `04 ‖ x ‖ y`.
    pub fn point(&self) -> &[u8; POINT_LENGTH] {
        &self.0
    }

    /// The JWK thumbprint (RFC 7638) with SHA-256, base64url: the `kid` of tokens that this key signs.
    pub fn thumbprint(&self) -> String {
        let (x, y) = self.coordinates();
        let text = format!(r#"{{"crv":"P-384","kty":"EC","x":"{x}","y":"{y}"}}"#);
        base64url(&Sha256::digest(text.as_bytes()))
    }

    /// Whether `signature`, `r ‖ s` of 96 bytes, is this key's ECDSA signature with SHA-384 over
    /// `message`.
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        use p384::ecdsa::signature::Verifier;
        let parsed = (
            p384::ecdsa::VerifyingKey::from_sec1_bytes(&self.0),
            p384::ecdsa::Signature::from_slice(signature),
        );
        matches!(parsed, (Ok(key), Ok(signature)) if key.verify(message, &signature).is_ok())
    }

    fn coordinates(&self) -> (String, String) {
        (base64url(&self.0[1..49]), base64url(&self.0[49..]))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.thumbprint())
    }
}

#[derive(Serialize, Deserialize)]
struct Jwk {
    kty: String,
    crv: String,
    x: String,
    y: String,
}

impl Serialize for PublicKey {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let (x, y) = self.coordinates();
        let (kty, crv) = ("EC".into(), "P-384".into());
        Jwk { kty, crv, x, y }.serialize(s)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let jwk = Jwk::deserialize(d)?;
        let point = || {
            let (x, y) = (unbase64url(&jwk.x).ok()?, unbase64url(&jwk.y).ok()?);
            let named = jwk.kty == "EC" && jwk.crv == "P-384" && x.len() == 48 && y.len() == 48;
            named.then(|| [&[4][..], &x, &y].concat())
        };
        let bytes = point().ok_or_else(|| serde::de::Error::custom(BindingError::Jwk))?;
        Self::from_point(&bytes).map_err(serde::de::Error::custom)
    }
}

/// The guest's key K: made at each boot, never leaves the guest's memory.
pub struct EphemeralKey(p384::SecretKey);

impl EphemeralKey {
    /// From 48 random bytes.
    ///
    /// # Errors
    /// When they are no private key, which happens once in 2^194 times: ask for others.
    pub fn from_random(bytes: &[u8; 48]) -> Result<Self, BindingError> {
        p384::SecretKey::from_slice(bytes)
            .map(Self)
            .map_err(|_| BindingError::Secret)
    }

    /// Its public half.
    pub fn public(&self) -> PublicKey {
        use p384::elliptic_curve::sec1::ToSec1Point;
        let mut point = [0; POINT_LENGTH];
        let encoded = self.0.public_key().to_sec1_point(false);
        point.copy_from_slice(encoded.as_bytes());
        PublicKey(point)
    }
}

impl fmt::Debug for EphemeralKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EphemeralKey(…)")
    }
}

/// H(K): SHA-384 of the uncompressed point.
pub fn key_digest(key: &PublicKey) -> [u8; 48] {
    Sha384::digest(key.point()).into()
}

/// The nonce a GPU is asked with: SHA-256 of `gpu-v1`, N, H(K).
pub fn gpu_nonce(nonce: &Nonce, key_digest: &[u8; 48]) -> [u8; 32] {
    transcript::<Sha256>("gpu-v1", [&nonce.0[..], key_digest]).into()
}

/// REPORT_DATA of a CPU's evidence: SHA-512 of `cc-v1`, N, H(K), H(E), H(init-data), the pod's uid.
/// H(E) is [`crate::evidence::gpu_digest`] (of the empty list too), H(init-data)
/// [`crate::init_data::digest`].
pub fn report_data(
    nonce: &Nonce,
    key_digest: &[u8; 48],
    gpu_digest: &[u8; 48],
    init_data_digest: &[u8; 48],
    pod_uid: &str,
) -> [u8; 64] {
    let fields = [
        &nonce.0[..],
        key_digest,
        gpu_digest,
        init_data_digest,
        pod_uid.as_bytes(),
    ];
    transcript::<Sha512>("cc-v1", fields).into()
}

/// The hash of a domain tag and fields, each with its length before it.
pub(crate) fn transcript<'a, D: Digest>(
    tag: &'a str,
    fields: impl IntoIterator<Item = &'a [u8]>,
) -> sha2::digest::Output<D> {
    let mut hash = D::new();
    for field in std::iter::once(tag.as_bytes()).chain(fields) {
        hash.update((field.len() as u64).to_le_bytes());
        hash.update(field);
    }
    hash.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(fill: u8) -> EphemeralKey {
        EphemeralKey::from_random(&[fill; 48]).unwrap()
    }

    #[test]
    fn a_key_survives_its_json_and_another_curve_or_point_is_refused() {
        let public = key(1).public();
        let text = serde_json::to_string(&public).unwrap();
        assert_eq!(serde_json::from_str::<PublicKey>(&text).unwrap(), public);
        for broken in [
            text.replace("P-384", "P-256"),
            text.replace("EC", "RSA"),
            text.replacen(&base64url(&public.point()[1..49]), "AAAA", 1),
            text.replacen(
                &base64url(&public.point()[1..49]),
                &base64url(&public.point()[49..]),
                1,
            ),
        ] {
            assert!(
                serde_json::from_str::<PublicKey>(&broken).is_err(),
                "{broken}"
            );
        }
        assert!(PublicKey::from_point(&[4; 97]).is_err());
        assert!(PublicKey::from_point(&public.point()[..49]).is_err());
        assert_eq!(
            EphemeralKey::from_random(&[0; 48]).unwrap_err(),
            BindingError::Secret
        );
        assert_eq!(
            EphemeralKey::from_random(&[0xff; 48]).unwrap_err(),
            BindingError::Secret
        );
    }

    #[test]
    fn every_field_changes_report_data_and_none_can_lend_bytes_to_the_next() {
        let n = Nonce([1; 32]);
        let (k, e, i) = ([2; 48], [3; 48], [4; 48]);
        let all = [
            report_data(&n, &k, &e, &i, "uid"),
            report_data(&Nonce([9; 32]), &k, &e, &i, "uid"),
            report_data(&n, &e, &k, &i, "uid"),
            report_data(&n, &k, &i, &e, "uid"),
            report_data(&n, &k, &e, &i, "uid2"),
            report_data(&n, &k, &e, &i, ""),
        ];
        for (at, a) in all.iter().enumerate() {
            assert!(!all[at + 1..].contains(a));
        }
        let split = |a: &'static [u8], b: &'static [u8]| transcript::<Sha256>("t", [a, b]);
        assert_ne!(split(b"ab", b"c"), split(b"a", b"bc"));
    }

    #[test]
    fn the_transcript_is_the_documented_one() {
        let mut bytes = 6u64.to_le_bytes().to_vec();
        bytes.extend(b"gpu-v1");
        bytes.extend(32u64.to_le_bytes());
        bytes.extend([7; 32]);
        bytes.extend(48u64.to_le_bytes());
        bytes.extend([8; 48]);
        let expected: [u8; 32] = Sha256::digest(&bytes).into();
        assert_eq!(gpu_nonce(&Nonce([7; 32]), &[8; 48]), expected);
    }

    #[test]
    fn nonces_have_exactly_32_bytes() {
        let nonce = Nonce([5; 32]);
        assert_eq!(nonce.to_string().parse(), Ok(nonce));
        assert_eq!("AAAA".parse::<Nonce>(), Err(BindingError::Nonce));
        assert_eq!(
            base64url(&[0; 33]).parse::<Nonce>(),
            Err(BindingError::Nonce)
        );
    }
}
