//! The firmware image: where it is mapped, what it asks the hypervisor to place in memory (OVMF's
//! `OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm` and `OvmfSevMetadata.asm`).

const PAGE: u64 = 4096;
/// Firmware ends at 4 GiB.
const FIRMWARE_END: u64 = 1 << 32;
/// Largest image that is read, bytes.
pub const MAX_IMAGE: usize = 32 << 20;
const MAX_SECTIONS: u32 = 64;
/// Pages that one section may cover: they are hashed one by one.
const MAX_SECTION: u32 = 256 << 20;
/// The table of entries ends this far before the end of the image.
const TABLE_END: usize = 32;
const ENTRY_HEADER: usize = 18;

const TABLE_FOOTER: u128 = 0x96b582de_1fb2_45f7_baea_a366c55a082d;
const SEV_HASH_TABLE: u128 = 0x7255371f_3a3b_4b04_927b_1da6efa8d454;
const SEV_ES_RESET: u128 = 0x00f771de_1a7e_4fcb_890e_68c77e2fb44e;
const TDX_METADATA: u128 = 0xe47a6535_984a_4798_865e_4685a7bf8ec2;
const SEV_METADATA: u128 = 0xdc886566_984a_4798_a75e_5585a7bf67cc;

/// Why an image is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OvmfError {
    /// Not whole pages, or too large.
    #[error("Image of {0} bytes; whole pages of 4096, at most {MAX_IMAGE}, are a firmware")]
    Size(usize),
    /// The table at the end is missing or broken.
    #[error("No valid GUID table at the end of the image: no OVMF with SEV support")]
    Table,
    /// An entry is missing.
    #[error("Image has no {0}")]
    Missing(&'static str),
    /// The SEV metadata are broken.
    #[error("SEV metadata are malformed")]
    Metadata,
    /// The TDX metadata are broken.
    #[error("TDX metadata are malformed")]
    TdxMetadata,
    /// A section of a kind nobody here knows.
    #[error("SEV metadata have a section of unknown type {0}")]
    Section(u32),
}

/// What is placed in a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SectionKind {
    /// Zero pages.
    SecMemory,
    /// The secrets page.
    Secrets,
    /// The CPUID page.
    Cpuid,
    /// Calling area of an SVSM; zero pages.
    SvsmCaa,
    /// Hashes of kernel, initial RAM disk and command line.
    KernelHashes,
}

/// A range of guest memory that is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Guest physical address.
    pub gpa: u32,
    /// Bytes.
    pub size: u32,
    /// What is placed there.
    pub kind: SectionKind,
}

/// An image, as far as the measurement needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ovmf {
    /// Where it begins in guest memory.
    pub gpa: u64,
    /// Where the other vCPUs begin.
    pub reset_eip: u32,
    /// Guest physical address of the kernel hash table, if there is a place for it.
    pub hash_table: Option<u32>,
    /// Sections, in order.
    pub sections: Vec<Section>,
}

impl Ovmf {
    /// Reads an image.
    ///
    /// # Errors
    /// When it is not an OVMF image with SEV-SNP metadata.
    pub fn parse(image: &[u8]) -> Result<Self, OvmfError> {
        check_size(image)?;
        let table = table(image)?;
        let entry = |guid: u128| {
            table
                .iter()
                .find(|(g, _)| *g == guid)
                .map(|(_, data)| *data)
        };
        let reset = entry(SEV_ES_RESET).ok_or(OvmfError::Missing("SEV-ES reset block"))?;
        let metadata = entry(SEV_METADATA).ok_or(OvmfError::Missing("SEV metadata"))?;
        Ok(Self {
            gpa: FIRMWARE_END - image.len() as u64,
            reset_eip: word(reset, 0).ok_or(OvmfError::Table)?,
            hash_table: entry(SEV_HASH_TABLE)
                .map(|d| word(d, 0).ok_or(OvmfError::Table))
                .transpose()?,
            sections: sections(image, word(metadata, 0).ok_or(OvmfError::Table)?)?,
        })
    }
}

fn check_size(image: &[u8]) -> Result<(), OvmfError> {
    let size = image.len();
    if size == 0 || size > MAX_IMAGE || !(size as u64).is_multiple_of(PAGE) {
        return Err(OvmfError::Size(size));
    }
    Ok(())
}

