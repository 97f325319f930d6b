//! JSON Web Encryption (RFC 7516) of a resource to a client's key: ECDH-ES+A256KW on the curves P-256,
//! P-384 and P-521, and RSA-OAEP-256; the content always with A256GCM. RSA1_5 is refused: it is open
//! to padding oracles.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::agreement::{self, EphemeralPrivateKey, UnparsedPublicKey};
use aws_lc_rs::digest;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use kbs_types::{ProtectedHeader, Response, TeePubKey};
use serde_json::{Map, Value, json};

use crate::encoding::{base64url, unbase64url};

const ECDH: &str = "ECDH-ES+A256KW";
const OAEP: &str = "RSA-OAEP-256";
const CONTENT: &str = "A256GCM";
/// A key of 256 bits wrapped by RFC 3394.
const WRAPPED: usize = 40;
/// Modulus lengths in bytes: 2048 bits are the least that is believed, 8192 the most that is computed.
const MODULUS: std::ops::RangeInclusive<usize> = 256..=1024;

/// Why nothing could be encrypted to a key.
#[derive(Debug, thiserror::Error)]
pub enum JweError {
    /// An algorithm or a curve that is not offered.
    #[error("Key algorithm {0:?} is not offered; {ECDH} on P-256, P-384 or P-521 and {OAEP} are")]
    Algorithm(String),
    /// Not a point of the curve, or no RSA key of 2048 to 8192 bits.
    #[error("The client's public key is not a valid key of its kind")]
    Key,
    /// The cryptographic library failed.
    #[error("Encryption failed")]
    Library,
}

/// Encrypts `payload` to `key`.
///
/// # Errors
/// When the key is not one of those offered, or not valid.
pub fn encrypt(key: &TeePubKey, payload: &[u8]) -> Result<Response, JweError> {
    let mut content_key = [0; 32];
    random(&mut content_key)?;
    let (protected, encrypted_key) = match key {
        TeePubKey::EC { crv, alg, x, y } if alg == ECDH => to_point(crv, x, y, &content_key)?,
        TeePubKey::RSA { alg, k_mod, k_exp } if alg == OAEP => (
            header(OAEP, Map::new()),
            to_rsa(k_mod, k_exp, &content_key)?,
        ),
        TeePubKey::EC { alg, .. } | TeePubKey::RSA { alg, .. } | TeePubKey::AKP { alg, .. } => {
            return Err(JweError::Algorithm(alg.chars().take(40).collect()));
        }
    };
    let aad = protected.generate_aad().map_err(|_| JweError::Library)?;
    let mut iv = [0; NONCE_LEN];
    random(&mut iv)?;
    let mut ciphertext = payload.to_vec();
    let sealer = UnboundKey::new(&AES_256_GCM, &content_key).map_err(|_| JweError::Library)?;
    let tag = LessSafeKey::new(sealer)
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(iv),
            Aad::from(&aad),
            &mut ciphertext,
        )
        .map_err(|_| JweError::Library)?;
    Ok(Response {
        protected,
        encrypted_key,
        aad: None,
        iv: iv.to_vec(),
        ciphertext,
        tag: tag.as_ref().to_vec(),
    })
}

fn random(out: &mut [u8]) -> Result<(), JweError> {
    SystemRandom::new().fill(out).map_err(|_| JweError::Library)
}

fn header(alg: &str, other_fields: Map<String, Value>) -> ProtectedHeader {
    ProtectedHeader {
        alg: alg.into(),
        enc: CONTENT.into(),
        other_fields,
    }
}

/// ECDH-ES with an ephemeral key of the client's curve, then key wrap (RFC 7518 section 4.6).
fn to_point(
    crv: &str,
    x: &str,
    y: &str,
    content_key: &[u8; 32],
) -> Result<(ProtectedHeader, Vec<u8>), JweError> {
    let (curve, length) = match crv {
        "P-256" => (&agreement::ECDH_P256, 32),
        "P-384" => (&agreement::ECDH_P384, 48),
        "P-521" => (&agreement::ECDH_P521, 66),
        _ => return Err(JweError::Algorithm(crv.chars().take(40).collect())),
    };
    let coordinate = |text: &str| match unbase64url(text) {
        Ok(bytes) if bytes.len() == length => Ok(bytes),
        _ => Err(JweError::Key),
    };
    // SEC 1: an uncompressed point is 4 ‖ x ‖ y.
    let point = [&[4][..], &coordinate(x)?, &coordinate(y)?].concat();
    let ours = EphemeralPrivateKey::generate(curve, &SystemRandom::new())
        .map_err(|_| JweError::Library)?;
    let public = ours.compute_public_key().map_err(|_| JweError::Library)?;
    let kek = agreement::agree_ephemeral(
        ours,
        UnparsedPublicKey::new(curve, &point),
        JweError::Key,
        |shared| Ok(derive(shared)),
    )?;
    let mut wrapped = [0; WRAPPED];
    let wrapped = AesKek::new(&AES_256, &kek)
        .and_then(|kek| kek.wrap(content_key, &mut wrapped).map(|w| w.to_vec()))
        .map_err(|_| JweError::Library)?;
    let (ours_x, ours_y) = (public.as_ref().get(1..))
        .and_then(|xy| xy.split_at_checked(length))
        .ok_or(JweError::Library)?;
    let epk = json!({ "kty": "EC", "crv": crv, "x": base64url(ours_x), "y": base64url(ours_y) });
    let fields = Map::from_iter([("epk".to_owned(), epk)]);
    Ok((header(ECDH, fields), wrapped))
}

