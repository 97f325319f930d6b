//! Issues certificates, CRLs and OCSP responses (RFC 5280, RFC 6960) with the simulator's keys.

use super::SimulateError;
use super::encode::{bits, element, explicit, integer, name, octets, oid, sequence, small, time};
use super::keys::Key;
use crate::crypto::{sha256, sha384};
use crate::der::tag;
use crate::time::Timestamp;
use crate::x509::oid as ids;

const BASIC_RESPONSE: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 1];
const NONCE: &[u8] = &[0x2b, 6, 1, 5, 5, 7, 48, 1, 2];
const SHA256: &[u8] = &[0x60, 0x86, 0x48, 1, 101, 3, 4, 2, 1];
/// 2.5.4.5, serialNumber in a name.
const SERIAL_NUMBER: &[u8] = &[0x55, 4, 5];
const CRL_NUMBER: &[u8] = &[0x55, 0x1d, 20];

/// A key with the name it has in certificates.
pub(super) struct Entity<'a> {
    pub(super) key: &'a Key,
    pub(super) name: Vec<u8>,
}

impl<'a> Entity<'a> {
    pub(super) fn new(key: &'a Key, common_name: &str) -> Self {
        let name = name(&[(ids::COMMON_NAME, common_name)]);
        Self { key, name }
    }

    /// With a device's serial number in its name.
    pub(super) fn with_serial(key: &'a Key, common_name: &str, serial: &str) -> Self {
        let name = name(&[(ids::COMMON_NAME, common_name), (SERIAL_NUMBER, serial)]);
        Self { key, name }
    }
}

/// From when to when something is valid.
pub(super) type Window = (Timestamp, Timestamp);

/// What a certificate is for.
pub(super) struct Certificate<'a> {
    pub(super) subject: &'a Entity<'a>,
    pub(super) issuer: &'a Entity<'a>,
    /// May issue certificates.
    pub(super) ca: bool,
    pub(super) window: Window,
    /// Further extensions: identifier and content.
    pub(super) extensions: Vec<(Vec<u8>, Vec<u8>)>,
    /// Serial number of zero, as VCEKs have it.
    pub(super) zero_serial: bool,
}

/// The serial number of a subject: the first bytes of its key's and name's digest.
fn serial(subject: &Entity<'_>) -> [u8; 16] {
    let digest = sha384(&[&subject.key.public[..], &subject.name].concat());
    let mut serial = [0; 16];
    serial.copy_from_slice(&digest[..16]);
    serial[0] = serial[0] & 0x7f | 1;
    serial
}

impl Certificate<'_> {
    /// DER.
    pub(super) fn issue(&self) -> Result<Vec<u8>, SimulateError> {
        let serial = if self.zero_serial {
            small(0)
        } else {
            integer(&serial(self.subject))
        };
        let flag = |set: bool| {
            if set {
                element(tag::BOOLEAN, &[0xff])
            } else {
                Vec::new()
            }
        };
        let extension = |id: &[u8], critical: bool, value: &[u8]| {
            sequence(&[&oid(id), &flag(critical), &octets(value)])
        };
        // keyCertSign and cRLSign, or digitalSignature.
        let usage = if self.ca { [1, 0x06] } else { [7, 0x80] };
        let mut extensions = vec![
            extension(ids::BASIC_CONSTRAINTS, true, &sequence(&[&flag(self.ca)])),
            extension(ids::KEY_USAGE, true, &element(tag::BIT_STRING, &usage)),
        ];
        for (id, value) in &self.extensions {
            extensions.push(extension(id, false, value));
        }
        let algorithm = self.issuer.key.algorithm();
        let tbs = sequence(&[
            &explicit(0, &small(2)),
            &serial,
            &algorithm,
            &self.issuer.name,
            &sequence(&[&time(self.window.0), &time(self.window.1)]),
            &self.subject.name,
            &self.subject.key.spki(),
            &explicit(3, &element(tag::SEQUENCE, &extensions.concat())),
        ]);
        let signature = self.issuer.key.sign(&tbs)?;
        Ok(sequence(&[&tbs, &algorithm, &bits(&signature)]))
    }
}

/// A CRL of `issuer` that lists `revoked`.
pub(super) fn crl(
    issuer: &Entity<'_>,
    revoked: &[&Entity<'_>],
    window: Window,
) -> Result<Vec<u8>, SimulateError> {
    let algorithm = issuer.key.algorithm();
    let entries: Vec<Vec<u8>> = revoked
        .iter()
        .map(|e| sequence(&[&integer(&serial(e)), &time(window.0)]))
        .collect();
    let list = if entries.is_empty() {
        Vec::new()
    } else {
        element(tag::SEQUENCE, &entries.concat())
    };
    let number = sequence(&[&oid(CRL_NUMBER), &octets(&small(1))]);
    let tbs = sequence(&[
        &small(1),
        &algorithm,
        &issuer.name,
        &time(window.0),
        &time(window.1),
        &list,
        &explicit(0, &sequence(&[&number])),
    ]);
    let signature = issuer.key.sign(&tbs)?;
    Ok(sequence(&[&tbs, &algorithm, &bits(&signature)]))
}

/// What an OCSP response says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Good,
    Revoked,
    Unknown,
}

