//! The simulator's private keys, of the kinds that manufacturers use: P-256 (Intel), P-384 (AMD's
//! chips, NVIDIA) and RSA-4096 (AMD's roots).

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair as RsaKeyPair, KeySize};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING,
    ECDSA_P384_SHA384_ASN1_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
    EcdsaSigningAlgorithm, KeyPair, RSA_PSS_SHA384,
};

use super::SimulateError;
use super::encode::{bits, element, oid, sequence};
use crate::der::tag;
use crate::x509::{PSS_SHA384, oid as ids};

/// Kind of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    P256,
    P384,
    Rsa,
}

impl Kind {
    fn ecdsa(self, asn1: bool) -> &'static EcdsaSigningAlgorithm {
        match (self, asn1) {
            (Self::P256, true) => &ECDSA_P256_SHA256_ASN1_SIGNING,
            (Self::P256, false) => &ECDSA_P256_SHA256_FIXED_SIGNING,
            (_, true) => &ECDSA_P384_SHA384_ASN1_SIGNING,
            (_, false) => &ECDSA_P384_SHA384_FIXED_SIGNING,
        }
    }
}

/// A private key.
pub(super) struct Key {
    pair: Pair,
    /// PKCS #8: the secret, as it lies in a file.
    pub(super) pkcs8: Vec<u8>,
    /// What the certificate's BIT STRING holds.
    pub(super) public: Vec<u8>,
}

/// The key, ready to sign: certificates carry ECDSA signatures in DER, reports in fixed length.
enum Pair {
    Ecdsa(Kind, Box<[EcdsaKeyPair; 2]>),
    Rsa(RsaKeyPair),
}

impl Key {
    pub(super) fn generate(kind: Kind) -> Result<Self, SimulateError> {
        let library = |_| SimulateError::Library;
        let pkcs8 = if kind == Kind::Rsa {
            let pair = RsaKeyPair::generate(KeySize::Rsa4096).map_err(library)?;
            AsDer::<Pkcs8V1Der<'_>>::as_der(&pair)
                .map_err(library)?
                .as_ref()
                .to_vec()
        } else {
            let pair = EcdsaKeyPair::generate(kind.ecdsa(true)).map_err(library)?;
            pair.to_pkcs8v1().map_err(library)?.as_ref().to_vec()
        };
        Self::from_pkcs8(kind, pkcs8)
    }

    pub(super) fn from_pkcs8(kind: Kind, pkcs8: Vec<u8>) -> Result<Self, SimulateError> {
        let (pair, public) = if kind == Kind::Rsa {
            let pair = RsaKeyPair::from_pkcs8(&pkcs8).map_err(|_| SimulateError::Key)?;
            let public = pair.public_key().as_ref().to_vec();
            (Pair::Rsa(pair), public)
        } else {
            let read = |asn1| {
                EcdsaKeyPair::from_pkcs8(kind.ecdsa(asn1), &pkcs8).map_err(|_| SimulateError::Key)
            };
            let pairs = [read(true)?, read(false)?];
            let public = pairs[0].public_key().as_ref().to_vec();
            (Pair::Ecdsa(kind, Box::new(pairs)), public)
        };
        Ok(Self {
            pair,
            pkcs8,
            public,
        })
    }

    /// SubjectPublicKeyInfo, DER.
    pub(super) fn spki(&self) -> Vec<u8> {
        let algorithm = match self.pair {
            Pair::Ecdsa(Kind::P256, _) => sequence(&[&oid(ids::EC_PUBLIC_KEY), &oid(ids::P256)]),
            Pair::Ecdsa(..) => sequence(&[&oid(ids::EC_PUBLIC_KEY), &oid(ids::P384)]),
            Pair::Rsa(_) => sequence(&[&oid(ids::RSA), &element(5, &[])]),
        };
        sequence(&[&algorithm, &bits(&self.public)])
    }

    /// AlgorithmIdentifier of the signatures that this key makes.
    pub(super) fn algorithm(&self) -> Vec<u8> {
        match self.pair {
            Pair::Ecdsa(Kind::P256, _) => sequence(&[&oid(ids::ECDSA_SHA256)]),
            Pair::Ecdsa(..) => sequence(&[&oid(ids::ECDSA_SHA384)]),
            Pair::Rsa(_) => sequence(&[&oid(ids::RSA_PSS), &element(tag::SEQUENCE, PSS_SHA384)]),
        }
    }

    /// A signature as certificates carry it.
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SimulateError> {
        match &self.pair {
            Pair::Ecdsa(_, pairs) => ecdsa(&pairs[0], message),
            Pair::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                let random = SystemRandom::new();
                pair.sign(&RSA_PSS_SHA384, &random, message, &mut signature)
                    .map_err(|_| SimulateError::Library)?;
                Ok(signature)
            }
        }
    }

    /// An ECDSA signature as reports carry it: `r ‖ s`, big endian.
    pub(super) fn sign_fixed(&self, message: &[u8]) -> Result<Vec<u8>, SimulateError> {
        match &self.pair {
            Pair::Ecdsa(_, pairs) => ecdsa(&pairs[1], message),
            Pair::Rsa(_) => Err(SimulateError::Key),
        }
    }
}

fn ecdsa(pair: &EcdsaKeyPair, message: &[u8]) -> Result<Vec<u8>, SimulateError> {
    let signature = pair.sign(&SystemRandom::new(), message);
    Ok(signature
        .map_err(|_| SimulateError::Library)?
        .as_ref()
        .to_vec())
}
