//! The attestation report: the SPDM 1.1 GET_MEASUREMENTS request that was sent, and the device's
//! response with its measurement blocks, opaque fields and signature (DMTF DSP0274, section 10.11).

use std::collections::BTreeMap;

use serde::Serialize;

use crate::encoding::hex;

/// Reports are 2 to 5 KB.
const MAX_REPORT: usize = 64 << 10;
/// Length of the request in front of the response.
const REQUEST: usize = 37;
const SPDM_1_1: u8 = 0x11;
const GET_MEASUREMENTS: u8 = 0xe0;
const MEASUREMENTS: u8 = 0x60;
const ALL_MEASUREMENTS: u8 = 0xff;
/// DMTF measurement specification.
const DMTF: u8 = 1;
const MEASUREMENT: usize = 48;
const SIGNATURE: usize = 96;

/// Why bytes are not a report.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReportError {
    /// Longer than any report.
    #[error("Report has {0} bytes; at most {MAX_REPORT} are read")]
    TooLong(usize),
    /// It ends early.
    #[error("Report ends within {0}")]
    Truncated(&'static str),
    /// Bytes behind the signature.
    #[error("{0} bytes behind the report's signature")]
    Trailing(usize),
    /// Another message than expected.
    #[error("SPDM {0} is not version 1.1 of the expected message")]
    Message(&'static str),
    /// A measurement block of another form.
    #[error("Measurement block {0} is not a DMTF block of {MEASUREMENT} bytes")]
    Block(u8),
    /// A block twice, or out of order.
    #[error("Measurement block {0} where {1} was expected")]
    Order(u8, u8),
    /// The blocks do not fill their length.
    #[error("Measurement record is longer than its blocks")]
    Slack,
    /// An opaque field twice.
    #[error("Opaque field {0} occurs twice")]
    DuplicateField(u16),
}

/// Feature mode of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    /// Single-GPU passthrough.
    Spt,
    /// Multi-GPU passthrough.
    Mpt,
    /// Protected PCIe: eight GPUs and their switches in one guest.
    Ppcie,
}

/// The opaque fields, by type.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opaque<'a>(BTreeMap<u16, &'a [u8]>);

impl<'a> Opaque<'a> {
    const DRIVER_VERSION: u16 = 3;
    const VBIOS_VERSION: u16 = 6;
    const NVDEC0_STATUS: u16 = 11;
    const CHIP_SKU: u16 = 15;
    const PROJECT: u16 = 17;
    const PROJECT_SKU: u16 = 18;
    const FWID: u16 = 20;
    const PROTECTED_PCIE_STATUS: u16 = 21;
    const SWITCH_PDI: u16 = 22;
    const SWITCH_GPU_PDIS: u16 = 26;
    const CHIP_INFO: u16 = 35;
    const FEATURE_FLAG: u16 = 36;

