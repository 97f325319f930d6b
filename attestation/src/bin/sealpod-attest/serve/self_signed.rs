//! A certificate for a service that was given none: P-256, self-signed, good for ten years, for the
//! address it listens on, `localhost` and the machine's name. Clients pin it.

use std::net::IpAddr;

use anyhow::{Context, anyhow};
use aws_lc_rs::rand::{SecureRandom, SystemRandom};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use sealpod_attestation::Timestamp;
use sealpod_attestation::der::tag;

/// Key and certificate, DER.
pub(crate) struct Made {
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

/// ecdsa-with-SHA256, without parameters (RFC 5758 section 3.2).
const ECDSA_SHA256: &[u8] = &[0x30, 10, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2];
/// id-ecPublicKey on prime256v1 (RFC 5480 section 2.1.1).
const EC_P256: &[u8] = &[
    0x30, 19, 6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7,
];
const COMMON_NAME: &[u8] = &[6, 3, 0x55, 4, 3];
const SUBJECT_ALT_NAME: &[u8] = &[6, 3, 0x55, 0x1d, 17];
const YEARS: i64 = 10;

/// Makes both.
pub(crate) fn make(listen: IpAddr) -> anyhow::Result<Made> {
    let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING)
        .map_err(|_| anyhow!("Cannot make a key"))?;
    let mut serial = [0; 16];
    SystemRandom::new()
        .fill(&mut serial)
        .map_err(|_| anyhow!("No random numbers"))?;
    // Positive, and without a leading zero.
    serial[0] = serial[0] & 0x3f | 0x40;
    let now = crate::input::now(None);
    let tbs = sequence(&[
        &element(tag::context(0), &element(tag::INTEGER, &[2])),
        &element(tag::INTEGER, &serial),
        ECDSA_SHA256,
        &name(),
        &sequence(&[&time(now.0 - 3600), &time(now.0 + YEARS * 365 * 86_400)]),
        &name(),
        &sequence(&[EC_P256, &bits(pair.public_key().as_ref())]),
        &extensions(listen),
    ]);
    let signature = pair
        .sign(&SystemRandom::new(), &tbs)
        .map_err(|_| anyhow!("Cannot sign a certificate"))?;
    let certificate = sequence(&[&tbs, ECDSA_SHA256, &bits(signature.as_ref())]);
    sealpod_attestation::x509::Certificate::parse(&certificate)
        .context("The certificate that was made cannot be read")?;
    let key = pair
        .to_pkcs8v1()
        .map_err(|_| anyhow!("Cannot export a key"))?;
    Ok(Made {
        certificate,
        key: key.as_ref().to_vec(),
    })
}

fn name() -> Vec<u8> {
    let attribute = sequence(&[COMMON_NAME, &element(tag::UTF8_STRING, b"sealpod-attest")]);
    sequence(&[&element(tag::SET, &attribute)])
}

/// Subject alternative names (RFC 5280 section 4.2.1.6).
fn extensions(listen: IpAddr) -> Vec<u8> {
    const DNS_NAME: u8 = 2;
    const IP_ADDRESS: u8 = 7;
    let dns = |text: &str| element(tag::context_primitive(DNS_NAME), text.as_bytes());
    let ip = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => element(tag::context_primitive(IP_ADDRESS), &v4.octets()),
        IpAddr::V6(v6) => element(tag::context_primitive(IP_ADDRESS), &v6.octets()),
    };
    let mut names = [dns("localhost"), ip([127, 0, 0, 1].into())].concat();
    if !listen.is_loopback() && !listen.is_unspecified() {
        names.extend(ip(listen));
    }
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let usable = |b: u8| b.is_ascii_alphanumeric() || b".-".contains(&b);
    if !host.is_empty() && host.bytes().all(usable) {
        names.extend(dns(&host));
    }
    let names = sequence(&[&names]);
    let extension = sequence(&[SUBJECT_ALT_NAME, &element(tag::OCTET_STRING, &names)]);
    element(tag::context(3), &sequence(&[&extension]))
}

fn time(at: i64) -> Vec<u8> {
    // 2026-11-21T09:00:00Z → 20261121090000Z, which certificates use from 2050 on and readers take.
    let digits: String = Timestamp(at)
        .to_string()
        .chars()
        .filter(|c| c.is_ascii_digit() || *c == 'Z')
        .collect();
    if digits.as_str() < "2050" {
        element(tag::UTC_TIME, &digits.as_bytes()[2..])
    } else {
        element(tag::GENERALIZED_TIME, digits.as_bytes())
    }
}

fn bits(bytes: &[u8]) -> Vec<u8> {
    element(tag::BIT_STRING, &[&[0], bytes].concat())
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    element(tag::SEQUENCE, &parts.concat())
}

/// One DER element; nothing here is longer than 64 KiB.
fn element(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len();
    let mut out = vec![tag];
    match length {
        0..=127 => out.push(length as u8),
        128..=255 => out.extend([0x81, length as u8]),
        _ => out.extend([0x82, (length >> 8) as u8, length as u8]),
    }
    out.extend_from_slice(content);
    out
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

    use super::*;

    #[test]
    fn the_certificate_is_its_keys_and_holds_now() {
        let made = make([192, 0, 2, 7].into()).unwrap();
        let read = sealpod_attestation::x509::Certificate::parse(&made.certificate).unwrap();
        assert!(read.valid_at(crate::input::now(None)));
        assert!(read.signed_by(&read));
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(made.key));
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        let key = provider.key_provider.load_private_key(key).unwrap();
        let chain = vec![made.certificate.into()];
        rustls::sign::CertifiedKey::new(chain, key)
            .keys_match()
            .unwrap();
    }
}
