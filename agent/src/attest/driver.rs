//! Evidence by the TEE's own driver, for guests whose kernel has no configfs-tsm: the report of an SNP guest
//! by the crate `sev` (kernels before 6.7), the quote of a TD by `tdx_attest` (kernels of Intel's and of
//! distributions that carry its patches; the mainline driver has no quote). Both run apart from the agent.
//!
//! What is not used of them, because the host writes what they trust:
//! - `sev`'s extended report follows the offsets in the host's certificate table without a bound, and would
//!   hand over what lies behind it in memory. The report alone is asked for; the verifier has certificates
//!   as collateral.
//! - `tdx_attest` panics where it knows no device, and believes the length of the quote. Its device is looked
//!   for first, and only a whole quote over what was asked is believed.

use std::path::Path;

use sealpod_attestation::encoding;
use sealpod_attestation::evidence::Tee;

use super::source::{CpuEvidence, PATIENCE, SourceError};
use crate::apart;

/// Driver of SNP guests.
pub const SEV_GUEST: &str = "/dev/sev-guest";
/// Drivers of TDs: the mainline kernel's, and the one of Intel's first patches.
pub const TDX_GUEST: [&str; 2] = ["/dev/tdx_guest", "/dev/tdx-guest"];
/// Length of an SNP report (SEV-SNP ABI, table 23). A quote, which carries its chain, is longer.
pub(super) const SNP_REPORT: usize = 1184;
/// Version of the request (SEV-SNP ABI, `MSG_REPORT_REQ`), and the level that the agent runs at.
const MESSAGE: u32 = 1;
const VMPL: u32 = 0;
/// Longest quote: the driver's buffer without the headers around it, which `tdx_attest` forgets.
const QUOTE_MAX: usize = 4 * 4096 - 24;
/// Of a quote (Intel TDX DCAP Quote Generation Library, quote formats 4 and 5): the header, with the type
/// of the TEE in it; the descriptor of a version 5 body; lengths of the bodies by their type.
const HEADER: usize = 48;
const TEE_TYPE: std::ops::Range<usize> = 4..8;
const TDX: [u8; 4] = [0x81, 0, 0, 0];
const DESCRIPTOR: usize = 6;
const BODIES: [(u16, usize); 3] = [(2, 584), (3, 648), (4, 885)];
/// REPORTDATA in every body.
const REPORT_DATA: std::ops::Range<usize> = 520..584;

/// A report over `data` of `/dev/sev-guest`.
///
/// # Errors
/// [`SourceError::Apart`]: what the driver or the firmware says.
pub async fn snp(data: &[u8; 64]) -> Result<CpuEvidence, SourceError> {
    let work = || {
        let mut firmware = sev::firmware::guest::Firmware::open().map_err(|e| {
            format!("Could not open {SEV_GUEST}: {e}") // the crate names no file
        })?;
        let report = firmware.get_report(Some(MESSAGE), Some(*data), Some(VMPL));
        report.map_err(|e| format!("{SEV_GUEST}: {e}"))
    };
    let report = apart::run(SNP_REPORT, PATIENCE, work).await?;
    if report.len() != SNP_REPORT {
        return Err(SourceError::Length(report.len()));
    }
    Ok(evidence(Tee::Snp, report))
}

/// A quote over `data` of the TD's driver.
///
/// # Errors
/// [`SourceError::Apart`], also where there is no driver; [`SourceError::Length`] for what is no quote over
/// `data`.
pub async fn tdx(data: &[u8; 64]) -> Result<CpuEvidence, SourceError> {
    if !TDX_GUEST.iter().any(|device| Path::new(device).exists()) {
        return Err(SourceError::NoTee);
    }
    let work = || {
        let quote = tdx_attest::get_tdx_quote(encoding::base64(data));
        quote.map_err(|e| e.to_string())
    };
    let answer = apart::run(QUOTE_MAX, PATIENCE, work).await?;
    let length = quote_length(&answer, data).ok_or(SourceError::Length(answer.len()))?;
    Ok(evidence(Tee::Tdx, answer[..length].to_vec()))
}

fn evidence(tee: Tee, report: Vec<u8>) -> CpuEvidence {
    CpuEvidence {
        tee,
        report,
        endorsements: Vec::new(),
        event_log: Vec::new(),
    }
}

/// Bytes of the quote that `bytes` begins with, if it is one of a TD over `data`.
fn quote_length(bytes: &[u8], data: &[u8; 64]) -> Option<usize> {
    let half = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let (start, body) = match half(0)? {
        4 => (HEADER, BODIES[0].1),
        5 => {
            let kind = half(HEADER)?;
            let (_, body) = BODIES.iter().find(|(known, _)| *known == kind)?;
            (HEADER + DESCRIPTOR, *body)
        }
        _ => return None,
    };
    let found = bytes.get(start + REPORT_DATA.start..start + REPORT_DATA.end)?;
    if bytes.get(TEE_TYPE)? != TDX || found != data {
        return None;
    }
    let signature = start + body + 4;
    let length = bytes.get(start + body..signature)?.try_into().ok()?;
    let end = signature.checked_add(u32::from_le_bytes(length) as usize)?;
    (end <= bytes.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quote(version: u16, kind: u16, signature: u32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes[..2].copy_from_slice(&version.to_le_bytes());
        bytes[TEE_TYPE].copy_from_slice(&TDX);
        let body = BODIES
            .iter()
            .find(|(known, _)| *known == kind)
            .expect("body");
        if version == 5 {
            bytes.extend(kind.to_le_bytes());
            bytes.extend((body.1 as u32).to_le_bytes());
        }
        let start = bytes.len();
        bytes.resize(start + body.1, 0);
        bytes[start + REPORT_DATA.start..start + REPORT_DATA.end].fill(7);
        bytes.extend(signature.to_le_bytes());
        bytes.resize(bytes.len() + 100, 0);
        bytes
    }

    #[test]
    fn only_a_whole_quote_of_a_td_over_what_was_asked_is_believed() {
        for (version, kind) in [(4, 2), (5, 2), (5, 3), (5, 4)] {
            let whole = quote(version, kind, 90);
            assert_eq!(quote_length(&whole, &[7; 64]), Some(whole.len() - 10));
            // Shorter than it says, over something else, of another TEE.
            assert_eq!(quote_length(&whole[..whole.len() - 11], &[7; 64]), None);
            assert_eq!(quote_length(&whole, &[8; 64]), None);
            let mut sgx = whole.clone();
            sgx[TEE_TYPE].fill(0);
            assert_eq!(quote_length(&sgx, &[7; 64]), None);
            for signature in [101, u32::MAX] {
                assert_eq!(
                    quote_length(&quote(version, kind, signature), &[7; 64]),
                    None
                );
            }
        }
        for length in 0..60 {
            assert_eq!(quote_length(&vec![5; length], &[5; 64]), None);
        }
    }
}