/// Where in the image the TDX metadata begin.
pub(super) fn tdx_metadata(image: &[u8]) -> Result<usize, OvmfError> {
    check_size(image)?;
    let table = table(image)?;
    let entry = table.iter().find(|(guid, _)| *guid == TDX_METADATA);
    let (_, data) = entry.ok_or(OvmfError::Missing("TDX metadata"))?;
    let offset = word(data, 0).ok_or(OvmfError::TdxMetadata)?;
    image
        .len()
        .checked_sub(offset as usize)
        .ok_or(OvmfError::TdxMetadata)
}

/// The entries, from the footer backwards: data, length, GUID.
fn table(image: &[u8]) -> Result<Vec<(u128, &[u8])>, OvmfError> {
    let end = image.len().checked_sub(TABLE_END).ok_or(OvmfError::Table)?;
    let (footer, length) = header(image, end).ok_or(OvmfError::Table)?;
    if footer != TABLE_FOOTER || length < ENTRY_HEADER || length > end {
        return Err(OvmfError::Table);
    }
    let start = end - length;
    let mut at = end - ENTRY_HEADER;
    let mut entries = Vec::new();
    while at > start {
        let (guid, length) = header(image, at).ok_or(OvmfError::Table)?;
        let begin = at
            .checked_sub(length)
            .filter(|b| *b >= start && length >= ENTRY_HEADER)
            .ok_or(OvmfError::Table)?;
        entries.push((guid, &image[begin..at - ENTRY_HEADER]));
        at = begin;
    }
    Ok(entries)
}

/// GUID and length that end at `end`.
fn header(image: &[u8], end: usize) -> Option<(u128, usize)> {
    let bytes: &[u8; ENTRY_HEADER] = image
        .get(end.checked_sub(ENTRY_HEADER)?..end)?
        .try_into()
        .ok()?;
    let [l0, l1, d, c, b, a, f, e, h, g, rest @ ..] = *bytes;
    let mut guid = [a, b, c, d, e, f, g, h, 0, 0, 0, 0, 0, 0, 0, 0];
    guid[8..].copy_from_slice(&rest);
    Some((
        u128::from_be_bytes(guid),
        usize::from(u16::from_le_bytes([l0, l1])),
    ))
}

fn sections(image: &[u8], offset_from_end: u32) -> Result<Vec<Section>, OvmfError> {
    const HEADER: usize = 16;
    const ITEM: usize = 12;
    let start = image
        .len()
        .checked_sub(offset_from_end as usize)
        .ok_or(OvmfError::Metadata)?;
    let header = image
        .get(start..start + HEADER)
        .ok_or(OvmfError::Metadata)?;
    let count = word(header, 12)
        .filter(|n| *n <= MAX_SECTIONS)
        .ok_or(OvmfError::Metadata)?;
    if &header[..4] != b"ASEV" || word(header, 8) != Some(1) {
        return Err(OvmfError::Metadata);
    }
    let items = image
        .get(start + HEADER..start + HEADER + count as usize * ITEM)
        .ok_or(OvmfError::Metadata)?;
    let section = |item: &[u8]| {
        let field = |at| word(item, at).ok_or(OvmfError::Metadata);
        let kind = match field(8)? {
            1 => SectionKind::SecMemory,
            2 => SectionKind::Secrets,
            3 => SectionKind::Cpuid,
            4 => SectionKind::SvsmCaa,
            0x10 => SectionKind::KernelHashes,
            other => return Err(OvmfError::Section(other)),
        };
        let section = Section {
            gpa: field(0)?,
            size: field(4)?,
            kind,
        };
        let aligned = u64::from(section.gpa).is_multiple_of(PAGE)
            && u64::from(section.size).is_multiple_of(PAGE);
        if aligned && section.size <= MAX_SECTION {
            Ok(section)
        } else {
            Err(OvmfError::Metadata)
        }
    };
    items.chunks_exact(ITEM).map(section).collect()
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at + 4)?
        .try_into()
        .ok()
        .map(u32::from_le_bytes)
}

