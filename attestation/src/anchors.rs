//! Trust anchors: which roots a verifier believes. A root is pinned by the SHA-384 digest of its
//! SubjectPublicKeyInfo; the certificate itself travels with the endorsements. The production set
//! is compiled in. Any other set comes from a file that somebody named, and marks every verdict
//! that rests on it as simulated.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::encoding::{EncodingError, hex, unhex_array};
use crate::snp::Product;
use crate::x509::Certificate;

/// SHA-384 of a DER SubjectPublicKeyInfo.
pub type Pin = [u8; 48];

/// The roots a verifier believes, by manufacturer and purpose.
#[derive(Clone, Debug)]
pub struct TrustAnchors {
    /// AMD root keys (ARK), each for one product line.
    pub amd: Vec<(Product, Pin)>,
    /// Intel SGX root CA.
    pub intel: Vec<Pin>,
    /// NVIDIA device identity CA.
    pub nvidia_device: Vec<Pin>,
    /// NVIDIA CoRIM signing root CA.
    pub nvidia_rim: Vec<Pin>,
    /// Whether these are anything but the production roots.
    pub simulated: bool,
}

/// Why an anchor file was refused.
#[derive(Debug, thiserror::Error)]
pub enum AnchorError {
    /// Not JSON of the documented form.
    #[error("Anchor file is not of the documented form")]
    Form(#[from] serde_json::Error),
    /// A pin is not 96 hexadecimal digits.
    #[error("Anchor {0:?} is not the hexadecimal SHA-384 of a public key")]
    Pin(String, #[source] EncodingError),
    /// An AMD product line that does not exist.
    #[error("Unknown AMD product line {0:?}; known are Milan, Genoa and Turin")]
    Product(String),
}

/// The anchor file: pins in hexadecimal.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnchorFile {
    /// Product line → pins.
    pub amd: BTreeMap<String, Vec<String>>,
    /// Intel SGX root CA.
    pub intel: Vec<String>,
    /// NVIDIA device identity CA.
    pub nvidia_device: Vec<String>,
    /// NVIDIA CoRIM signing root CA.
    pub nvidia_rim: Vec<String>,
}

const AMD_MILAN: &str = "1249f67f15cf229a4069195e1a9ce537d1765ef706a1f4a123c36be9518786515d25ecc007f366b564d2b3f31c48082e";
const AMD_GENOA: &str = "32ab53a6ce5ec14926207396e5c475ae768a6a9831b7e860b5acf2e1c1dff222bc5a8bfc43eb5e06393189c1f246d880";
const AMD_TURIN: &str = "3475f08a9727f8ac9a1deaea5f2a2097aa59d64d05c2a678c229c873e6359d3a6926287a2a22cd5f88a385e333a2fcc5";
const INTEL_SGX: &str = "3cdf1feb4e5eac629170f17625648da4a16effa22ae2bcca030b4358a8961c1bf26cf54a9598cd6a2d4a9cbb62377d22";
const NVIDIA_DEVICE: &str = "e108f61de3fce5261151f8a0eb562a920639ef1b0fcebba785ee52f54420e4248be3400366d45c2880bdf13044325393";
const NVIDIA_RIM: &str = "62d5dc52611222694c689eba235331cf73cd69308ea763720a4987eede99657c176e94274169a8063af5b11f8eba7990";

impl TrustAnchors {
    /// The manufacturers' production roots.
    pub fn production() -> Self {
        let pin = |text: &str| unhex_array(text).unwrap_or([0; 48]);
        Self {
            amd: vec![
                (Product::Milan, pin(AMD_MILAN)),
                (Product::Genoa, pin(AMD_GENOA)),
                (Product::Turin, pin(AMD_TURIN)),
            ],
            intel: vec![pin(INTEL_SGX)],
            nvidia_device: vec![pin(NVIDIA_DEVICE)],
            nvidia_rim: vec![pin(NVIDIA_RIM)],
            simulated: false,
        }
    }

    /// Reads an anchor file (see [`AnchorFile`]). The result is always marked as simulated.
    ///
    /// # Errors
    /// When the text is not of the documented form.
    pub fn from_file_text(text: &str) -> Result<Self, AnchorError> {
        let file: AnchorFile = serde_json::from_str(text)?;
        let pin = |text: &String| {
            unhex_array(text).map_err(|e| AnchorError::Pin(text.chars().take(100).collect(), e))
        };
        let pins = |list: &[String]| list.iter().map(pin).collect::<Result<Vec<Pin>, _>>();
        let mut amd = Vec::new();
        for (line, list) in &file.amd {
            let product = Product::from_line(line)
                .ok_or_else(|| AnchorError::Product(line.chars().take(40).collect()))?;
            amd.extend(pins(list)?.into_iter().map(|p| (product, p)));
        }
        Ok(Self {
            amd,
            intel: pins(&file.intel)?,
            nvidia_device: pins(&file.nvidia_device)?,
            nvidia_rim: pins(&file.nvidia_rim)?,
            simulated: true,
        })
    }

    /// The pins of one AMD product line.
    pub fn amd_pins(&self, product: Product) -> Vec<Pin> {
        self.amd
            .iter()
            .filter(|(p, _)| *p == product)
            .map(|(_, pin)| *pin)
            .collect()
    }
}

/// The pin of a certificate's key.
pub fn pin_of(certificate: &Certificate<'_>) -> Pin {
    crate::crypto::sha384(certificate.spki)
}

/// A pin as it stands in an anchor file.
pub fn pin_text(certificate: &Certificate<'_>) -> String {
    hex(&pin_of(certificate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_production_pin_is_a_digest() {
        let anchors = TrustAnchors::production();
        let all = anchors
            .amd
            .iter()
            .map(|(_, p)| p)
            .chain(&anchors.intel)
            .chain(&anchors.nvidia_device)
            .chain(&anchors.nvidia_rim);
        let mut pins: Vec<&Pin> = all.collect();
        assert!(pins.iter().all(|p| **p != [0; 48]));
        pins.sort();
        pins.dedup();
        assert_eq!(pins.len(), 6);
        assert!(!anchors.simulated);
    }

    #[test]
    fn anchors_from_a_file_are_always_simulated() {
        let text = format!(r#"{{"amd":{{"Milan":["{AMD_MILAN}"]}},"intel":["{INTEL_SGX}"]}}"#);
        let anchors = TrustAnchors::from_file_text(&text).unwrap();
        assert!(anchors.simulated);
        assert_eq!(anchors.amd_pins(Product::Milan).len(), 1);
        assert!(anchors.amd_pins(Product::Genoa).is_empty());
    }

    #[test]
    fn unknown_keys_products_and_short_pins_are_refused() {
        for text in [
            r#"{"arm":[]}"#,
            r#"{"amd":{"Naples":[]}}"#,
            r#"{"intel":["00"]}"#,
            "{",
            "",
        ] {
            assert!(TrustAnchors::from_file_text(text).is_err(), "{text}");
        }
    }
}
