//! Authenticode digest of a PE image (Microsoft, Windows Authenticode Portable Executable Signature
//! Format, "Calculating the PE Image Hash"), as firmware measures what it starts (EDK2
//! `DxeTpm2MeasureBootLib`): headers without checksum and certificate entry, sections in the order
//! of the file, what follows them without the certificates.

use crate::crypto::Digest384;

const MAX_SECTIONS: usize = 96;
const SECTION_HEADER: usize = 40;
const PE32_PLUS: u16 = 0x20b;
/// Certificate table among the data directories.
const SECURITY: usize = 4;

/// The digest; `None` when it is no PE image.
pub(super) fn authenticode(image: &[u8]) -> Option<[u8; 48]> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| {
        let word = u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?);
        usize::try_from(word).ok()
    };
    if !image.starts_with(b"MZ") {
        return None;
    }
    let header = u32_at(0x3c).filter(|h| *h < image.len())?;
    if image.get(header..header + 4)? != b"PE\0\0" {
        return None;
    }
    let sections = usize::from(u16_at(header + 6)?);
    let optional_size = usize::from(u16_at(header + 20)?);
    let optional = header + 24;
    let wide = u16_at(optional)? == PE32_PLUS;
    let checksum = optional + 64;
    let headers_end = u32_at(optional + 60)?;
    let directories = optional + if wide { 112 } else { 96 };
    let security = directories + SECURITY * 8;
    let has_security = u32_at(directories - 4)? > SECURITY;

    let mut digest = Digest384::new();
    digest.add(image.get(..checksum)?);
    let mut certificates = 0;
    if has_security {
        certificates = u32_at(security + 4)?;
        digest.add(image.get(checksum + 4..security)?);
        digest.add(image.get(security + 8..headers_end)?);
    } else {
        digest.add(image.get(checksum + 4..headers_end)?);
    }
    if sections > MAX_SECTIONS {
        return None;
    }
    let mut ranges = Vec::new();
    for n in 0..sections {
        let at = optional + optional_size + n * SECTION_HEADER;
        let (size, start) = (u32_at(at + 16)?, u32_at(at + 20)?);
        if size > 0 {
            ranges.push((start, size));
        }
    }
    ranges.sort_by_key(|r| r.0);
    let mut hashed = headers_end;
    for (start, size) in ranges {
        digest.add(image.get(start..start.checked_add(size)?)?);
        hashed = hashed.checked_add(size)?;
    }
    if image.len() > hashed {
        digest.add(image.get(hashed..image.len().checked_sub(certificates)?)?);
    }
    Some(digest.finish())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::crypto::sha384;

    /// A PE image of headers, two sections out of order, something behind them, and certificates.
    pub(in super::super) fn image() -> Vec<u8> {
        let mut image = vec![0; 0x200];
        image[..2].copy_from_slice(b"MZ");
        image[0x3c] = 0x40;
        image[0x40..0x44].copy_from_slice(b"PE\0\0");
        image[0x46] = 2;
        image[0x54] = 0xf0;
        image[0x58..0x5a].copy_from_slice(&PE32_PLUS.to_le_bytes());
        image[0x58 + 60..0x58 + 64].copy_from_slice(&0x200u32.to_le_bytes());
        image[0x58 + 64..0x58 + 68].copy_from_slice(&[0xcc; 4]);
        image[0x58 + 108] = 16;
        image[0x58 + 112 + 32..0x58 + 112 + 40].copy_from_slice(&[0, 5, 0, 0, 8, 0, 0, 0]);
        for (n, start) in [0x300u32, 0x200].into_iter().enumerate() {
            let at = 0x58 + 0xf0 + n * SECTION_HEADER;
            image[at + 16..at + 20].copy_from_slice(&0x100u32.to_le_bytes());
            image[at + 20..at + 24].copy_from_slice(&start.to_le_bytes());
        }
        image.extend([1; 0x100]);
        image.extend([2; 0x100]);
        image.extend([3; 0x100]);
        image.extend([4; 8]);
        image
    }

    #[test]
    fn the_digest_leaves_out_checksum_and_certificates_alone() {
        let image = image();
        let digest = authenticode(&image).unwrap();
        let mut plain = image.clone();
        plain.truncate(0x500);
        plain.drain(0x58 + 112 + 32..0x58 + 112 + 40);
        plain.drain(0x58 + 64..0x58 + 68);
        assert_eq!(digest, sha384(&plain));
        for at in 0..image.len() {
            let mut changed = image.clone();
            changed[at] ^= 1;
            let free = (0x98..0x9c).contains(&at) || at >= 0x500;
            // Where the certificate entry or a size stands, the image may become another or none.
            let entry = (0xe8..0xf0).contains(&at);
            if !entry {
                assert_eq!(
                    authenticode(&changed) == Some(digest),
                    free,
                    "byte 0x{at:x}"
                );
            }
        }
        for length in 0..0x3ff {
            assert_eq!(authenticode(&image[..length]), None, "{length}");
        }
    }
}
