//! X.509 certificates, chains and CRLs (RFC 5280), as far as the manufacturers' chains use them.
//! What is signed is the exact bytes that were read; nothing is re-encoded. An unknown critical
//! extension, algorithm or key is refused. A serial number of zero is fine (AMD's VCEK has it).

mod chain;
mod crl;

pub use chain::{ChainError, verify_chain};
pub use crl::{Crl, CrlError};

use crate::crypto::{PublicKey, SignatureAlgorithm};
use crate::der::{self, DerError, Reader, tag};
use crate::time::Timestamp;

/// Object identifiers, content octets.
pub mod oid {
    #![expect(missing_docs, reason = "the names are those of the registries")]
    pub const COMMON_NAME: &[u8] = &[0x55, 4, 3];
    pub const SUBJECT_KEY_ID: &[u8] = &[0x55, 0x1d, 14];
    pub const KEY_USAGE: &[u8] = &[0x55, 0x1d, 15];
    pub const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 17];
    pub const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 19];
    pub const CRL_DISTRIBUTION_POINTS: &[u8] = &[0x55, 0x1d, 31];
    pub const CERTIFICATE_POLICIES: &[u8] = &[0x55, 0x1d, 32];
    pub const AUTHORITY_KEY_ID: &[u8] = &[0x55, 0x1d, 35];
    pub const EXTENDED_KEY_USAGE: &[u8] = &[0x55, 0x1d, 37];
    pub const ISSUING_DISTRIBUTION_POINT: &[u8] = &[0x55, 0x1d, 28];
    pub const EC_PUBLIC_KEY: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1];
    pub const P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
    pub const P384: &[u8] = &[0x2b, 0x81, 4, 0, 0x22];
    pub const ECDSA_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
    pub const ECDSA_SHA384: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3];
    pub const RSA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1];
    pub const RSA_PSS: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 10];
    pub const OCSP_SIGNING: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 3, 9];
}

/// Parameters of RSASSA-PSS with SHA-384, MGF1 with SHA-384, salt 48; the trailer field (default)
/// is written out by AMD, against DER, so both forms are known.
pub(crate) const PSS_SHA384: &[u8] = &[
    0xa0, 0x0f, 0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05,
    0x00, 0xa1, 0x1c, 0x30, 0x1a, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x08,
    0x30, 0x0d, 0x06, 0x09, 0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02, 0x05, 0x00, 0xa2,
    0x03, 0x02, 0x01, 0x30,
];
const PSS_TRAILER: &[u8] = &[0xa3, 0x03, 0x02, 0x01, 0x01];

/// Why a certificate or a CRL cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum X509Error {
    /// Not DER.
    #[error("Not a DER certificate or CRL")]
    Der(#[from] DerError),
    /// Not version 3 (certificate) or 2 (CRL).
    #[error("X.509 version is not supported")]
    Version,
    /// A date that does not exist.
    #[error("Validity date is not a date")]
    Date,
    /// A signature algorithm that no chain of this room uses.
    #[error("Signature algorithm {0} is not supported")]
    Algorithm(String),
    /// The algorithm inside the signed part is another than outside.
    #[error("Signature algorithm differs between the signed part and the signature")]
    AlgorithmMismatch,
    /// A key type that no chain of this room uses.
    #[error("Public key algorithm {0} is not supported")]
    Key(String),
    /// The same extension twice.
    #[error("Extension {0} occurs twice")]
    DuplicateExtension(String),
}

/// One extension.
#[derive(Clone, Copy, Debug)]
pub struct Extension<'a> {
    /// Its object identifier, content octets.
    pub oid: &'a [u8],
    /// Whether who does not know it must refuse.
    pub critical: bool,
    /// Content of its OCTET STRING.
    pub value: &'a [u8],
}

/// A certificate, borrowed from its DER.
#[derive(Clone, Debug)]
pub struct Certificate<'a> {
    /// The whole encoding.
    pub der: &'a [u8],
    /// What is signed.
    pub tbs: &'a [u8],
    /// Serial number, without leading zero.
    pub serial: &'a [u8],
    /// Issuer's name, DER.
    pub issuer: &'a [u8],
    /// Subject's name, DER.
    pub subject: &'a [u8],
    /// First second of validity.
    pub not_before: Timestamp,
    /// Last second of validity.
    pub not_after: Timestamp,
    /// SubjectPublicKeyInfo, DER.
    pub spki: &'a [u8],
    /// The key's bits (content of the BIT STRING), which OCSP hashes.
    pub key_bits: &'a [u8],
    /// The key.
    pub key: PublicKey<'a>,
    /// All extensions.
    pub extensions: Vec<Extension<'a>>,
    algorithm: SignatureAlgorithm,
    signature: &'a [u8],
}