    /// The raw field.
    pub fn field(&self, kind: u16) -> Option<&'a [u8]> {
        self.0.get(&kind).copied()
    }

    fn text(&self, kind: u16) -> Option<String> {
        let bytes = self.field(kind)?;
        let end = bytes.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
        let ok = bytes[..end].iter().all(u8::is_ascii_graphic);
        (ok && end > 0).then(|| String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// Driver version, such as `550.90.07`. GPUs only.
    pub fn driver_version(&self) -> Option<String> {
        self.text(Self::DRIVER_VERSION)
    }

    /// VBIOS version, such as `96.00.9F.00.01`. A switch reports text, a GPU two words.
    pub fn vbios_version(&self) -> Option<String> {
        let bytes = self.field(Self::VBIOS_VERSION)?;
        match bytes {
            [d, c, b, a, e, 0, 0, 0] => Some(format!("{a:02X}.{b:02X}.{c:02X}.{d:02X}.{e:02X}")),
            _ => self.text(Self::VBIOS_VERSION),
        }
    }

    /// Firmware id: SHA-384 of the firmware that holds the attestation key.
    pub fn fwid(&self) -> Option<&'a [u8]> {
        self.field(Self::FWID)
    }

    /// Status of the first video decoder: 0x55 and 0xaa are known.
    pub fn nvdec0(&self) -> Option<u8> {
        match self.field(Self::NVDEC0_STATUS) {
            Some([status]) => Some(*status),
            _ => None,
        }
    }

    /// Chip name where the report carries it (Blackwell).
    pub fn chip(&self) -> Option<String> {
        self.text(Self::CHIP_INFO)
    }

    /// Feature mode; `None` for values nobody here knows.
    pub fn mode(&self) -> Option<Mode> {
        match (
            self.field(Self::FEATURE_FLAG),
            self.field(Self::PROTECTED_PCIE_STATUS),
        ) {
            (Some([0, 0]), None) => Some(Mode::Spt),
            (Some([1, 0]), None) => Some(Mode::Mpt),
            (Some([2, 0]), None) => Some(Mode::Ppcie),
            (None, Some([0xaa])) => Some(Mode::Ppcie),
            (None, Some([0x55]) | None) => Some(Mode::Spt),
            _ => None,
        }
    }

    /// A switch's own id, or the ids of the switches at each link of a GPU (byte order reversed).
    pub fn switch_pdis(&self) -> Option<Vec<[u8; 8]>> {
        pdis(self.field(Self::SWITCH_PDI)?)
    }

    /// The ids of the eight GPUs that a switch connects.
    pub fn switch_gpu_pdis(&self) -> Option<Vec<[u8; 8]>> {
        pdis(self.field(Self::SWITCH_GPU_PDIS)?.get(..64)?)
    }

    /// Id of the RIM for this VBIOS in NVIDIA's RIM service.
    pub fn vbios_rim_id(&self) -> Option<String> {
        let version = self.vbios_version()?.replace('.', "");
        let part = |kind| self.text(kind);
        Some(format!(
            "NV_GPU_VBIOS_{}_{}_{}_{version}",
            part(Self::PROJECT)?,
            part(Self::PROJECT_SKU)?,
            part(Self::CHIP_SKU)?
        ))
    }
}

fn pdis(bytes: &[u8]) -> Option<Vec<[u8; 8]>> {
    let (chunks, rest) = bytes.as_chunks::<8>();
    rest.is_empty().then(|| chunks.to_vec())
}

/// A report, decoded.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// Everything before the signature: what was signed, request included.
    pub signed: &'a [u8],
    /// `r ‖ s`.
    pub signature: &'a [u8],
    /// The nonce of the request: the verifier's.
    pub nonce: [u8; 32],
    /// Measurement blocks 1, 2, …
    pub measurements: Vec<[u8; MEASUREMENT]>,
    /// Opaque fields.
    pub opaque: Opaque<'a>,
}

struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize, what: &'static str) -> Result<&'a [u8], ReportError> {
        let (head, tail) = self
            .rest
            .split_at_checked(count)
            .ok_or(ReportError::Truncated(what))?;
        self.rest = tail;
        Ok(head)
    }
    fn u16(&mut self, what: &'static str) -> Result<u16, ReportError> {
        let b = self.take(2, what)?;
        Ok(u16::from_le_bytes([b[0], b[1]]))
    }
}

impl<'a> Report<'a> {
    /// Reads a report.
    ///
    /// # Errors
    /// When it is not a request and response of the expected form, or something follows.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ReportError> {
        if bytes.len() > MAX_REPORT {
            return Err(ReportError::TooLong(bytes.len()));
        }
        let mut c = Cursor { rest: bytes };
        let request = c.take(REQUEST, "the request")?;
        if request[..2] != [SPDM_1_1, GET_MEASUREMENTS] || request[3] != ALL_MEASUREMENTS {
            return Err(ReportError::Message("request"));
        }
        let mut nonce = [0; 32];
        nonce.copy_from_slice(&request[4..36]);

        let header = c.take(8, "the response")?;
        if header[..2] != [SPDM_1_1, MEASUREMENTS] {
            return Err(ReportError::Message("response"));
        }
        let length =
            usize::from(header[5]) | usize::from(header[6]) << 8 | usize::from(header[7]) << 16;
        let mut record = Cursor {
            rest: c.take(length, "the measurement record")?,
        };
        let measurements = blocks(&mut record, header[4])?;
        if !record.rest.is_empty() {
            return Err(ReportError::Slack);
        }
        c.take(32, "the device's nonce")?;
        let length = c.u16("the opaque data's length")?;
        let opaque = opaque(c.take(usize::from(length), "the opaque data")?)?;
        let signed = &bytes[..bytes.len() - c.rest.len()];
        let signature = c.take(SIGNATURE, "the signature")?;
        if !c.rest.is_empty() {
            return Err(ReportError::Trailing(c.rest.len()));
        }
        Ok(Self {
            signed,
            signature,
            nonce,
            measurements,
            opaque,
        })
    }

    /// Everything the report says, for policies and for people.
    pub fn claims(&self) -> serde_json::Value {
        let o = &self.opaque;
        let fields: BTreeMap<String, String> =
            o.0.iter().map(|(k, v)| (k.to_string(), hex(v))).collect();
        serde_json::json!({
            "nonce": hex(&self.nonce),
            "driver_version": o.driver_version(),
            "vbios_version": o.vbios_version(),
            "vbios_rim_id": o.vbios_rim_id(),
            "fwid": o.fwid().map(hex),
            "mode": o.mode(),
            "measurements": self.measurements.iter().map(|m| hex(m)).collect::<Vec<_>>(),
            "opaque": fields,
        })
    }
}

