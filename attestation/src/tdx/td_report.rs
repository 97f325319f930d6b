//! The TDREPORT that a TD gets from its module (Intel TDX module ABI specification, TDREPORT_STRUCT).
//! Its MAC can be checked on the same machine only: it can be inspected here, never accepted.

use crate::crypto::sha384;
use crate::encoding::hex;

/// Length, bytes.
pub const TD_REPORT_LENGTH: usize = 1024;

/// Why bytes are not a TDREPORT.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TdReportError {
    /// Another length or type.
    #[error("Not a TDREPORT: {TD_REPORT_LENGTH} bytes beginning with type 0x81 are one")]
    Format,
    /// The parts do not hash to what the MAC covers.
    #[error("TDREPORT's {0} is not what its hash says")]
    Hash(&'static str),
}

/// A TDREPORT, decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of the specification")]
pub struct TdReport {
    pub cpu_svn: [u8; 16],
    pub report_data: [u8; 64],
    pub tee_tcb_svn: [u8; 16],
    pub mr_seam: [u8; 48],
    pub attributes: u64,
    pub xfam: u64,
    pub mr_td: [u8; 48],
    pub mr_config_id: [u8; 48],
    pub mr_owner: [u8; 48],
    pub mr_owner_config: [u8; 48],
    pub rtmr: [[u8; 48]; 4],
}

impl TdReport {
    /// Reads a report and checks that its parts belong together.
    ///
    /// # Errors
    /// When they do not, or it is no TDREPORT.
    pub fn parse(bytes: &[u8]) -> Result<Self, TdReportError> {
        let raw: &[u8; TD_REPORT_LENGTH] = bytes.try_into().map_err(|_| TdReportError::Format)?;
        if raw[0] != 0x81 {
            return Err(TdReportError::Format);
        }
        if raw[32..80] != sha384(&raw[256..495]) {
            return Err(TdReportError::Hash("TEE_TCB_INFO"));
        }
        if raw[80..128] != sha384(&raw[512..1024]) {
            return Err(TdReportError::Hash("TDINFO"));
        }
        Ok(Self {
            cpu_svn: at(raw, 16),
            report_data: at(raw, 128),
            tee_tcb_svn: at(raw, 264),
            mr_seam: at(raw, 280),
            attributes: u64::from_le_bytes(at(raw, 512)),
            xfam: u64::from_le_bytes(at(raw, 520)),
            mr_td: at(raw, 528),
            mr_config_id: at(raw, 576),
            mr_owner: at(raw, 624),
            mr_owner_config: at(raw, 672),
            rtmr: [at(raw, 720), at(raw, 768), at(raw, 816), at(raw, 864)],
        })
    }

    /// Everything it says.
    pub fn claims(&self) -> serde_json::Value {
        serde_json::json!({
            "cpu_svn": hex(&self.cpu_svn),
            "report_data": hex(&self.report_data),
            "tee_tcb_svn": hex(&self.tee_tcb_svn),
            "mr_seam": hex(&self.mr_seam),
            "td_attributes": format!("0x{:x}", self.attributes),
            "xfam": format!("0x{:x}", self.xfam),
            "mr_td": hex(&self.mr_td),
            "mr_config_id": hex(&self.mr_config_id),
            "mr_owner": hex(&self.mr_owner),
            "mr_owner_config": hex(&self.mr_owner_config),
            "rtmr0": hex(&self.rtmr[0]),
            "rtmr1": hex(&self.rtmr[1]),
            "rtmr2": hex(&self.rtmr[2]),
            "rtmr3": hex(&self.rtmr[3]),
        })
    }
}

fn at<const N: usize>(raw: &[u8; TD_REPORT_LENGTH], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&raw[at..at + N]);
    out
}
