//! Chains: from a leaf to a pinned root (RFC 5280 section 6, without name and policy constraints,
//! which no manufacturer's chain has).

use super::{Certificate, oid};
use crate::anchors::{Pin, pin_of};
use crate::der;
use crate::time::Timestamp;

/// Longest chain that is looked at.
const MAX_CHAIN: usize = 8;

/// Why a chain does not lead to an anchor.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ChainError {
    /// Too few or too many certificates.
    #[error("Chain of {0} certificates; 1 to {MAX_CHAIN} are allowed")]
    Length(usize),
    /// The issuer's name is not the next certificate's subject.
    #[error("{0} names another issuer than the next certificate of the chain")]
    Name(String),
    /// A signature does not verify.
    #[error("Signature of {0} is not its issuer's")]
    Signature(String),
    /// An issuer that is not a CA, or may not sign certificates, or not at this depth.
    #[error("{0} may not issue certificates here")]
    NotCa(String),
    /// A critical extension nobody here understands.
    #[error("{0} has the unknown critical extension {1}")]
    Critical(String, String),
    /// Outside of the validity period.
    #[error("{0} is valid from {1} to {2}, not at {3}")]
    Validity(String, Timestamp, Timestamp, Timestamp),
    /// The last certificate's key is not pinned.
    #[error("Root {0} is not a trust anchor (SHA-384 of its key {1})")]
    Root(String, String),
}

/// Checks a chain from a leaf to a pinned root: names, signatures, CA rights, validity at `now`.
/// Returns the earliest end of validity in the chain.
///
/// # Errors
/// What breaks the chain, and where.
pub fn verify_chain(
    chain: &[&Certificate<'_>],
    anchors: &[Pin],
    now: Timestamp,
) -> Result<Timestamp, ChainError> {
    const KNOWN: [&[u8]; 8] = [
        oid::BASIC_CONSTRAINTS,
        oid::KEY_USAGE,
        oid::SUBJECT_KEY_ID,
        oid::AUTHORITY_KEY_ID,
        oid::SUBJECT_ALT_NAME,
        oid::EXTENDED_KEY_USAGE,
        oid::CRL_DISTRIBUTION_POINTS,
        oid::CERTIFICATE_POLICIES,
    ];
    let root = match chain {
        [.., root] if chain.len() <= MAX_CHAIN => *root,
        _ => return Err(ChainError::Length(chain.len())),
    };
    if !anchors.contains(&pin_of(root)) {
        return Err(ChainError::Root(
            root.label(),
            crate::encoding::hex(&pin_of(root)),
        ));
    }
    let mut end = root.not_after;
    for (depth, certificate) in chain.iter().enumerate() {
        if let Some(unknown) = certificate
            .extensions
            .iter()
            .find(|e| e.critical && !KNOWN.contains(&e.oid))
        {
            return Err(ChainError::Critical(
                certificate.label(),
                der::oid_text(unknown.oid),
            ));
        }
        if depth > 0 && !certificate.may_issue(depth as u64 - 1) {
            return Err(ChainError::NotCa(certificate.label()));
        }
        // The root signs itself; its key is pinned, so its own signature says nothing more.
        let issuer = chain.get(depth + 1).copied().unwrap_or(root);
        if certificate.issuer != issuer.subject {
            return Err(ChainError::Name(certificate.label()));
        }
        if !certificate.signed_by(issuer) {
            return Err(ChainError::Signature(certificate.label()));
        }
        if !certificate.valid_at(now) {
            return Err(ChainError::Validity(
                certificate.label(),
                certificate.not_before,
                certificate.not_after,
                now,
            ));
        }
        end = end.min(certificate.not_after);
    }
    Ok(end)
}
