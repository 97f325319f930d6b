//! What a TD measures when it starts, predicted: MRTD from the firmware image (Intel TDX Module
//! Base Architecture Specification, "Measurement and Attestation"; EDK2 `OvmfPkg/IntelTdx`,
//! `TdxMetadata.asm`), RTMR1 and RTMR2 from a kernel that is booted directly. RTMR0 depends on tables
//! that the hypervisor makes and is not predicted: compare it by the event log.

use super::ovmf::{self, OvmfError};
use super::{MeasureError, PAGE, pe};
use crate::crypto::{Digest384, sha384};

/// Bytes that one TDH.MR.EXTEND covers.
const CHUNK: usize = 256;
const MAX_SECTIONS: u32 = 64;
/// Largest section: pages are measured one by one.
const MAX_SECTION: u64 = 256 << 20;
const HEADER: usize = 16;
const ITEM: usize = 32;
/// Attributes of a section: its content is measured; its pages are added later, by the guest.
const EXTEND: u32 = 1;
const PAGE_AUG: u32 = 2;
/// What firmware puts into RTMR1 behind the kernel, in this order.
const BOOT_EVENTS: [&[u8]; 4] = [
    b"Calling EFI Application from Boot Option",
    &[0; 4],
    b"Exit Boot Services Invocation",
    b"Exit Boot Services Returned with Success",
];

/// A range of guest memory that the hypervisor fills before the TD starts.
struct Section<'a> {
    gpa: u64,
    size: u64,
    /// Content, if it is measured.
    measured: Option<&'a [u8]>,
}

/// MRTD of a TD that starts with this firmware image, as KVM builds it: each page is added and then
/// measured.
///
/// # Errors
/// When it is not a firmware image with TDX metadata.
pub fn mr_td(image: &[u8]) -> Result<[u8; 48], MeasureError> {
    let mut digest = Digest384::new();
    let mut operation = |name: &[u8], gpa: u64, content: &[u8]| {
        let mut buffer = [0; 128];
        buffer[..name.len()].copy_from_slice(name);
        buffer[16..24].copy_from_slice(&gpa.to_le_bytes());
        digest.add(&buffer);
        digest.add(content);
    };
    for section in sections(image)? {
        for offset in (0..section.size).step_by(PAGE) {
            let gpa = section.gpa + offset;
            operation(b"MEM.PAGE.ADD", gpa, &[]);
            let Some(content) = section.measured else {
                continue;
            };
            // Sections are checked to be whole pages of the image.
            let page = content.chunks(PAGE).nth(offset as usize / PAGE);
            for (chunk, at) in page
                .unwrap_or_default()
                .chunks(CHUNK)
                .zip((gpa..).step_by(CHUNK))
            {
                operation(b"MR.EXTEND", at, chunk);
            }
        }
    }
    Ok(digest.finish())
}

/// The sections that are added before the start.
fn sections(image: &[u8]) -> Result<Vec<Section<'_>>, OvmfError> {
    let start = ovmf::tdx_metadata(image)?;
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).ok_or(OvmfError::TdxMetadata)?;
        let bytes = bytes.try_into().map_err(|_| OvmfError::TdxMetadata)?;
        Ok::<_, OvmfError>(u32::from_le_bytes(bytes))
    };
    let long =
        |at: usize| Ok::<_, OvmfError>(u64::from(word(at)?) | u64::from(word(at + 4)?) << 32);
    let count = word(start + 12)?;
    if image.get(start..start + 4) != Some(b"TDVF") || word(start + 8)? != 1 || count > MAX_SECTIONS
    {
        return Err(OvmfError::TdxMetadata);
    }
    let mut sections = Vec::new();
    for n in 0..count as usize {
        let at = start + HEADER + n * ITEM;
        let (offset, raw) = (word(at)? as usize, word(at + 4)? as usize);
        let (gpa, size, attributes) = (long(at + 8)?, long(at + 16)?, word(at + 28)?);
        let aligned = gpa.is_multiple_of(PAGE as u64) && size.is_multiple_of(PAGE as u64);
        let end = gpa.checked_add(size);
        let raw_end = offset.checked_add(raw).filter(|e| *e <= image.len());
        let (Some(_), Some(raw_end), true) = (end, raw_end, aligned && size <= MAX_SECTION) else {
            return Err(OvmfError::TdxMetadata);
        };
        if attributes & PAGE_AUG != 0 {
            continue;
        }
        let measured = attributes & EXTEND != 0;
        if measured && raw as u64 != size {
            return Err(OvmfError::TdxMetadata);
        }
        sections.push(Section {
            gpa,
            size,
            measured: measured.then(|| &image[offset..raw_end]),
        });
    }
    Ok(sections)
}

