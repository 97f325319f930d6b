//! Evidence as the attesters of confidential-containers/guest-components send it, turned back into
//! the bytes that the hardware signed. An SNP report travels as the fields of a structure: a field
//! that is lost or put in the wrong place breaks the signature, so that nothing here needs to be
//! believed.

use kbs_types::{CompositeEvidence, Tee};
use serde_json::{Map, Value};

use crate::encoding::{EncodingError, unbase64, unbase64url};
use crate::evidence::{MAX_CERTIFICATES, MAX_EVENT_LOG, MAX_GPUS, MAX_REPORT};
use crate::nvidia::{self, Device};
use crate::snp::REPORT_LENGTH;

/// Certificates in a chain: five kinds are defined.
const MAX_CHAIN: usize = 16;

/// Why evidence is refused unseen.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// A member that must be there.
    #[error("Evidence has no valid member {0:?}")]
    Member(&'static str),
    /// A member that is no text encoding of bytes.
    #[error("Evidence member {0:?} is not base64")]
    Encoding(&'static str, #[source] EncodingError),
    /// A member beyond its cap.
    #[error("Evidence member {0:?} holds {1}; at most {2} are allowed")]
    Cap(&'static str, usize, usize),
    /// Evidence of further devices that is not JSON of the protocol's form.
    #[error("Additional evidence is not of the protocol's form")]
    Additional(#[from] serde_json::Error),
    /// A device of a kind that is not verified here.
    #[error("Additional evidence of {0:?} is not verified here; nvidia is")]
    Device(String),
    /// GPU evidence with errors in it.
    #[error("Broken GPU evidence")]
    Nvidia(#[from] nvidia::EvidenceError),
}

/// Everything a client handed in, as bytes.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// SNP report or TDX quote.
    pub report: Vec<u8>,
    /// Certificates that came along, DER.
    pub certificates: Vec<Vec<u8>>,
    /// Confidential-computing event log, or nothing.
    pub event_log: Vec<u8>,
    /// GPUs and switches.
    pub devices: Vec<Device>,
}

impl Evidence {
    /// Reads the evidence of one message.
    ///
    /// # Errors
    /// When a part of it is missing, broken or beyond its cap.
    pub fn read(tee: Tee, evidence: &CompositeEvidence) -> Result<Self, EvidenceError> {
        let primary = &evidence.primary_evidence;
        // Attesters have sent a JSON text in place of the object.
        let parsed = primary.as_str().map(serde_json::from_str).transpose()?;
        let fields = parsed
            .as_ref()
            .unwrap_or(primary)
            .as_object()
            .ok_or(EvidenceError::Member("primary_evidence"))?;
        let mut read = if tee == Tee::Tdx {
            tdx(fields)?
        } else {
            snp(fields)?
        };
        read.devices = devices(&evidence.additional_evidence)?;
        Ok(read)
    }
}

/// A member that is base64 of either alphabet, up to `most` bytes.
fn bytes(
    fields: &Map<String, Value>,
    name: &'static str,
    most: usize,
) -> Result<Vec<u8>, EvidenceError> {
    let text = fields.get(name).and_then(Value::as_str);
    let text = text.ok_or(EvidenceError::Member(name))?;
    cap(name, text.len() / 4 * 3, most)?;
    unbase64(text)
        .or_else(|_| unbase64url(text))
        .map_err(|error| EvidenceError::Encoding(name, error))
}

fn cap(name: &'static str, found: usize, most: usize) -> Result<(), EvidenceError> {
    if found > most {
        return Err(EvidenceError::Cap(name, found, most));
    }
    Ok(())
}

fn tdx(fields: &Map<String, Value>) -> Result<Evidence, EvidenceError> {
    let event_log = match fields.get("cc_eventlog") {
        None | Some(Value::Null) => Vec::new(),
        Some(_) => bytes(fields, "cc_eventlog", MAX_EVENT_LOG)?,
    };
    Ok(Evidence {
        report: bytes(fields, "quote", MAX_REPORT)?,
        event_log,
        ..Evidence::default()
    })
}

fn snp(fields: &Map<String, Value>) -> Result<Evidence, EvidenceError> {
    const REPORT: &str = "attestation_report";
    let report = match fields.get(REPORT) {
        Some(Value::String(_)) => bytes(fields, REPORT, MAX_REPORT)?,
        Some(Value::Object(report)) => Layout::new(report)?.0.to_vec(),
        _ => return Err(EvidenceError::Member(REPORT)),
    };
    let chain = match fields.get("cert_chain") {
        None | Some(Value::Null) => &[],
        Some(Value::Array(chain)) => chain.as_slice(),
        Some(_) => return Err(EvidenceError::Member("cert_chain")),
    };
    cap("cert_chain", chain.len(), MAX_CHAIN)?;
    let mut certificates = Vec::new();
    for entry in chain {
        let kind = entry.get("cert_type").and_then(Value::as_str);
        if !matches!(kind, Some("ARK" | "ASK" | "VCEK" | "VLEK")) {
            continue;
        }
        let data = entry.get("data").and_then(byte_list);
        certificates.push(data.ok_or(EvidenceError::Member("cert_chain"))?);
    }
    let total = certificates.iter().map(Vec::len).sum();
    cap("cert_chain", total, MAX_CERTIFICATES)?;
    Ok(Evidence {
        report,
        certificates,
        ..Evidence::default()
    })
}

fn byte_list(value: &Value) -> Option<Vec<u8>> {
    let byte = |v: &Value| v.as_u64().and_then(|n| u8::try_from(n).ok());
    value.as_array()?.iter().map(byte).collect()
}

/// A report laid out anew from the members of a structure.
struct Layout([u8; REPORT_LENGTH]);

impl Layout {
    fn new(report: &Map<String, Value>) -> Result<Self, EvidenceError> {
        let mut out = Self([0; REPORT_LENGTH]);
        // Name in JSON, offset and length in the report (SEV-SNP ABI specification, table 23).
        const NUMBERS: [(&str, usize, usize); 7] = [
            ("version", 0x00, 4),
            ("guest_svn", 0x04, 4),
            ("policy", 0x08, 8),
            ("vmpl", 0x30, 4),
            ("sig_algo", 0x34, 4),
            ("plat_info", 0x40, 8),
            ("key_info", 0x48, 4),
        ];
        const BYTES: [(&str, usize, usize); 10] = [
            ("family_id", 0x10, 16),
            ("image_id", 0x20, 16),
            ("report_data", 0x50, 64),
            ("measurement", 0x90, 48),
            ("host_data", 0xc0, 32),
            ("id_key_digest", 0xe0, 48),
            ("author_key_digest", 0x110, 48),
            ("report_id", 0x140, 32),
            ("report_id_ma", 0x160, 32),
            ("chip_id", 0x1a0, 64),
        ];
        const OPTIONAL: [(&str, usize, usize); 5] = [
            ("cpuid_fam_id", 0x188, 1),
            ("cpuid_mod_id", 0x189, 1),
            ("cpuid_step", 0x18a, 1),
            ("launch_mit_vector", 0x1f8, 8),
            ("current_mit_vector", 0x200, 8),
        ];
        for (name, at, length) in NUMBERS {
            out.number(report.get(name), name, at, length)?;
        }
        for (name, at, length) in BYTES {
            out.list(report.get(name), name, at, length)?;
        }
        for (name, at, length) in OPTIONAL {
            if report.get(name).is_some_and(|v| !v.is_null()) {
                out.number(report.get(name), name, at, length)?;
            }
        }
        for (name, at) in [
            ("current_tcb", 0x38),
            ("reported_tcb", 0x180),
            ("committed_tcb", 0x1e0),
            ("launch_tcb", 0x1f0),
        ] {
            out.tcb(report.get(name), name, at)?;
        }
        for (name, at) in [("current", 0x1e8), ("committed", 0x1ec)] {
            for (at, part) in (at..).zip(["build", "minor", "major"]) {
                let value = report.get(name).and_then(|v| v.get(part));
                out.number(value, name, at, 1)?;
            }
        }
        for (part, at) in [("r", 0x2a0), ("s", 0x2e8)] {
            let value = report.get("signature").and_then(|v| v.get(part));
            out.list(value, "signature", at, 72)?;
        }
        Ok(out)
    }

    fn number(
        &mut self,
        value: Option<&Value>,
        name: &'static str,
        at: usize,
        length: usize,
    ) -> Result<(), EvidenceError> {
        let number = value.and_then(Value::as_u64);
        let number = number.filter(|n| length == 8 || *n < 1 << (8 * length));
        let bytes = number.ok_or(EvidenceError::Member(name))?.to_le_bytes();
        self.0[at..at + length].copy_from_slice(&bytes[..length]);
        Ok(())
    }

    fn list(
        &mut self,
        value: Option<&Value>,
        name: &'static str,
        at: usize,
        length: usize,
    ) -> Result<(), EvidenceError> {
        let list = value.and_then(byte_list).filter(|l| l.len() == length);
        self.0[at..at + length].copy_from_slice(&list.ok_or(EvidenceError::Member(name))?);
        Ok(())
    }

    /// A TCB: Turin's has a firmware management controller, the others' have not.
    fn tcb(
        &mut self,
        value: Option<&Value>,
        name: &'static str,
        at: usize,
    ) -> Result<(), EvidenceError> {
        let member = |part: &str| value.and_then(|v| v.get(part));
        let places: [(&str, usize); 5] = if member("fmc").is_some_and(|v| !v.is_null()) {
            [
                ("fmc", 0),
                ("bootloader", 1),
                ("tee", 2),
                ("snp", 3),
                ("microcode", 7),
            ]
        } else {
            // The boot loader stands in for the controller that is not there.
            [
                ("bootloader", 0),
                ("bootloader", 0),
                ("tee", 1),
                ("snp", 6),
                ("microcode", 7),
            ]
        };
        for (part, offset) in places {
            self.number(member(part), name, at + offset, 1)?;
        }
        Ok(())
    }
}

/// Evidence of further devices: a JSON object of kind → (class, evidence), or nothing.
fn devices(additional: &str) -> Result<Vec<Device>, EvidenceError> {
    if additional.is_empty() {
        return Ok(Vec::new());
    }
    let kinds: Map<String, Value> = serde_json::from_str(additional)?;
    let mut all = Vec::new();
    for (kind, entry) in kinds {
        if kind != "nvidia" {
            return Err(EvidenceError::Device(kind.chars().take(40).collect()));
        }
        let list = entry.get(1).and_then(|v| v.get("device_evidence_list"));
        let list = list.ok_or(EvidenceError::Member("device_evidence_list"))?;
        all.extend(nvidia::parse_evidence_json(&list.to_string())?);
    }
    cap("device_evidence_list", all.len(), MAX_GPUS)?;
    for device in &all {
        cap("evidence", device.report.len(), MAX_REPORT)?;
        let chain = device.chain.iter().map(Vec::len).sum();
        cap("certificate", chain, MAX_CERTIFICATES)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn composite(primary: Value, additional: &str) -> CompositeEvidence {
        CompositeEvidence {
            primary_evidence: primary,
            additional_evidence: additional.into(),
        }
    }

    /// A report of the given layout whose bytes all differ, and the structure it travels as.
    fn report(turin: bool) -> (Vec<u8>, Value) {
        let mut raw = vec![0; REPORT_LENGTH];
        let mut next = 0u8;
        let mut take = |raw: &mut [u8], at: usize, length: usize| {
            for byte in &mut raw[at..at + length] {
                next = next.wrapping_add(1);
                *byte = next;
            }
            raw[at..at + length].to_vec()
        };
        let number = |bytes: Vec<u8>| {
            let wide = bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
            json!(wide)
        };
        let tcb = |raw: &mut [u8], at: usize| {
            let places: &[(&str, usize)] = if turin {
                &[
                    ("fmc", 0),
                    ("bootloader", 1),
                    ("tee", 2),
                    ("snp", 3),
                    ("microcode", 7),
                ]
            } else {
                &[("bootloader", 0), ("tee", 1), ("snp", 6), ("microcode", 7)]
            };
            let member = |(name, offset): &(&str, usize)| {
                raw[at + offset] = (at + offset) as u8;
                ((*name).to_owned(), json!(raw[at + offset]))
            };
            let mut fields: Map<String, Value> = places.iter().map(member).collect();
            fields.entry("fmc").or_insert(Value::Null);
            Value::Object(fields)
        };
        let (current_tcb, reported_tcb) = (tcb(&mut raw, 0x38), tcb(&mut raw, 0x180));
        let (committed_tcb, launch_tcb) = (tcb(&mut raw, 0x1e0), tcb(&mut raw, 0x1f0));
        let version = |raw: &mut [u8], at: usize| {
            raw[at..at + 3].copy_from_slice(&[1, 2, 3]);
            json!({ "build": 1, "minor": 2, "major": 3 })
        };
        let (current, committed) = (version(&mut raw, 0x1e8), version(&mut raw, 0x1ec));
        let value = json!({
            "version": number(take(&mut raw, 0, 4)), "guest_svn": number(take(&mut raw, 4, 4)),
            "policy": number(take(&mut raw, 8, 8)), "family_id": take(&mut raw, 0x10, 16),
            "image_id": take(&mut raw, 0x20, 16), "vmpl": number(take(&mut raw, 0x30, 4)),
            "sig_algo": number(take(&mut raw, 0x34, 4)), "current_tcb": current_tcb,
            "plat_info": number(take(&mut raw, 0x40, 8)), "key_info": number(take(&mut raw, 0x48, 4)),
            "report_data": take(&mut raw, 0x50, 64), "measurement": take(&mut raw, 0x90, 48),
            "host_data": take(&mut raw, 0xc0, 32), "id_key_digest": take(&mut raw, 0xe0, 48),
            "author_key_digest": take(&mut raw, 0x110, 48), "report_id": take(&mut raw, 0x140, 32),
            "report_id_ma": take(&mut raw, 0x160, 32), "reported_tcb": reported_tcb,
            "cpuid_fam_id": number(take(&mut raw, 0x188, 1)), "cpuid_mod_id": number(take(&mut raw, 0x189, 1)),
            "cpuid_step": number(take(&mut raw, 0x18a, 1)), "chip_id": take(&mut raw, 0x1a0, 64),
            "committed_tcb": committed_tcb, "current": current, "committed": committed,
            "launch_tcb": launch_tcb, "launch_mit_vector": number(take(&mut raw, 0x1f8, 8)),
            "current_mit_vector": number(take(&mut raw, 0x200, 8)),
            "signature": { "r": take(&mut raw, 0x2a0, 72), "s": take(&mut raw, 0x2e8, 72) },
        });
        (raw, value)
    }

    #[test]
    fn a_report_sent_as_a_structure_is_the_report_again() {
        for turin in [false, true] {
            let (raw, value) = report(turin);
            let chain = json!([{ "cert_type": "VCEK", "data": [48, 0] }, { "cert_type": { "OTHER": "u" }, "data": [1] }]);
            let sent = json!({ "attestation_report": value, "cert_chain": chain });
            let read = Evidence::read(Tee::Snp, &composite(sent.clone(), "")).unwrap();
            assert_eq!(
                (&read.report, read.certificates.len()),
                (&raw, 1),
                "{turin}"
            );
            let text = Value::String(sent.to_string());
            let read = Evidence::read(Tee::Snp, &composite(text, "")).unwrap();
            assert_eq!(read.report, raw);
        }
    }

    #[test]
    fn fields_that_are_missing_or_do_not_fit_are_refused() {
        let broken = |change: fn(&mut Value)| {
            let mut value = report(false).1;
            change(&mut value);
            let sent = json!({ "attestation_report": value, "cert_chain": null });
            Evidence::read(Tee::Snp, &composite(sent, "")).is_err()
        };
        assert!(!broken(|_| {}));
        assert!(broken(|v| v["version"] = json!(1u64 << 32)));
        assert!(broken(|v| v["measurement"] = json!([0])));
        assert!(broken(|v| v["current"] = Value::Null));
        assert!(broken(|v| v["launch_tcb"]["tee"] = json!(256)));
        assert!(broken(|v| v["signature"] = json!({})));
    }

    #[test]
    fn quotes_and_event_logs_are_read_and_capped() {
        let read = |v: Value| Evidence::read(Tee::Tdx, &composite(v, ""));
        let good = read(json!({ "quote": "AQI=", "cc_eventlog": "Aw==" })).unwrap();
        assert_eq!((good.report, good.event_log), (vec![1, 2], vec![3]));
        assert!(read(json!({ "quote": "AQI=", "cc_eventlog": null })).is_ok());
        assert!(read(json!({ "quote": "!" })).is_err());
        assert!(read(json!({ "quote": "A".repeat(MAX_REPORT * 2) })).is_err());
        assert!(read(json!([])).is_err());
    }

    #[test]
    fn devices_of_an_unknown_kind_are_refused() {
        assert!(devices("").unwrap().is_empty());
        assert!(devices("{}").unwrap().is_empty());
        assert!(devices(r#"{"tpm":["cpu",{}]}"#).is_err());
        assert!(devices(r#"{"nvidia":["gpu",{}]}"#).is_err());
        assert!(devices(r#"{"nvidia":["gpu",{"device_evidence_list":[]}]}"#).is_err());
        assert!(devices("[").is_err());
    }
}
