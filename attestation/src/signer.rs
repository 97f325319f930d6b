//! The verifier's signing key: a P-384 key that signs tokens and the audit log's checkpoints. It is
//! kept as PKCS #8 DER; where the bytes lie and who may read them is the caller's business.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use serde::Serialize;

use crate::binding::PublicKey;
use crate::token::{self, Claims, TokenError};

/// Why there is no key, or no signature.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// The library could not make a key or a signature.
    #[error("Cryptographic library failed")]
    Library,
    /// Not a key of this kind.
    #[error("Not a P-384 private key in PKCS #8")]
    Key,
    /// Claims that cannot be written.
    #[error("Token")]
    Token(#[from] TokenError),
}

/// A signing key.
pub struct Signer {
    pair: EcdsaKeyPair,
    public: PublicKey,
}

impl std::fmt::Debug for Signer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Signer({})", self.public.thumbprint())
    }
}

impl Signer {
    /// A new key.
    ///
    /// # Errors
    /// When the library fails.
    pub fn generate() -> Result<Self, SignerError> {
        let pair = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING);
        Self::from_pair(pair.map_err(|_| SignerError::Library)?)
    }

    /// The key of a PKCS #8 DER.
    ///
    /// # Errors
    /// When it is another kind of key.
    pub fn from_pkcs8(der: &[u8]) -> Result<Self, SignerError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P384_SHA384_FIXED_SIGNING, der);
        Self::from_pair(pair.map_err(|_| SignerError::Key)?)
    }

    fn from_pair(pair: EcdsaKeyPair) -> Result<Self, SignerError> {
        let public = PublicKey::from_point(pair.public_key().as_ref());
        let public = public.map_err(|_| SignerError::Key)?;
        Ok(Self { pair, public })
    }

    /// The key as PKCS #8 DER: a secret.
    ///
    /// # Errors
    /// When the library fails.
    pub fn to_pkcs8(&self) -> Result<Vec<u8>, SignerError> {
        let der = self.pair.to_pkcs8v1().map_err(|_| SignerError::Library)?;
        Ok(der.as_ref().to_vec())
    }

    /// Its public half, whose thumbprint is the `kid`.
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// The ECDSA signature with SHA-384 over a message: `r ‖ s`, 96 bytes.
    ///
    /// # Errors
    /// When the library fails.
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignerError> {
        let signature = self.pair.sign(&SystemRandom::new(), message);
        Ok(signature
            .map_err(|_| SignerError::Library)?
            .as_ref()
            .to_vec())
    }

    /// A token.
    ///
    /// # Errors
    /// When the library fails.
    pub fn token<K: Serialize>(&self, claims: &Claims<K>) -> Result<String, SignerError> {
        let input = token::signing_input(&self.public, claims)?;
        let signature = self.sign(input.as_bytes())?;
        Ok(token::assemble(&input, &signature))
    }
}
