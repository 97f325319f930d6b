//! Signatures and digests: the one place that calls the cryptographic library. Each algorithm is
//! bound to its key type; nothing here negotiates.

use aws_lc_rs::digest;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_ASN1,
    ECDSA_P384_SHA384_FIXED, RSA_PSS_2048_8192_SHA384, UnparsedPublicKey, VerificationAlgorithm,
};

use crate::memo::Memo;

/// Signature algorithms that the formats of this room use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignatureAlgorithm {
    /// ECDSA on P-256 with SHA-256.
    EcdsaP256Sha256,
    /// ECDSA on P-384 with SHA-384.
    EcdsaP384Sha384,
    /// RSASSA-PSS with SHA-384, MGF1 with SHA-384 and a salt of 48 bytes.
    RsaPssSha384,
}

/// A public key, as it stands in a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublicKey<'a> {
    /// Uncompressed point on P-256, 65 bytes.
    P256(&'a [u8]),
    /// Uncompressed point on P-384, 97 bytes.
    P384(&'a [u8]),
    /// DER of RSAPublicKey.
    Rsa(&'a [u8]),
}

impl PublicKey<'_> {
    /// Whether `signature` (DER for ECDSA) is this key's over `message`, with the one algorithm
    /// that belongs to this type of key.
    pub fn verify(&self, algorithm: SignatureAlgorithm, message: &[u8], signature: &[u8]) -> bool {
        use SignatureAlgorithm as A;
        match (self, algorithm) {
            (Self::P256(key), A::EcdsaP256Sha256) => {
                check(&ECDSA_P256_SHA256_ASN1, key, message, signature)
            }
            (Self::P384(key), A::EcdsaP384Sha384) => {
                check(&ECDSA_P384_SHA384_ASN1, key, message, signature)
            }
            (Self::Rsa(key), A::RsaPssSha384) => {
                check(&RSA_PSS_2048_8192_SHA384, key, message, signature)
            }
            _ => false,
        }
    }

    /// As [`Self::verify`], for what many pieces of evidence share: a signature that was found good is
    /// not verified again.
    pub fn verify_endorsement(
        &self,
        algorithm: SignatureAlgorithm,
        message: &[u8],
        signature: &[u8],
    ) -> bool {
        self.remembered(algorithm as u8, message, signature, || {
            self.verify(algorithm, message, signature)
        })
    }

    /// As [`Self::verify_fixed`], for what many pieces of evidence share.
    pub fn verify_endorsement_fixed(&self, message: &[u8], signature: &[u8]) -> bool {
        const FIXED: u8 = 0xff;
        self.remembered(FIXED, message, signature, || {
            self.verify_fixed(message, signature)
        })
    }

    fn remembered(
        &self,
        form: u8,
        message: &[u8],
        signature: &[u8],
        verify: impl FnOnce() -> bool,
    ) -> bool {
        static GOOD: Memo<()> = Memo::new(8192);
        let (kind, key) = match self {
            Self::P256(key) => (0, key),
            Self::P384(key) => (1, key),
            Self::Rsa(key) => (2, key),
        };
        let mut digest = Digest384::new();
        for part in [&[kind, form][..], key, message, signature] {
            digest.add(&(part.len() as u64).to_le_bytes());
            digest.add(part);
        }
        let id = digest.finish();
        if GOOD.get(&id).is_some() {
            return true;
        }
        let good = verify();
        if good {
            GOOD.put(id, ());
        }
        good
    }

    /// As [`Self::verify`], for an ECDSA signature that is `r ‖ s`, big endian, of fixed length.
    pub fn verify_fixed(&self, message: &[u8], signature: &[u8]) -> bool {
        match self {
            Self::P256(key) => check(&ECDSA_P256_SHA256_FIXED, key, message, signature),
            Self::P384(key) => check(&ECDSA_P384_SHA384_FIXED, key, message, signature),
            Self::Rsa(_) => false,
        }
    }
}

fn check(
    algorithm: &'static dyn VerificationAlgorithm,
    key: &[u8],
    message: &[u8],
    signature: &[u8],
) -> bool {
    UnparsedPublicKey::new(algorithm, key)
        .verify(message, signature)
        .is_ok()
}

fn array<const N: usize>(algorithm: &'static digest::Algorithm, data: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(digest::digest(algorithm, data).as_ref());
    out
}

/// SHA-256.
pub fn sha256(data: &[u8]) -> [u8; 32] {
    array(&digest::SHA256, data)
}

/// SHA-384.
pub fn sha384(data: &[u8]) -> [u8; 48] {
    array(&digest::SHA384, data)
}

/// SHA-384 of data that comes in parts.
pub struct Digest384(digest::Context);

impl Digest384 {
    /// Of nothing so far.
    #[expect(
        clippy::new_without_default,
        reason = "a digest of nothing is no default of anything"
    )]
    pub fn new() -> Self {
        Self(digest::Context::new(&digest::SHA384))
    }

    /// Adds a part.
    pub fn add(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The digest of all parts.
    pub fn finish(self) -> [u8; 48] {
        let mut out = [0; 48];
        out.copy_from_slice(self.0.finish().as_ref());
        out
    }
}

/// SHA-512.
pub fn sha512(data: &[u8]) -> [u8; 64] {
    array(&digest::SHA512, data)
}

/// SHA-1; only where a format names certificates by it (OCSP's certificate ids).
pub fn sha1_identifier(data: &[u8]) -> [u8; 20] {
    array(&digest::SHA1_FOR_LEGACY_USE_ONLY, data)
}
