//! How GPU evidence travels: a bare report with a certificate chain beside it, or the JSON list that
//! NVIDIA's tools exchange, with report and chain of each device in base64.

use serde::Deserialize;

use crate::encoding::{self, EncodingError};

/// A node has 8 GPUs and 4 switches; larger ones exist.
const MAX_DEVICES: usize = 128;

/// Evidence of one device.
#[derive(Clone, Debug, Default)]
pub struct Device {
    /// What the collector called it; never believed.
    pub name: String,
    /// The report.
    pub report: Vec<u8>,
    /// The certificate chain, leaf first, DER. Empty: it lies in the collateral.
    pub chain: Vec<Vec<u8>>,
}

/// Why JSON is not GPU evidence.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// Not the JSON that was expected.
    #[error("Not a JSON list of devices with evidence and certificate")]
    Json(#[from] serde_json::Error),
    /// None, or too many.
    #[error("{0} devices; 1 to {MAX_DEVICES} are allowed")]
    Count(usize),
    /// A part is not base64 or PEM.
    #[error("Device {0}: {1} cannot be decoded")]
    Encoding(usize, &'static str, #[source] EncodingError),
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    arch: Option<String>,
    #[serde(default)]
    uuid: Option<String>,
    evidence: String,
    certificate: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    List(Vec<Entry>),
    Wrapped { evidences: Vec<Entry> },
    Single(Entry),
}

/// Reads the JSON form of evidence.
///
/// # Errors
/// When it is not of the known form.
pub fn parse_evidence_json(text: &str) -> Result<Vec<Device>, EvidenceError> {
    let entries = match serde_json::from_str(text)? {
        Document::List(list) | Document::Wrapped { evidences: list } => list,
        Document::Single(entry) => vec![entry],
    };
    if entries.is_empty() || entries.len() > MAX_DEVICES {
        return Err(EvidenceError::Count(entries.len()));
    }
    let decode = |(n, e): (usize, Entry)| {
        let wrong = |part| move |error| EvidenceError::Encoding(n, part, error);
        let report = encoding::unbase64(&e.evidence).map_err(wrong("evidence"))?;
        // The chain is PEM, as it is or in base64 once more.
        let pem = if e.certificate.contains("-----BEGIN ") {
            e.certificate
        } else {
            let bytes = encoding::unbase64(&e.certificate).map_err(wrong("certificate"))?;
            String::from_utf8(bytes)
                .map_err(|_| wrong("certificate")(EncodingError::Pem("not text")))?
        };
        let blocks = encoding::pem_blocks(&pem).map_err(wrong("certificate"))?;
        let name = e
            .uuid
            .or(e.arch)
            .filter(|n| !n.is_empty())
            .unwrap_or_else(|| format!("device {n}"));
        let name = name.chars().filter(|c| !c.is_control()).take(64).collect();
        Ok(Device {
            name,
            report,
            chain: blocks.into_iter().map(|b| b.1).collect(),
        })
    };
    entries.into_iter().enumerate().map(decode).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_json_and_broken_encodings_are_refused() {
        for text in [
            "",
            "[]",
            "{}",
            "[1]",
            r#"[{"evidence":"!","certificate":""}]"#,
            r#"[{"evidence":"AA==","certificate":"/w=="}]"#,
        ] {
            assert!(parse_evidence_json(text).is_err(), "{text}");
        }
    }
}