impl<'a> Certificate<'a> {
    /// Reads one certificate; nothing may follow it.
    ///
    /// # Errors
    /// When the bytes are not a version 3 certificate with a known key and signature algorithm.
    pub fn parse(der: &'a [u8]) -> Result<Self, X509Error> {
        let mut outer = der::only(der, tag::SEQUENCE)?;
        let tbs = outer.element(tag::SEQUENCE)?;
        let algorithm = outer.element(tag::SEQUENCE)?;
        let signature = outer.bit_string()?;
        outer.finish()?;

        let mut body = Reader::new(tbs.value);
        let mut version = body.nested(tag::context(0))?;
        if version.small()? != 2 {
            return Err(X509Error::Version);
        }
        version.finish()?;
        let serial = body.unsigned()?;
        if body.element(tag::SEQUENCE)?.raw != algorithm.raw {
            return Err(X509Error::AlgorithmMismatch);
        }
        let issuer = body.element(tag::SEQUENCE)?.raw;
        let mut validity = body.nested(tag::SEQUENCE)?;
        let not_before = time(&mut validity)?;
        let not_after = time(&mut validity)?;
        validity.finish()?;
        let subject = body.element(tag::SEQUENCE)?.raw;
        let spki = body.element(tag::SEQUENCE)?;
        let (key, key_bits) = public_key(spki.value)?;
        let extensions = match body.optional(tag::context(3))? {
            Some(list) => extensions(list)?,
            None => Vec::new(),
        };
        body.finish()?;
        Ok(Self {
            der,
            tbs: tbs.raw,
            serial,
            issuer,
            subject,
            not_before,
            not_after,
            spki: spki.raw,
            key_bits,
            key,
            extensions,
            algorithm: signature_algorithm(algorithm.value)?,
            signature,
        })
    }

    /// The value of an extension.
    pub fn extension(&self, oid: &[u8]) -> Option<&'a [u8]> {
        self.extensions
            .iter()
            .find(|e| e.oid == oid)
            .map(|e| e.value)
    }

    /// The subject's common name, for messages and for the manufacturers' naming rules.
    pub fn common_name(&self) -> Option<&'a str> {
        let mut names = der::only(self.subject, tag::SEQUENCE).ok()?;
        let mut found = None;
        while !names.is_empty() {
            let mut set = names.nested(tag::SET).ok()?;
            let mut pair = set.nested(tag::SEQUENCE).ok()?;
            if pair.value(tag::OID).ok()? == oid::COMMON_NAME {
                found = std::str::from_utf8(pair.any().ok()?.value).ok();
            }
        }
        found
    }

    /// A name for messages: the common name, cleaned and cut.
    pub fn label(&self) -> String {
        let name = self.common_name().unwrap_or("(no common name)");
        name.chars().filter(|c| !c.is_control()).take(64).collect()
    }

    /// Whether `issuer`'s key made this certificate's signature and `issuer` is the one it names.
    pub fn signed_by(&self, issuer: &Certificate<'_>) -> bool {
        self.issuer == issuer.subject
            && issuer
                .key
                .verify_endorsement(self.algorithm, self.tbs, self.signature)
    }

    /// Whether `now` is within the validity period.
    pub fn valid_at(&self, now: Timestamp) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// The extended key usages, as content octets of their identifiers.
    pub fn extended_key_usages(&self) -> Vec<&'a [u8]> {
        let read = || {
            let mut list =
                der::only(self.extension(oid::EXTENDED_KEY_USAGE)?, tag::SEQUENCE).ok()?;
            let mut usages = Vec::new();
            while !list.is_empty() {
                usages.push(list.value(tag::OID).ok()?);
            }
            Some(usages)
        };
        read().unwrap_or_default()
    }

    /// Whether it may issue certificates with `below` CA certificates between it and the leaf.
    fn may_issue(&self, below: u64) -> bool {
        let constraint = || {
            let mut fields =
                der::only(self.extension(oid::BASIC_CONSTRAINTS)?, tag::SEQUENCE).ok()?;
            let ca = fields.optional(tag::BOOLEAN).ok()? == Some(&[0xff]);
            let limit = if fields.is_empty() {
                None
            } else {
                Some(fields.small().ok()?)
            };
            fields.finish().ok()?;
            Some(ca && limit.is_none_or(|l| below <= l))
        };
        // Bit 5 of KeyUsage is keyCertSign; an absent extension does not restrict.
        constraint() == Some(true) && self.key_usage().is_none_or(|bits| bits & 0x04 != 0)
    }

    /// The first octet of KeyUsage; zero if it cannot be read.
    fn key_usage(&self) -> Option<u8> {
        let value = self.extension(oid::KEY_USAGE)?;
        let bits = Reader::new(value)
            .value(tag::BIT_STRING)
            .unwrap_or_default();
        Some(bits.get(1).copied().unwrap_or(0))
    }
}