fn blocks(record: &mut Cursor<'_>, count: u8) -> Result<Vec<[u8; MEASUREMENT]>, ReportError> {
    const WHAT: &str = "a measurement block";
    let mut list = Vec::new();
    for expected in 1..=count {
        let header = record.take(7, WHAT)?;
        let index = header[0];
        if index != expected {
            return Err(ReportError::Order(index, expected));
        }
        let size = u16::from_le_bytes([header[2], header[3]]);
        let value_size = u16::from_le_bytes([header[5], header[6]]);
        if header[1] != DMTF
            || usize::from(size) != MEASUREMENT + 3
            || usize::from(value_size) != MEASUREMENT
        {
            return Err(ReportError::Block(index));
        }
        let mut value = [0; MEASUREMENT];
        value.copy_from_slice(record.take(MEASUREMENT, WHAT)?);
        list.push(value);
    }
    Ok(list)
}

fn opaque(bytes: &[u8]) -> Result<Opaque<'_>, ReportError> {
    const WHAT: &str = "an opaque field";
    let mut c = Cursor { rest: bytes };
    let mut fields = BTreeMap::new();
    while !c.rest.is_empty() {
        let kind = c.u16(WHAT)?;
        let length = c.u16(WHAT)?;
        if fields
            .insert(kind, c.take(usize::from(length), WHAT)?)
            .is_some()
        {
            return Err(ReportError::DuplicateField(kind));
        }
    }
    Ok(Opaque(fields))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(blocks: u8, opaque: &[u8]) -> Vec<u8> {
        let mut r = vec![SPDM_1_1, GET_MEASUREMENTS, 1, ALL_MEASUREMENTS];
        r.extend([9; 32]);
        r.push(0);
        let length = u32::from(blocks) * 55;
        r.extend([SPDM_1_1, MEASUREMENTS, 0, 0, blocks]);
        r.extend(&length.to_le_bytes()[..3]);
        for index in 1..=blocks {
            r.extend([index, DMTF, 51, 0, 1, 48, 0]);
            r.extend([index; 48]);
        }
        r.extend([8; 32]);
        r.extend((opaque.len() as u16).to_le_bytes());
        r.extend(opaque);
        r.extend([7; 96]);
        r
    }

    #[test]
    fn a_report_is_read_and_anything_behind_it_refused() {
        let mut bytes = report(2, &[6, 0, 8, 0, 0, 0x9f, 0, 0x96, 1, 0, 0, 0]);
        let r = Report::parse(&bytes).unwrap();
        assert_eq!((r.nonce, r.measurements.len()), ([9; 32], 2));
        assert_eq!(r.opaque.vbios_version().unwrap(), "96.00.9F.00.01");
        bytes.push(0);
        assert_eq!(Report::parse(&bytes).unwrap_err(), ReportError::Trailing(1));
    }

    #[test]
    fn disorder_duplicates_and_cuts_are_refused() {
        let mut bytes = report(2, &[]);
        bytes[REQUEST + 8] = 2;
        assert_eq!(Report::parse(&bytes).unwrap_err(), ReportError::Order(2, 1));
        assert_eq!(
            Report::parse(&report(1, &[3, 0, 0, 0, 3, 0, 0, 0])).unwrap_err(),
            ReportError::DuplicateField(3)
        );
        assert_eq!(
            Report::parse(&report(1, &[3, 0, 9, 0])).unwrap_err(),
            ReportError::Truncated("an opaque field")
        );
        let whole = report(1, &[]);
        for length in 0..whole.len() {
            assert!(Report::parse(&whole[..length]).is_err(), "{length}");
        }
    }
}