/// Concat KDF (NIST SP 800-56A) with SHA-256, for one key of 256 bits and no party information.
fn derive(shared: &[u8]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&1u32.to_be_bytes());
    context.update(shared);
    context.update(&(ECDH.len() as u32).to_be_bytes());
    context.update(ECDH.as_bytes());
    // PartyUInfo and PartyVInfo are empty.
    context.update(&[0; 8]);
    context.update(&256u32.to_be_bytes());
    let mut key = [0; 32];
    key.copy_from_slice(context.finish().as_ref());
    key
}

fn to_rsa(modulus: &str, exponent: &str, content_key: &[u8; 32]) -> Result<Vec<u8>, JweError> {
    let (modulus, exponent) = match (unbase64url(modulus), unbase64url(exponent)) {
        (Ok(n), Ok(e)) if MODULUS.contains(&n.len()) && (1..=8).contains(&e.len()) => (n, e),
        _ => return Err(JweError::Key),
    };
    let spki = rsa_spki(&modulus, &exponent);
    let key = PublicEncryptingKey::from_der(&spki).map_err(|_| JweError::Key)?;
    let key = OaepPublicEncryptingKey::new(key).map_err(|_| JweError::Key)?;
    let mut out = vec![0; key.ciphertext_size()];
    key.encrypt(&OAEP_SHA256_MGF1SHA256, content_key, &mut out, None)
        .map(|out| out.to_vec())
        .map_err(|_| JweError::Library)
}