/// Reads every certificate of a list of DER encodings.
///
/// # Errors
/// When one of them cannot be read.
pub fn parse_all(ders: &[Vec<u8>]) -> Result<Vec<Certificate<'_>>, X509Error> {
    ders.iter().map(|d| Certificate::parse(d)).collect()
}

/// A Time (UTCTime or GeneralizedTime).
pub(crate) fn time(reader: &mut Reader<'_>) -> Result<Timestamp, X509Error> {
    let element = reader.any()?;
    match element.tag {
        tag::UTC_TIME => Timestamp::from_utc_time(element.value),
        tag::GENERALIZED_TIME => Timestamp::from_generalized_time(element.value),
        _ => None,
    }
    .ok_or(X509Error::Date)
}

fn public_key(spki: &[u8]) -> Result<(PublicKey<'_>, &[u8]), X509Error> {
    let mut fields = Reader::new(spki);
    let mut algorithm = fields.nested(tag::SEQUENCE)?;
    let bits = fields.bit_string()?;
    fields.finish()?;
    let kind = algorithm.value(tag::OID)?;
    let unknown = |oid: &[u8]| X509Error::Key(der::oid_text(oid));
    let key = match kind {
        oid::EC_PUBLIC_KEY => match algorithm.value(tag::OID)? {
            oid::P256 if bits.len() == 65 => PublicKey::P256(bits),
            oid::P384 if bits.len() == 97 => PublicKey::P384(bits),
            other => return Err(unknown(other)),
        },
        oid::RSA => PublicKey::Rsa(bits),
        other => return Err(unknown(other)),
    };
    Ok((key, bits))
}

/// An AlgorithmIdentifier's content.
pub(crate) fn signature_algorithm(content: &[u8]) -> Result<SignatureAlgorithm, X509Error> {
    let mut fields = Reader::new(content);
    let id = fields.value(tag::OID)?;
    let unknown = || X509Error::Algorithm(der::oid_text(id));
    match id {
        oid::ECDSA_SHA256 if fields.is_empty() => Ok(SignatureAlgorithm::EcdsaP256Sha256),
        oid::ECDSA_SHA384 if fields.is_empty() => Ok(SignatureAlgorithm::EcdsaP384Sha384),
        oid::RSA_PSS => {
            let parameters = fields.value(tag::SEQUENCE)?;
            let parameters = parameters.strip_suffix(PSS_TRAILER).unwrap_or(parameters);
            if parameters == PSS_SHA384 {
                Ok(SignatureAlgorithm::RsaPssSha384)
            } else {
                Err(unknown())
            }
        }
        _ => Err(unknown()),
    }
}

/// The content of an explicit `[n] Extensions`.
pub(crate) fn extensions(content: &[u8]) -> Result<Vec<Extension<'_>>, X509Error> {
    let mut list = der::only(content, tag::SEQUENCE)?;
    let mut extensions: Vec<Extension<'_>> = Vec::new();
    while !list.is_empty() {
        let mut fields = list.nested(tag::SEQUENCE)?;
        let oid = fields.value(tag::OID)?;
        let critical = fields.optional(tag::BOOLEAN)?.is_some_and(|b| b != [0]);
        let value = fields.value(tag::OCTET_STRING)?;
        fields.finish()?;
        if extensions.iter().any(|e| e.oid == oid) {
            return Err(X509Error::DuplicateExtension(der::oid_text(oid)));
        }
        extensions.push(Extension {
            oid,
            critical,
            value,
        });
    }
    Ok(extensions)
}