/// RTMR1 after a kernel with an EFI stub was booted directly. QEMU does not change the kernel of a
/// confidential guest.
///
/// # Errors
/// When the kernel is no PE image.
pub fn rtmr1(kernel: &[u8]) -> Result<[u8; 48], MeasureError> {
    let digest = pe::authenticode(kernel).ok_or(MeasureError::Kernel)?;
    Ok(rtmr1_of(digest))
}

/// RTMR1 after a kernel with this Authenticode digest was booted directly.
pub fn rtmr1_of(kernel: [u8; 48]) -> [u8; 48] {
    let events = BOOT_EVENTS.iter().map(|e| sha384(e));
    extend(std::iter::once(kernel).chain(events))
}

/// RTMR2 after the kernel's stub measured its load options and initial RAM disk. Firmware names the
/// disk in the options, in front of the command line, older firmware behind it: both values.
pub fn rtmr2(command_line: &str, initrd: Option<&[u8]>) -> Vec<[u8; 48]> {
    let register = |options: &str| {
        let text: Vec<u8> = options
            .encode_utf16()
            .chain([0])
            .flat_map(u16::to_le_bytes)
            .collect();
        extend(std::iter::once(sha384(&text)).chain(initrd.map(sha384)))
    };
    match initrd {
        Some(_) => vec![
            register(&format!("initrd=initrd {command_line}")),
            register(&format!("{command_line} initrd=initrd")),
        ],
        None => vec![register(command_line)],
    }
}

/// A register that begins with zeros, after these digests.
fn extend(digests: impl Iterator<Item = [u8; 48]>) -> [u8; 48] {
    digests.fold([0; 48], |register, digest| {
        sha384(&[register, digest].concat())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pages of firmware: one measured section, one of zero pages, one that the guest adds.
    fn image() -> Vec<u8> {
        ovmf::tests::image_with_tdx_sections(&[
            (0, 0x1000, 0xffff_f000, 0x1000, EXTEND),
            (0, 0, 0x80_9000, 0x2000, 0),
            (0, 0, 0x81_0000, 0x1000, PAGE_AUG),
        ])
    }

    #[test]
    fn mr_td_is_the_digest_of_what_the_module_is_told() {
        let image = image();
        let operation = |name: &[u8], gpa: u64| {
            let mut buffer = name.to_vec();
            buffer.resize(16, 0);
            buffer.extend(gpa.to_le_bytes());
            buffer.resize(128, 0);
            buffer
        };
        let mut told = operation(b"MEM.PAGE.ADD", 0xffff_f000);
        for chunk in 0..16 {
            told.extend(operation(b"MR.EXTEND", 0xffff_f000 + chunk * 256));
            let at = chunk as usize * 256;
            told.extend(&image[at..at + 256]);
        }
        told.extend(operation(b"MEM.PAGE.ADD", 0x80_9000));
        told.extend(operation(b"MEM.PAGE.ADD", 0x80_a000));
        assert_eq!(mr_td(&image), Ok(sha384(&told)));
    }

    #[test]
    fn firmware_without_metadata_and_broken_ones_are_refused_or_measured() {
        assert!(mr_td(&ovmf::stand_in()).is_err());
        assert!(mr_td(&[]).is_err());
        // What stands in for firmware is measured as firmware is.
        let mut other = ovmf::stand_in_td();
        other[0] ^= 1;
        assert_ne!(mr_td(&ovmf::stand_in_td()).unwrap(), mr_td(&other).unwrap());
        let image = image();
        for at in 4096..image.len() {
            let mut broken = image.clone();
            broken[at] ^= 0xff;
            let _ = mr_td(&broken);
        }
    }

    #[test]
    fn every_input_changes_its_register() {
        let kernel = pe::tests::image();
        let mut other = kernel.clone();
        other[0x210] ^= 1;
        assert_ne!(rtmr1(&kernel), rtmr1(&other));
        assert_eq!(rtmr1(b"no kernel"), Err(MeasureError::Kernel));
        let both = rtmr2("quiet", Some(b"disk"));
        assert_eq!(both.len(), 2);
        for other in [
            rtmr2("quiet ", Some(b"disk")),
            rtmr2("quiet", Some(b"disc")),
            rtmr2("quiet", None),
        ] {
            assert!(other.iter().all(|r| !both.contains(r)));
        }
    }
}