/// An OCSP response about `subject`, signed by its issuer.
pub(super) fn ocsp(
    subject: &Entity<'_>,
    issuer: &Entity<'_>,
    answer: Answer,
    window: Window,
    nonce: Option<&[u8]>,
) -> Result<Vec<u8>, SimulateError> {
    let hash = |data: &[u8]| octets(&sha256(data));
    let id = sequence(&[
        &sequence(&[&oid(SHA256)]),
        &hash(&issuer.name),
        &hash(&issuer.key.public),
        &integer(&serial(subject)),
    ]);
    let status = match answer {
        Answer::Good => element(tag::context_primitive(0), &[]),
        Answer::Revoked => explicit(1, &time(window.0)),
        Answer::Unknown => element(tag::context_primitive(2), &[]),
    };
    let single = sequence(&[&id, &status, &time(window.0), &explicit(0, &time(window.1))]);
    // What was asked with (RFC 8954): an extension whose value holds the octets.
    let nonce = nonce.map(|nonce| {
        let extension = sequence(&[&oid(NONCE), &octets(&octets(nonce))]);
        explicit(1, &sequence(&[&extension]))
    });
    let data = sequence(&[
        &explicit(1, &issuer.name),
        &time(window.0),
        &sequence(&[&single]),
        &nonce.unwrap_or_default(),
    ]);
    let signature = issuer.key.sign(&data)?;
    let basic = sequence(&[&data, &issuer.key.algorithm(), &bits(&signature)]);
    let typed = sequence(&[&oid(BASIC_RESPONSE), &octets(&basic)]);
    Ok(sequence(&[
        &element(tag::ENUMERATED, &[0]),
        &explicit(0, &typed),
    ]))
}

#[cfg(test)]
mod tests {
    use super::super::keys::Kind;
    use super::*;
    use crate::ocsp::{OcspError, OcspResponse};
    use crate::x509;

    #[test]
    fn a_response_answers_the_nonce_that_was_sent_whole_and_no_other() {
        let now = Timestamp(1_795_000_000);
        let window = (Timestamp(now.0 - 3600), Timestamp(now.0 + 3600));
        let (root_key, leaf_key) = (
            Key::generate(Kind::P384).unwrap(),
            Key::generate(Kind::P384).unwrap(),
        );
        let (root, leaf) = (
            Entity::new(&root_key, "root"),
            Entity::new(&leaf_key, "leaf"),
        );
        let certificate = |subject, ca| Certificate {
            subject,
            issuer: &root,
            ca,
            window,
            extensions: Vec::new(),
            zero_serial: false,
        };
        let ders =
            [certificate(&leaf, false), certificate(&root, true)].map(|c| c.issue().unwrap());
        let chain = x509::parse_all(&ders).unwrap();
        let sent = [7u8; 32];
        let check = |carried: Option<&[u8]>, asked: Option<&[u8]>| {
            let der = ocsp(&leaf, &root, Answer::Good, window, carried).unwrap();
            let response = OcspResponse::parse(&der).unwrap();
            response.verify(&chain[0], &chain[1], asked, now)
        };
        assert_eq!(check(Some(&sent), Some(&sent)), Ok(window.1));
        // A stored response counts by its window: nobody asked, whatever it carries.
        assert_eq!(check(Some(&sent), None), Ok(window.1));
        assert_eq!(check(None, None), Ok(window.1));
        // None, another, a part of it, and more than it.
        let longer = [7u8; 33];
        for carried in [
            None,
            Some(&[8; 32][..]),
            Some(&sent[..31]),
            Some(&longer[..]),
            Some(&[]),
        ] {
            assert_eq!(
                check(carried, Some(&sent)),
                Err(OcspError::Nonce),
                "{carried:?}"
            );
        }
        // The nonce is signed: one that was put in later breaks the signature.
        let mut der = ocsp(&leaf, &root, Answer::Good, window, Some(&[8; 32])).unwrap();
        let at = der.windows(32).position(|w| w == [8; 32]).unwrap();
        der[at..at + 32].copy_from_slice(&sent);
        let forged = OcspResponse::parse(&der).unwrap();
        assert_eq!(
            forged.verify(&chain[0], &chain[1], Some(&sent), now),
            Err(OcspError::Signature)
        );
    }
}
