//! Whether kernel and initramfs are what a VM can boot. Reads the beginnings of files, no more.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use super::Finding;

/// ELF note of a kernel with a PVH entry: name and type (xen/interface/elfnote.h,
/// `XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_NOTE: (&[u8], u32) = (b"Xen\0", 18);
/// Program header type of notes.
const PT_NOTE: u32 = 4;
/// Most that is read of a note segment, bytes.
const NOTES_MAX: usize = 64 << 10;
/// Most cpio entries that are looked through for `init`.
const ENTRIES_MAX: usize = 4096;

const BUILD: &str = "`make build` makes it and `make install` puts it in place; or set";

/// The guest kernel.
pub(super) fn kernel(path: &Path) -> Finding {
    let name = "guest kernel";
    let fix = format!("{BUILD} hypervisor.kernel");
    match File::open(path).and_then(|f| has_pvh_entry(&f)) {
        Ok(true) => Finding::ok(name, format!("{}, PVH entry", path.display())),
        Ok(false) => {
            let found = format!("{} has no PVH entry (CONFIG_PVH=y)", path.display());
            Finding::missing(name, found, fix)
        }
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            let found = format!(
                "{} is not an uncompressed 64-bit ELF kernel",
                path.display()
            );
            Finding::missing(name, found, fix)
        }
        Err(e) => Finding::missing(name, format!("{}: {e}", path.display()), fix),
    }
}

/// The guest's root.
pub(super) fn initramfs(path: &Path) -> Finding {
    let name = "initramfs";
    let fix = format!("{BUILD} hypervisor.initramfs");
    match File::open(path).and_then(|f| has_init(&f)) {
        Ok(Some(true)) => Finding::ok(name, format!("{}, with an init", path.display())),
        Ok(Some(false)) => Finding::missing(name, format!("{} has no /init", path.display()), fix),
        Ok(None) => Finding::ok(name, format!("{}, compressed", path.display())),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => Finding::missing(
            name,
            format!("{} is not a cpio archive", path.display()),
            fix,
        ),
        Err(e) => Finding::missing(name, format!("{}: {e}", path.display()), fix),
    }
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> io::Result<[u8; N]> {
    let end = at.checked_add(N).ok_or_else(invalid)?;
    let field = bytes.get(at..end).ok_or_else(invalid)?;
    field.try_into().map_err(|_| invalid())
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    number(bytes, at).map(u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> io::Result<u64> {
    number(bytes, at).map(u64::from_le_bytes)
}

/// Looks for the PVH note in a 64-bit little-endian ELF file (System V ABI, chapters 4 and 5).
fn has_pvh_entry(file: &File) -> io::Result<bool> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).map_err(|_| invalid())?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err(invalid());
    }
    let table = u64_at(&header, 32)?;
    let size = u64::from(u16::from_le_bytes(number(&header, 54)?));
    let count = u64::from(u16::from_le_bytes(number(&header, 56)?));
    if size < 56 {
        return Err(invalid());
    }
    for i in 0..count {
        let mut entry = [0; 56];
        let at = table.checked_add(i * size).ok_or_else(invalid)?;
        file.read_exact_at(&mut entry, at).map_err(|_| invalid())?;
        if u32_at(&entry, 0)? != PT_NOTE {
            continue;
        }
        let length = usize::try_from(u64_at(&entry, 32)?).map_err(|_| invalid())?;
        let mut notes = vec![0; length.min(NOTES_MAX)];
        file.read_exact_at(&mut notes, u64_at(&entry, 8)?)
            .map_err(|_| invalid())?;
        if has_note(&notes) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Notes: name size, descriptor size, type, name, descriptor; both padded to 4 bytes.
fn has_note(mut notes: &[u8]) -> bool {
    loop {
        let (Ok(name), Ok(desc), Ok(kind)) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8))
        else {
            return false;
        };
        let (name, desc) = (name as usize, desc as usize);
        if kind == PVH_NOTE.1 && notes.get(12..12 + name) == Some(PVH_NOTE.0) {
            return true;
        }
        // Both came from 32 bits, so this cannot overflow a usize.
        let next = 12 + name.next_multiple_of(4) + desc.next_multiple_of(4);
        match notes.get(next..) {
            Some(rest) => notes = rest,
            None => return false,
        }
    }
}

