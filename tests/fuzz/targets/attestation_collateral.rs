//! What comes from elsewhere to verify evidence with: certificates, CRLs, OCSP responses, NVIDIA's RIMs
//! and the XML below them, Intel's collateral, and the files an operator writes.
//!
//! The first byte of the input chooses the reader.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sealpod_attestation::nvidia::{Element, Rim};
use sealpod_attestation::ocsp::OcspResponse;
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::snp::Vek;
use sealpod_attestation::tdx::{Bundle, Pck};
use sealpod_attestation::x509::{Certificate, Crl};
use sealpod_attestation::{Collateral, Timestamp, TrustAnchors, encoding};

fuzz_target!(|data: &[u8]| {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    let text = || std::str::from_utf8(bytes).unwrap_or_default();
    match choice % 10 {
        0 => {
            if let Ok(certificate) = Certificate::parse(bytes) {
                let _ = (certificate.label(), certificate.extended_key_usages());
                let _ = (
                    Vek::from_certificate(&certificate),
                    Pck::from_certificate(&certificate),
                );
                let _ = certificate.signed_by(&certificate);
            }
        }
        1 => drop(Crl::parse(bytes).map(|crl| crl.revoked().count())),
        2 => drop(OcspResponse::parse(bytes).map(|response| response.describe())),
        3 => {
            if let Ok(element) = Element::parse(bytes) {
                let canonical = element.canonical(&|_| false);
                let again = Element::parse(&canonical).expect("canonical XML is XML");
                assert_eq!(again.canonical(&|_| false), canonical, "not canonical");
            }
        }
        4 => drop(Rim::parse(bytes).map(|rim| rim.verify_signature().is_ok())),
        5 => drop(Bundle::parse(text())),
        6 => drop(Collateral::default().add(bytes)),
        7 => drop(ReferenceValues::parse(text())),
        8 => drop(TrustAnchors::from_file_text(text()).map(|a| assert!(a.simulated))),
        _ => {
            let _ = encoding::pem_blocks(text());
            // A year of four digits is read back as it was printed.
            let time = text().parse().unwrap_or(Timestamp(0));
            let shown = time.to_string();
            if shown.len() == "1970-01-01T00:00:00Z".len() {
                assert_eq!(shown.parse::<Timestamp>().ok(), Some(time), "{shown}");
            }
        }
    }
});