/// An image of two pages with one section of each kind and no code: it stands for OVMF in the launch
/// measurement of a guest that was started without it (a simulated one).
#[must_use]
pub fn stand_in() -> Vec<u8> {
    let mut metadata = b"ASEV".to_vec();
    metadata.extend([0x4c, 0, 0, 0, 1, 0, 0, 0, 5, 0, 0, 0]);
    for (n, kind) in [1u32, 2, 3, 4, 0x10].into_iter().enumerate() {
        metadata.extend((0x80_0000 + n as u32 * 0x1000).to_le_bytes());
        metadata.extend(0x1000u32.to_le_bytes());
        metadata.extend(kind.to_le_bytes());
    }
    let mut table = entry(&0x80_4c00u32.to_le_bytes(), SEV_HASH_TABLE);
    table.extend(entry(&0x80_b004u32.to_le_bytes(), SEV_ES_RESET));
    table.extend(entry(&0x1000u32.to_le_bytes(), SEV_METADATA));
    two_pages(&metadata, table)
}

/// The same for a TD: the image itself, which is measured, and the pages for what the hypervisor says to it.
/// All that is measured of real firmware is measured of it, by the same code.
#[must_use]
pub fn stand_in_td() -> Vec<u8> {
    let metadata = tdx_sections(&[
        (0, 0x2000, 0xffff_e000, 0x2000, 1),
        (0, 0, 0x80_9000, 0x2000, 0),
    ]);
    two_pages(&metadata, entry(&0x1000u32.to_le_bytes(), TDX_METADATA))
}

/// TDX metadata with these sections: offset and bytes in the image, address and bytes in the guest, attributes.
fn tdx_sections(sections: &[(u32, u32, u64, u64, u32)]) -> Vec<u8> {
    let count = sections.len() as u32;
    let mut metadata = b"TDVF".to_vec();
    for word in [16 + count * 32, 1, count] {
        metadata.extend(word.to_le_bytes());
    }
    for (offset, raw, gpa, size, attributes) in sections {
        metadata.extend(offset.to_le_bytes());
        metadata.extend(raw.to_le_bytes());
        metadata.extend(gpa.to_le_bytes());
        metadata.extend(size.to_le_bytes());
        metadata.extend([0; 4]);
        metadata.extend(attributes.to_le_bytes());
    }
    metadata
}

/// An entry of the table: data, length, GUID.
fn entry(data: &[u8], id: u128) -> Vec<u8> {
    let [a, b, c, d, e, f, g, h, rest @ ..] = id.to_be_bytes();
    let length = (data.len() + ENTRY_HEADER) as u16;
    [
        data,
        &length.to_le_bytes(),
        &[d, c, b, a, f, e, h, g],
        &rest,
    ]
    .concat()
}

/// An image with metadata in its second page, and a table.
fn two_pages(metadata: &[u8], mut table: Vec<u8>) -> Vec<u8> {
    let mut footer = entry(&[], TABLE_FOOTER);
    let length = (table.len() + ENTRY_HEADER) as u16;
    footer[..2].copy_from_slice(&length.to_le_bytes());
    table.extend(footer);
    let mut image = vec![0; 8192];
    image[4096..4096 + metadata.len()].copy_from_slice(metadata);
    image[8192 - TABLE_END - table.len()..8192 - TABLE_END].copy_from_slice(&table);
    image
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An image whose first page is not zero, with TDX metadata of these sections.
    pub(in super::super) fn image_with_tdx_sections(
        sections: &[(u32, u32, u64, u64, u32)],
    ) -> Vec<u8> {
        let metadata = tdx_sections(sections);
        let mut image = two_pages(&metadata, entry(&0x1000u32.to_le_bytes(), TDX_METADATA));
        for (n, byte) in image[..4096].iter_mut().enumerate() {
            *byte = (n * 7) as u8;
        }
        image
    }

    #[test]
    fn an_image_is_read_and_every_broken_one_refused_or_read() {
        let image = stand_in();
        let ovmf = Ovmf::parse(&image).unwrap();
        assert_eq!(
            (ovmf.gpa, ovmf.reset_eip, ovmf.hash_table),
            (0xffff_e000, 0x80_b004, Some(0x80_4c00))
        );
        assert_eq!(ovmf.sections.len(), 5);
        for at in 0..image.len() {
            let mut broken = image.clone();
            broken[at] ^= 0xff;
            let _ = Ovmf::parse(&broken);
        }
        assert_eq!(Ovmf::parse(&[0; 4096]), Err(OvmfError::Table));
        assert_eq!(Ovmf::parse(&[]), Err(OvmfError::Size(0)));
    }
}