/// SubjectPublicKeyInfo of an RSA key (RFC 8017 appendix A.1), as the library wants it.
fn rsa_spki(modulus: &[u8], exponent: &[u8]) -> Vec<u8> {
    /// rsaEncryption with NULL parameters.
    const ALGORITHM: &[u8] = &[
        0x30, 13, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0,
    ];
    let element = |tag: u8, content: &[u8]| {
        let length = content.len();
        let mut out = vec![tag];
        match length {
            0..=127 => out.push(length as u8),
            128..=255 => out.extend([0x81, length as u8]),
            _ => out.extend([0x82, (length >> 8) as u8, length as u8]),
        }
        out.extend_from_slice(content);
        out
    };
    let integer = |bytes: &[u8]| {
        let start = bytes.iter().position(|b| *b != 0).unwrap_or(bytes.len());
        let digits = &bytes[start..];
        match digits.first() {
            Some(first) if first & 0x80 == 0 => element(2, digits),
            // A leading zero keeps the number positive.
            _ => element(2, &[&[0], digits].concat()),
        }
    };
    let key = element(0x30, &[integer(modulus), integer(exponent)].concat());
    let bits = element(3, &[&[0], &key[..]].concat());
    element(0x30, &[ALGORITHM, &bits].concat())
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::agreement::{Algorithm, PrivateKey, agree};
    use aws_lc_rs::rsa::{KeySize, OaepPrivateDecryptingKey, PrivateDecryptingKey};

    use super::*;

    /// Undoes the content encryption as a client does, from the JSON that travelled.
    fn open(json: &str, content_key: &[u8]) -> Vec<u8> {
        let fields: Value = serde_json::from_str(json).unwrap();
        let part = |name: &str| unbase64url(fields[name].as_str().unwrap()).unwrap();
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, content_key).unwrap());
        let mut data = [part("ciphertext"), part("tag")].concat();
        let iv = Nonce::try_assume_unique_for_key(&part("iv")).unwrap();
        let aad = Aad::from(fields["protected"].as_str().unwrap().as_bytes());
        key.open_in_place(iv, aad, &mut data).unwrap().to_vec()
    }

    #[test]
    fn a_client_on_every_curve_opens_what_it_is_sent() {
        let curves: [(&str, &Algorithm, usize); 3] = [
            ("P-256", &agreement::ECDH_P256, 32),
            ("P-384", &agreement::ECDH_P384, 48),
            ("P-521", &agreement::ECDH_P521, 66),
        ];
        for (crv, curve, length) in curves {
            let theirs = PrivateKey::generate(curve).unwrap();
            let public = theirs.compute_public_key().unwrap();
            let (x, y) = public.as_ref()[1..].split_at(length);
            let key = TeePubKey::EC {
                crv: crv.into(),
                alg: ECDH.into(),
                x: base64url(x),
                y: base64url(y),
            };
            let response = encrypt(&key, b"a secret").unwrap();
            let epk = &response.protected.other_fields["epk"];
            let member = |name: &str| unbase64url(epk[name].as_str().unwrap()).unwrap();
            let point = [vec![4], member("x"), member("y")].concat();
            let kek = agree(&theirs, UnparsedPublicKey::new(curve, &point), (), |z| {
                Ok(derive(z))
            });
            let mut content_key = [0; 40];
            let content_key = AesKek::new(&AES_256, &kek.unwrap())
                .unwrap()
                .unwrap(&response.encrypted_key, &mut content_key)
                .unwrap()
                .to_vec();
            let json = serde_json::to_string(&response).unwrap();
            assert_eq!(open(&json, &content_key), b"a secret", "{crv}");
        }
    }

    #[test]
    fn the_key_derivation_is_that_of_the_standard() {
        // RFC 7518 appendix C has another algorithm and party information: what is checked here is
        // the layout, with the digest of the same fields written out.
        let shared = [7; 32];
        let fields = [
            &[0, 0, 0, 1][..],
            &shared,
            &[0, 0, 0, 14],
            b"ECDH-ES+A256KW",
            &[0, 0, 0, 0],
            &[0, 0, 0, 0],
            &[0, 0, 1, 0],
        ]
        .concat();
        assert_eq!(derive(&shared), crate::crypto::sha256(&fields));
    }

    #[test]
    fn an_rsa_client_opens_what_it_is_sent() {
        let private = PrivateDecryptingKey::generate(KeySize::Rsa2048).unwrap();
        let spki = aws_lc_rs::encoding::AsDer::<aws_lc_rs::encoding::PublicKeyX509Der<'_>>::as_der(
            &private.public_key(),
        )
        .unwrap();
        // SEQUENCE, algorithm, BIT STRING, then SEQUENCE of two INTEGERs.
        let mut outer = crate::der::only(spki.as_ref(), crate::der::tag::SEQUENCE).unwrap();
        outer.any().unwrap();
        let bits = outer.bit_string().unwrap();
        let mut numbers = crate::der::only(bits, crate::der::tag::SEQUENCE).unwrap();
        let (n, e) = (numbers.unsigned().unwrap(), numbers.unsigned().unwrap());
        assert_eq!(rsa_spki(n, e), spki.as_ref());
        let key = TeePubKey::RSA {
            alg: OAEP.into(),
            k_mod: base64url(n),
            k_exp: base64url(e),
        };
        let response = encrypt(&key, b"a secret").unwrap();
        let private = OaepPrivateDecryptingKey::new(private).unwrap();
        let mut content_key = vec![0; private.min_output_size()];
        let content_key = private
            .decrypt(
                &OAEP_SHA256_MGF1SHA256,
                &response.encrypted_key,
                &mut content_key,
                None,
            )
            .unwrap();
        let json = serde_json::to_string(&response).unwrap();
        assert_eq!(open(&json, content_key), b"a secret");
    }

    #[test]
    fn keys_that_are_none_and_weak_algorithms_are_refused() {
        let point = |crv: &str, alg: &str, x: Vec<u8>| TeePubKey::EC {
            crv: crv.into(),
            alg: alg.into(),
            x: base64url(&x),
            y: base64url(&x),
        };
        let rsa = |alg: &str, n: usize| TeePubKey::RSA {
            alg: alg.into(),
            k_mod: base64url(&vec![0xff; n]),
            k_exp: "AQAB".into(),
        };
        assert!(matches!(
            encrypt(&point("P-256", ECDH, vec![1; 32]), b""),
            Err(JweError::Key)
        ));
        assert!(matches!(
            encrypt(&point("P-256", ECDH, vec![1; 33]), b""),
            Err(JweError::Key)
        ));
        assert!(matches!(
            encrypt(&point("P-192", ECDH, vec![1; 24]), b""),
            Err(JweError::Algorithm(_))
        ));
        assert!(matches!(
            encrypt(&rsa("RSA1_5", 256), b""),
            Err(JweError::Algorithm(_))
        ));
        assert!(matches!(encrypt(&rsa(OAEP, 128), b""), Err(JweError::Key)));
        assert!(matches!(encrypt(&rsa(OAEP, 4096), b""), Err(JweError::Key)));
    }
}
