//! OCSP responses (RFC 6960) for one certificate, stored or fresh. The responder is the issuer
//! itself or one that the issuer certified for OCSP. A stored response is bounded by its window.

use crate::crypto::{self, SignatureAlgorithm};
use crate::der::{self, DerError, Reader, tag};
use crate::time::Timestamp;
use crate::x509::{self, Certificate, X509Error, oid};

const BASIC_RESPONSE: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 1];
const NONCE: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 2];
const SHA1: &[u8] = &[0x2b, 14, 3, 2, 26];
const SHA256: &[u8] = &[0x60, 0x86, 0x48, 1, 101, 3, 4, 2, 1];
const SHA384: &[u8] = &[0x60, 0x86, 0x48, 1, 101, 3, 4, 2, 2];
const SHA512: &[u8] = &[0x60, 0x86, 0x48, 1, 101, 3, 4, 2, 3];
/// Answers for at most this many certificates are read from one response.
const MAX_ANSWERS: usize = 32;

/// Why a response says nothing good about a certificate.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OcspError {
    /// Not a basic OCSP response.
    #[error("Not a basic OCSP response")]
    Der(#[from] DerError),
    /// The responder's certificate or a field cannot be read.
    #[error("OCSP response cannot be read")]
    X509(#[from] X509Error),
    /// The responder refused the question.
    #[error("OCSP responder answered with status {0}, not with a response")]
    Status(u8),
    /// Another kind of response.
    #[error("OCSP response is not of the basic type")]
    Type,
    /// It answers for other certificates.
    #[error("OCSP response is about another certificate")]
    OtherCertificate,
    /// Revoked.
    #[error("Certificate is revoked since {0}")]
    Revoked(Timestamp),
    /// The responder does not know the certificate.
    #[error("OCSP responder does not know the certificate")]
    Unknown,
    /// Neither the issuer nor its delegate signed.
    #[error("OCSP response is not signed by the issuer or by a responder that it certified")]
    Signature,
    /// Outside of the window.
    #[error("OCSP response holds from {0} to {1}, not at {2}")]
    Window(Timestamp, Timestamp, Timestamp),
    /// No end, so no stored use.
    #[error("OCSP response has no next update")]
    NoNextUpdate,
    /// The nonce is another than the one that was sent.
    #[error("OCSP nonce is not the one that was sent")]
    Nonce,
}

enum CertStatus {
    Good,
    Revoked(Timestamp),
    Unknown,
}

struct Answer<'a> {
    hash: &'a [u8],
    issuer_name_hash: &'a [u8],
    issuer_key_hash: &'a [u8],
    serial: &'a [u8],
    status: CertStatus,
    this_update: Timestamp,
    next_update: Option<Timestamp>,
}

/// A response, borrowed from its DER.
pub struct OcspResponse<'a> {
    tbs: &'a [u8],
    answers: Vec<Answer<'a>>,
    nonce: Option<&'a [u8]>,
    algorithm: SignatureAlgorithm,
    signature: &'a [u8],
    responders: Vec<Certificate<'a>>,
}

impl<'a> OcspResponse<'a> {
    /// Reads one response; nothing may follow it.
    ///
    /// # Errors
    /// When the bytes are not a successful basic response.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, OcspError> {
        let mut outer = der::only(bytes, tag::SEQUENCE)?;
        match outer.value(tag::ENUMERATED)? {
            [0] => {}
            [status] => return Err(OcspError::Status(*status)),
            _ => return Err(OcspError::Type),
        }
        let mut typed = der::only(outer.value(tag::context(0))?, tag::SEQUENCE)?;
        outer.finish()?;
        if typed.value(tag::OID)? != BASIC_RESPONSE {
            return Err(OcspError::Type);
        }
        let mut basic = der::only(typed.value(tag::OCTET_STRING)?, tag::SEQUENCE)?;
        typed.finish()?;
        let tbs = basic.element(tag::SEQUENCE)?;
        let algorithm = x509::signature_algorithm(basic.value(tag::SEQUENCE)?)?;
        let signature = basic.bit_string()?;
        let mut responders = Vec::new();
        if let Some(list) = basic.optional(tag::context(0))? {
            let mut list = der::only(list, tag::SEQUENCE)?;
            while !list.is_empty() && responders.len() < MAX_ANSWERS {
                responders.push(Certificate::parse(list.element(tag::SEQUENCE)?.raw)?);
            }
        }
        basic.finish()?;
        let (answers, nonce) = response_data(tbs.value)?;
        Ok(Self {
            tbs: tbs.raw,
            answers,
            nonce,
            algorithm,
            signature,
            responders,
        })
    }

    /// What the response says, for people.
    pub fn describe(&self) -> Vec<serde_json::Value> {
        let status = |s: &CertStatus| match s {
            CertStatus::Good => "good".to_owned(),
            CertStatus::Revoked(since) => format!("revoked since {since}"),
            CertStatus::Unknown => "unknown".to_owned(),
        };
        let line = |a: &Answer<'_>| {
            serde_json::json!({
                "serial": crate::encoding::hex(a.serial),
                "status": status(&a.status),
                "this_update": a.this_update.to_string(),
                "next_update": a.next_update.map(|t| t.to_string()),
            })
        };
        self.answers.iter().map(line).collect()
    }

    /// Whether one of the answers is about `certificate` of `issuer`.
    pub fn is_about(&self, certificate: &Certificate<'_>, issuer: &Certificate<'_>) -> bool {
        self.answers.iter().any(|a| a.is_about(certificate, issuer))
    }

    /// Checks that the response is authentic, current at `now`, and that `certificate`, issued by
    /// `issuer`, is good. With `nonce`, the response must carry exactly this one. Returns the end of
    /// the response's window.
    ///
    /// # Errors
    /// Why the certificate is not known to be good.
    pub fn verify(
        &self,
        certificate: &Certificate<'_>,
        issuer: &Certificate<'_>,
        nonce: Option<&[u8]>,
        now: Timestamp,
    ) -> Result<Timestamp, OcspError> {
        let answer = self
            .answers
            .iter()
            .find(|a| a.is_about(certificate, issuer))
            .ok_or(OcspError::OtherCertificate)?;
        let signed = |by: &Certificate<'_>| {
            by.key
                .verify_endorsement(self.algorithm, self.tbs, self.signature)
        };
        let delegated = || {
            self.responders.iter().any(|r| {
                r.signed_by(issuer)
                    && r.extended_key_usages().contains(&oid::OCSP_SIGNING)
                    && r.valid_at(now)
                    && signed(r)
            })
        };
        if !signed(issuer) && !delegated() {
            return Err(OcspError::Signature);
        }
        if nonce.is_some() && self.nonce != nonce {
            return Err(OcspError::Nonce);
        }
        let end = answer.next_update.ok_or(OcspError::NoNextUpdate)?;
        if now < answer.this_update || now > end {
            return Err(OcspError::Window(answer.this_update, end, now));
        }
        match answer.status {
            CertStatus::Good => Ok(end),
            CertStatus::Revoked(since) => Err(OcspError::Revoked(since)),
            CertStatus::Unknown => Err(OcspError::Unknown),
        }
    }
}

