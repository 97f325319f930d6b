//! Certificate revocation lists (RFC 5280 section 5), complete ones of version 2.

use super::{Certificate, X509Error, extensions, oid, signature_algorithm, time};
use crate::crypto::SignatureAlgorithm;
use crate::der::{self, Reader, tag};
use crate::time::Timestamp;

/// A certificate revocation list, borrowed from its DER.
#[derive(Clone, Debug)]
pub struct Crl<'a> {
    /// Issuer's name, DER.
    pub issuer: &'a [u8],
    /// When it was made.
    pub this_update: Timestamp,
    /// Until when it may be used.
    pub next_update: Timestamp,
    tbs: &'a [u8],
    revoked: Vec<&'a [u8]>,
    algorithm: SignatureAlgorithm,
    signature: &'a [u8],
}

/// Why a CRL does not vouch for a certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CrlError {
    /// Made by somebody else.
    #[error("CRL is not signed by {0}")]
    Signature(String),
    /// Outside of its time window.
    #[error("CRL is valid from {0} to {1}, not at {2}")]
    Validity(Timestamp, Timestamp, Timestamp),
    /// The certificate is on it.
    #[error("{0} is revoked")]
    Revoked(String),
}

impl<'a> Crl<'a> {
    /// Reads one CRL; nothing may follow it.
    ///
    /// # Errors
    /// When the bytes are not a version 2 CRL with a next update and a known signature algorithm.
    pub fn parse(der: &'a [u8]) -> Result<Self, X509Error> {
        let mut outer = der::only(der, tag::SEQUENCE)?;
        let tbs = outer.element(tag::SEQUENCE)?;
        let algorithm = outer.element(tag::SEQUENCE)?;
        let signature = outer.bit_string()?;
        outer.finish()?;
        let mut body = Reader::new(tbs.value);
        if body.small()? != 1 {
            return Err(X509Error::Version);
        }
        if body.element(tag::SEQUENCE)?.raw != algorithm.raw {
            return Err(X509Error::AlgorithmMismatch);
        }
        let issuer = body.element(tag::SEQUENCE)?.raw;
        let this_update = time(&mut body)?;
        let next_update = time(&mut body)?;
        let mut revoked = Vec::new();
        if let Some(list) = body.optional(tag::SEQUENCE)? {
            let mut entries = Reader::new(list);
            while !entries.is_empty() {
                revoked.push(entries.nested(tag::SEQUENCE)?.unsigned()?);
            }
        }
        if let Some(list) = body.optional(tag::context(0))? {
            // A critical extension (a delta or a partial CRL) would change what absence means.
            if let Some(e) = extensions(list)?
                .iter()
                .find(|e| e.critical && e.oid != oid::ISSUING_DISTRIBUTION_POINT)
            {
                return Err(X509Error::Algorithm(format!(
                    "with critical CRL extension {}",
                    der::oid_text(e.oid)
                )));
            }
        }
        body.finish()?;
        let algorithm = signature_algorithm(algorithm.value)?;
        Ok(Self {
            issuer,
            this_update,
            next_update,
            tbs: tbs.raw,
            revoked,
            algorithm,
            signature,
        })
    }

    /// The serial numbers on the list.
    pub fn revoked(&self) -> impl Iterator<Item = &'a [u8]> {
        self.revoked.iter().copied()
    }

    /// Checks that the CRL is `issuer`'s and current at `now`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn verify(&self, issuer: &Certificate<'_>, now: Timestamp) -> Result<(), CrlError> {
        let crl_sign = issuer.key_usage().is_none_or(|bits| bits & 0x02 != 0);
        if self.issuer != issuer.subject
            || !crl_sign
            || !issuer
                .key
                .verify_endorsement(self.algorithm, self.tbs, self.signature)
        {
            return Err(CrlError::Signature(issuer.label()));
        }
        if now < self.this_update || now > self.next_update {
            return Err(CrlError::Validity(self.this_update, self.next_update, now));
        }
        Ok(())
    }

    /// Checks that `certificate`, which must be of this CRL's issuer, is not on the list.
    ///
    /// # Errors
    /// When it is revoked or of another issuer.
    pub fn admits(&self, certificate: &Certificate<'_>) -> Result<(), CrlError> {
        if certificate.issuer != self.issuer {
            return Err(CrlError::Signature(format!(
                "the issuer of {}",
                certificate.label()
            )));
        }
        if self.revoked.contains(&certificate.serial) {
            return Err(CrlError::Revoked(certificate.label()));
        }
        Ok(())
    }
}