/// Whether an uncompressed newc archive has an `init`; none for a compressed one. Format: the
/// kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
fn has_init(file: &File) -> io::Result<Option<bool>> {
    const COMPRESSED: [&[u8]; 5] = [
        b"\x1f\x8b",         // gzip
        b"\x28\xb5\x2f\xfd", // zstd
        b"\xfd7zXZ",         // xz
        b"\x02\x21\x4c\x18", // lz4
        b"BZh",              // bzip2
    ];
    let mut magic = [0; 6];
    file.read_exact_at(&mut magic, 0).map_err(|_| invalid())?;
    if COMPRESSED.iter().any(|c| magic.starts_with(c)) {
        return Ok(None);
    }
    let mut at = 0_u64;
    for _ in 0..ENTRIES_MAX {
        let mut header = [0; 110];
        file.read_exact_at(&mut header, at).map_err(|_| invalid())?;
        if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
            return Err(invalid());
        }
        let field = |i: usize| {
            let text = std::str::from_utf8(&header[6 + 8 * i..14 + 8 * i]).ok()?;
            u64::from_str_radix(text, 16).ok()
        };
        let (size, name_size) = (
            field(6).ok_or_else(invalid)?,
            field(11).ok_or_else(invalid)?,
        );
        let mut name = vec![0; usize::try_from(name_size.min(4096)).map_err(io::Error::other)?];
        file.read_exact_at(&mut name, at + 110)
            .map_err(|_| invalid())?;
        match name.as_slice() {
            b"init\0" | b"./init\0" | b"/init\0" => return Ok(Some(true)),
            b"TRAILER!!!\0" => return Ok(Some(false)),
            _ => {}
        }
        // All of them came from 32 bits.
        at = (at + 110 + name_size).next_multiple_of(4) + size;
        at = at.next_multiple_of(4);
    }
    Ok(Some(false))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::State;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), content).expect("write");
        file
    }

    /// A kernel of one segment with these notes.
    fn elf(notes: &[u8]) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 4;
        elf[64 + 8] = 120;
        elf[64 + 32..64 + 40].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        elf.extend(notes);
        elf
    }

    fn note(name: &[u8], kind: u8) -> Vec<u8> {
        let mut note = vec![name.len() as u8, 0, 0, 0, 5, 0, 0, 0, kind, 0, 0, 0];
        note.extend(name);
        note.resize(12 + name.len().next_multiple_of(4) + 8, 0xaa);
        note
    }

    #[test]
    fn kernel_needs_to_be_elf_with_a_pvh_note() {
        let of = |content: &[u8]| kernel(file(content).path());
        let good = [note(b"Linux\0", 0), note(b"Xen\0", 18)].concat();
        assert_eq!(of(&elf(&good)).state, State::Ok);
        assert!(
            of(&elf(&note(b"Xen\0", 17)))
                .found
                .ends_with("(CONFIG_PVH=y)")
        );
        assert!(
            of(b"MZ and then some more, a bzImage")
                .found
                .contains("is not an uncompressed")
        );
        assert!(
            kernel(Path::new("/nonexistent/k"))
                .found
                .contains("No such file")
        );
        // Sizes that lie.
        let mut lies = elf(&good);
        lies[64 + 32..64 + 40].fill(0xff);
        assert_eq!(of(&lies).state, State::Missing);
        for n in 0..lies.len() {
            of(&lies[..n]);
        }
        assert!(!has_note(&[0xff; 40]));
    }

    fn entry(name: &str, data: &[u8]) -> Vec<u8> {
        let mut fields = [0_usize; 13];
        fields[6] = data.len();
        fields[11] = name.len() + 1;
        let mut e = b"070701".to_vec();
        e.extend(fields.map(|f| format!("{f:08x}")).concat().bytes());
        e.extend(name.bytes());
        e.push(0);
        e.resize(e.len().next_multiple_of(4), 0);
        e.extend(data);
        e.resize(e.len().next_multiple_of(4), 0);
        e
    }

    #[test]
    fn initramfs_needs_to_be_cpio_with_an_init() {
        let of = |content: &[u8]| initramfs(file(content).path());
        let end = entry("TRAILER!!!", b"");
        let good = [entry("dev", b""), entry("init", b"\x7fELF"), end.clone()].concat();
        assert_eq!(of(&good).state, State::Ok);
        let without = [entry("sbin/init", b"12345"), end].concat();
        assert!(of(&without).found.ends_with("has no /init"));
        assert!(of(b"\x1f\x8b\x08 and so on").found.ends_with("compressed"));
        assert!(
            of(b"something else")
                .found
                .ends_with("is not a cpio archive")
        );
        for n in 0..good.len() {
            of(&good[..n]);
        }
    }
}