impl Answer<'_> {
    fn is_about(&self, certificate: &Certificate<'_>, issuer: &Certificate<'_>) -> bool {
        let hash = |data: &[u8]| match self.hash {
            SHA1 => crypto::sha1_identifier(data).to_vec(),
            SHA256 => crypto::sha256(data).to_vec(),
            SHA384 => crypto::sha384(data).to_vec(),
            SHA512 => crypto::sha512(data).to_vec(),
            _ => Vec::new(),
        };
        certificate.issuer == issuer.subject
            && self.serial == certificate.serial
            && self.issuer_name_hash == hash(issuer.subject)
            && self.issuer_key_hash == hash(issuer.key_bits)
    }
}

fn response_data(content: &[u8]) -> Result<(Vec<Answer<'_>>, Option<&[u8]>), OcspError> {
    let mut body = Reader::new(content);
    if let Some(version) = body.optional(tag::context(0))?
        && Reader::new(version).small()? != 0
    {
        return Err(OcspError::Type);
    }
    // The responder's id only helps to find its certificate; the signature decides.
    body.any()?;
    x509::time(&mut body)?;
    let mut list = body.nested(tag::SEQUENCE)?;
    let mut answers = Vec::new();
    while !list.is_empty() {
        if answers.len() == MAX_ANSWERS {
            return Err(OcspError::Type);
        }
        answers.push(answer(list.nested(tag::SEQUENCE)?)?);
    }
    let mut nonce = None;
    if let Some(list) = body.optional(tag::context(1))? {
        for extension in x509::extensions(list)? {
            if extension.oid == NONCE {
                nonce = Some(Reader::new(extension.value).value(tag::OCTET_STRING)?);
            } else if extension.critical {
                return Err(OcspError::Type);
            }
        }
    }
    body.finish()?;
    Ok((answers, nonce))
}

fn answer(mut single: Reader<'_>) -> Result<Answer<'_>, OcspError> {
    let mut id = single.nested(tag::SEQUENCE)?;
    let hash = id.nested(tag::SEQUENCE)?.value(tag::OID)?;
    let issuer_name_hash = id.value(tag::OCTET_STRING)?;
    let issuer_key_hash = id.value(tag::OCTET_STRING)?;
    let serial = id.unsigned()?;
    id.finish()?;
    let status = single.any()?;
    let status = match status.tag {
        t if t == tag::context_primitive(0) => CertStatus::Good,
        t if t == tag::context(1) => {
            CertStatus::Revoked(x509::time(&mut Reader::new(status.value))?)
        }
        _ => CertStatus::Unknown,
    };
    let this_update = x509::time(&mut single)?;
    let next_update = match single.optional(tag::context(0))? {
        Some(end) => Some(x509::time(&mut Reader::new(end))?),
        None => None,
    };
    if let Some(list) = single.optional(tag::context(1))?
        && x509::extensions(list)?.iter().any(|e| e.critical)
    {
        return Err(OcspError::Type);
    }
    single.finish()?;
    Ok(Answer {
        hash,
        issuer_name_hash,
        issuer_key_hash,
        serial,
        status,
        this_update,
        next_update,
    })
}
