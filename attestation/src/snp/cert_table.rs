//! The certificate table that a host passes along with a report (GHCB specification, section
//! 4.1.8.1): GUID, offset and length of each entry, then the certificates.

use crate::x509::{Certificate, X509Error};

const ENTRY: usize = 24;
/// The table lists at most this many entries; five are defined.
const MAX_ENTRIES: usize = 32;
/// The GUIDs of VCEK, VLEK, ASK and ARK. Tools write them in either byte order.
const CERTIFICATE_GUIDS: [u128; 4] = [
    0x63da758d_e664_4564_adc5_f4b93be8accd,
    0xa8074bc2_a25a_483e_aae6_39c045a0b8a1,
    0x4ab7b379_bbac_4fe4_a02f_05aef327c782,
    0xc0b406a4_a803_4952_9743_3fb6014cd0ae,
];

/// Why a certificate table is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CertTableError {
    /// No terminating entry within bounds.
    #[error("Certificate table has no end within its bounds")]
    NoEnd,
    /// An entry points outside.
    #[error("Certificate table entry {0} points outside of the table")]
    Bounds(usize),
    /// An entry is not a certificate.
    #[error("Certificate table entry {0} is not a certificate")]
    Certificate(usize, #[source] X509Error),
}

/// Whether the first entry carries the GUID of one of AMD's certificates.
pub fn looks_like_cert_table(bytes: &[u8]) -> bool {
    bytes.first_chunk::<16>().is_some_and(is_certificate)
}

fn is_certificate(guid: &[u8; 16]) -> bool {
    let [a, b, c, d, e, f, g, h, ..] = *guid;
    let mut mixed = *guid;
    mixed[..8].copy_from_slice(&[d, c, b, a, f, e, h, g]);
    [*guid, mixed]
        .iter()
        .any(|g| CERTIFICATE_GUIDS.contains(&u128::from_be_bytes(*g)))
}

/// The certificates of a table, DER. Entries that are no certificates are skipped.
///
/// # Errors
/// When the table runs out of its bounds or a certificate cannot be read.
pub fn cert_table(bytes: &[u8]) -> Result<Vec<Vec<u8>>, CertTableError> {
    let mut certificates = Vec::new();
    for (index, entry) in bytes.chunks_exact(ENTRY).take(MAX_ENTRIES).enumerate() {
        if entry.iter().all(|b| *b == 0) {
            return Ok(certificates);
        }
        let word = |at: usize| {
            entry[at..at + 4]
                .iter()
                .rev()
                .fold(0usize, |n, b| n << 8 | usize::from(*b))
        };
        let (offset, length) = (word(16), word(20));
        let content = bytes
            .get(offset..offset.saturating_add(length))
            .ok_or(CertTableError::Bounds(index))?;
        if looks_like_cert_table(entry) {
            Certificate::parse(content).map_err(|e| CertTableError::Certificate(index, e))?;
            certificates.push(content.to_vec());
        }
    }
    Err(CertTableError::NoEnd)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_without_end_or_out_of_bounds_are_refused() {
        let mut table = CERTIFICATE_GUIDS[0].to_be_bytes().to_vec();
        table.extend([0xff; 8]);
        table.extend([0; ENTRY]);
        assert!(looks_like_cert_table(&table));
        assert_eq!(cert_table(&table), Err(CertTableError::Bounds(0)));
        assert_eq!(cert_table(&table[..8]), Err(CertTableError::NoEnd));
        table[16..24].copy_from_slice(&[48, 0, 0, 0, 0, 0, 0, 0]);
        assert!(matches!(
            cert_table(&table),
            Err(CertTableError::Certificate(0, _))
        ));
        assert_eq!(cert_table(&[0; 48]), Ok(vec![]));
    }
}
