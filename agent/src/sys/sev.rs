//! The ioctl of `/dev/sev-guest` (linux/sev-guest.h): a report of the AMD secure processor.
#![expect(
    unsafe_code,
    reason = "raw system calls; every block states what makes it sound"
)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::{Result, check};

/// `_IOWR('S', 2, struct snp_guest_request_ioctl)`.
const SNP_GET_EXT_REPORT: libc::c_ulong = 0xC020_5302;
/// Message version of the request (SEV-SNP ABI, `MSG_REPORT_REQ`).
const VERSION: u8 = 1;
/// Room for certificates: whole pages, as the host places them.
const CERTIFICATES: usize = 16 * 4096;
/// Response of the firmware, and where the report stands in it.
const RESPONSE: usize = 4000;
const REPORT: std::ops::Range<usize> = 32..32 + 1184;
/// Entry of the certificate table (GHCB specification, 2.7): GUID, offset, length.
const ENTRY: usize = 24;

/// `struct snp_ext_report_req`.
#[repr(C)]
struct ExtendedRequest {
    user_data: [u8; 64],
    vmpl: u32,
    reserved: [u8; 28],
    certificates: u64,
    certificates_len: u32,
}

/// `struct snp_guest_request_ioctl`.
#[repr(C)]
struct GuestRequest {
    version: u8,
    request: u64,
    response: u64,
    exit_info: u64,
}

const _: () = assert!(size_of::<ExtendedRequest>() == 112 && size_of::<GuestRequest>() == 32);

/// A report over `data`, and the certificate table that the host gave along (may be empty).
///
/// # Errors
/// What the driver says; `EBADMSG` where the firmware's answer is an error.
pub fn snp_extended_report(device: &File, data: &[u8; 64]) -> Result<(Vec<u8>, Vec<u8>)> {
    let mut certificates = vec![0u8; CERTIFICATES];
    let mut response = [0u8; RESPONSE];
    let mut request = ExtendedRequest {
        user_data: *data,
        vmpl: 0,
        reserved: [0; 28],
        certificates: certificates.as_mut_ptr() as u64,
        certificates_len: CERTIFICATES as u32,
    };
    let mut message = GuestRequest {
        version: VERSION,
        request: (&raw mut request) as u64,
        response: response.as_mut_ptr() as u64,
        exit_info: 0,
    };
    // SAFETY: the driver reads and writes the three buffers that the message names, each of the size
    // that it expects or is told, and all of them live through the call.
    check(libc::c_long::from(unsafe {
        libc::ioctl(
            device.as_raw_fd(),
            SNP_GET_EXT_REPORT as _,
            &raw mut message,
        )
    }))?;
    if response[..4] != [0; 4] {
        return Err(Errno::EBADMSG);
    }
    certificates.truncate(table_length(&certificates));
    Ok((response[REPORT].to_vec(), certificates))
}

/// Bytes of a certificate table up to the end of its last certificate; 0 where it is none.
fn table_length(table: &[u8]) -> usize {
    let word = |bytes: &[u8]| {
        let bytes = bytes.try_into().unwrap_or_default();
        usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX)
    };
    let mut end = 0;
    for (number, entry) in table.chunks_exact(ENTRY).enumerate() {
        if entry[..16] == [0; 16] {
            return if number == 0 {
                0
            } else {
                end.max((number + 1) * ENTRY)
            };
        }
        let last = word(&entry[16..20]).saturating_add(word(&entry[20..24]));
        if last > table.len() {
            return 0;
        }
        end = end.max(last);
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_table_ends_with_its_last_certificate() {
        let mut table = vec![0; 200];
        assert_eq!(table_length(&table), 0);
        table[..16].fill(1);
        table[16..20].copy_from_slice(&48u32.to_le_bytes());
        table[20..24].copy_from_slice(&10u32.to_le_bytes());
        assert_eq!(table_length(&table), 58);
        table[20..24].copy_from_slice(&1000u32.to_le_bytes());
        assert_eq!(table_length(&table), 0);
        assert_eq!(table_length(&[1; 199]), 0);
    }
}
