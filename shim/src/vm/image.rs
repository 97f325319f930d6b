//! Whether the kernel and the initramfs that a configuration names can be booted, told before a VM is
//! started: a VMM's own message for a wrong file is seldom clear, and sometimes it just hangs.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Program headers that are looked at; a kernel has six or so.
const HEADERS_MAX: u16 = 64;
/// Bytes of notes that are looked at; a kernel has a few hundred.
const NOTES_MAX: u64 = 64 << 10;
/// Name and type of the note that holds the PVH entry point (Xen's `elfnote.h`:
/// `XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_NAME: &[u8] = b"Xen\0";
const PVH_TYPE: u32 = 18;
/// ELF: 64-bit, little endian; machine x86-64; program header of type note (elf(5)).
const CLASS_64_LSB: [u8; 2] = [2, 1];
const MACHINE_X86_64: u16 = 62;
const TYPE_NOTE: u32 = 4;

/// The beginnings of what the kernel unpacks: a "newc" cpio archive, or one compressed.
const ARCHIVES: [&[u8]; 6] = [
    b"070701",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"\x02\x21\x4c\x18",
    b"\xfd7zXZ",
    b"\x04\x22\x4d\x18",
];

/// A file that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("The guest's {what} {path} cannot be read")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is something else.
    #[error("The guest's {what} {path} is refused: it is {found}; expected is {expected}")]
    Kind {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What is needed.
        expected: &'static str,
    },
}

/// Checks that `path` is an uncompressed x86-64 kernel with a PVH entry point.
///
/// # Errors
/// [`ImageError`], saying what the file is instead.
pub fn check_kernel(path: &Path) -> Result<(), ImageError> {
    let refuse = |found| ImageError::Kind {
        what: "kernel",
        path: path.into(),
        found,
        expected: "an uncompressed x86-64 vmlinux (ELF) with a PVH entry (CONFIG_PVH)",
    };
    match kernel_kind(path) {
        Ok(None) => Ok(()),
        Ok(Some(found)) => Err(refuse(found)),
        // A header that points beyond the end, or beyond what a file can have.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput
            ) =>
        {
            Err(refuse("cut short"))
        }
        Err(source) => Err(ImageError::Read {
            what: "kernel",
            path: path.into(),
            source,
        }),
    }
}

/// Checks that `path` is a bzImage that firmware can start: setup header and EFI entry
/// (Documentation/arch/x86/boot.rst, efi-stub.rst).
///
/// # Errors
/// [`ImageError`], saying what the file is instead.
pub fn check_bzimage(path: &Path) -> Result<(), ImageError> {
    let failed = |source| ImageError::Read {
        what: "kernel",
        path: path.into(),
        source,
    };
    let mut head = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(0x206).read_to_end(&mut head).map_err(failed)?;
    let found = match (head.get(0x202..), head.get(..2)) {
        (Some(b"HdrS"), Some(b"MZ")) => return Ok(()),
        (Some(b"HdrS"), _) => "a bzImage without an EFI entry",
        (_, Some(b"\x7fE")) => "ELF",
        _ => "something else",
    };
    Err(ImageError::Kind {
        what: "kernel",
        path: path.into(),
        found,
        expected: "a bzImage with an EFI entry (CONFIG_EFI_STUB), for firmware to start",
    })
}

/// Checks that `path` begins like an initramfs.
///
/// # Errors
/// [`ImageError`], saying what the file is instead.
pub fn check_initramfs(path: &Path) -> Result<(), ImageError> {
    let mut start = Vec::new();
    File::open(path)
        .and_then(|f| f.take(8).read_to_end(&mut start))
        .map_err(|source| ImageError::Read {
            what: "initramfs",
            path: path.into(),
            source,
        })?;
    if ARCHIVES.iter().any(|magic| start.starts_with(magic)) {
        return Ok(());
    }
    Err(ImageError::Kind {
        what: "initramfs",
        path: path.into(),
        found: if start.is_empty() {
            "empty"
        } else {
            "no archive"
        },
        expected: "a cpio archive (newc), as it is or compressed by gzip, zstd, lz4 or xz",
    })
}

/// `None` for a kernel that can be booted, else what the file is.
fn kernel_kind(path: &Path) -> io::Result<Option<&'static str>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(Some("not a file"));
    }
    let mut head = [0u8; 64];
    file.read_exact_at(&mut head, 0)?;
    let bzimage = {
        let mut magic = [0u8; 4];
        file.read_exact_at(&mut magic, 0x202).is_ok() && &magic == b"HdrS"
    };
    if &head[..4] != b"\x7fELF" {
        return Ok(Some(if bzimage { "a bzImage" } else { "not ELF" }));
    }
    let u16_at = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    if head[4..6] != CLASS_64_LSB || u16_at(18) != MACHINE_X86_64 {
        return Ok(Some("ELF for another machine"));
    }
    // elf(5): e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    let offset = u64_at(&head, 32);
    let (size, count) = (u16_at(54), u16_at(56).min(HEADERS_MAX));
    if size < 56 {
        return Ok(Some("ELF without program headers"));
    }
    for index in 0..u64::from(count) {
        let mut header = [0u8; 56];
        let at = offset.saturating_add(index * u64::from(size));
        file.read_exact_at(&mut header, at)?;
        // p_type at 0, p_offset at 8, p_filesz at 32.
        if u32_at(&header, 0) != TYPE_NOTE {
            continue;
        }
        let length = u64_at(&header, 32).min(NOTES_MAX);
        let mut notes = vec![0u8; usize::try_from(length).unwrap_or(0)];
        file.read_exact_at(&mut notes, u64_at(&header, 8))?;
        if has_pvh_note(&notes) {
            return Ok(None);
        }
    }
    Ok(Some("ELF without a PVH entry"))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// A note is name size, content size, type, name, content, the last two padded to 4 bytes.
fn has_pvh_note(mut notes: &[u8]) -> bool {
    while notes.len() >= 12 {
        let (name, content, kind) = (u32_at(notes, 0), u32_at(notes, 4), u32_at(notes, 8));
        notes = &notes[12..];
        if kind == PVH_TYPE && name == 4 && notes.starts_with(PVH_NAME) {
            return true;
        }
        let padded = |n: u32| (n as usize).next_multiple_of(4);
        let skip = padded(name).saturating_add(padded(content));
        notes = notes.get(skip..).unwrap_or(&[]);
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(notes: &[u8]) -> Vec<u8> {
        let mut elf = vec![0u8; 120];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[18] = 62;
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = 4;
        elf[72] = 120;
        elf[96..104].copy_from_slice(&(notes.len() as u64).to_le_bytes());
        elf.extend_from_slice(notes);
        elf
    }

    fn refused(bytes: &[u8]) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        check_kernel(file.path()).map_or_else(|e| e.to_string(), |()| "accepted".into())
    }

    #[test]
    fn wrong_kernels_are_named_for_what_they_are() {
        let mut bzimage = vec![0u8; 1024];
        bzimage[0x202..0x206].copy_from_slice(b"HdrS");
        let mut arm = kernel(b"");
        arm[18] = 183;
        let mut far = kernel(b"");
        far[39] = 0xff;
        let other_note = b"\x04\0\0\0\x04\0\0\0\x01\0\0\0GNU\0abcd";
        let hostile_note = b"\xff\xff\xff\xff\xff\xff\xff\xff\x12\0\0\0Xen\0";
        for (bytes, found) in [
            (&b""[..], "cut short"),
            (&[b'#'; 100], "not ELF"),
            (&bzimage, "a bzImage"),
            (&arm, "another machine"),
            (&kernel(b""), "without a PVH entry"),
            (&kernel(other_note), "without a PVH entry"),
            (&kernel(hostile_note), "without a PVH entry"),
            (&far, "cut short"),
        ] {
            let message = refused(bytes);
            assert!(message.contains(found), "{message}");
        }
        let good = b"\x04\0\0\0\x04\0\0\0\x01\0\0\0GNU\0abcd\x04\0\0\0\x08\0\0\0\x12\0\0\0Xen\0\0\0\0\x01\0\0\0\0";
        assert_eq!(refused(&kernel(good)), "accepted");
    }

    #[test]
    fn missing_files_and_wrong_archives_are_named() {
        let missing = check_kernel(Path::new("/nonexistent/vmlinux")).unwrap_err();
        assert_eq!(
            missing.to_string(),
            "The guest's kernel /nonexistent/vmlinux cannot be read"
        );
        assert!(check_kernel(Path::new("/")).is_err());
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(check_initramfs(file.path()).is_err());
        std::fs::write(file.path(), "#!/bin/sh").unwrap();
        assert!(check_initramfs(file.path()).is_err());
        std::fs::write(file.path(), "070701").unwrap();
        assert!(check_initramfs(file.path()).is_ok());
        assert!(check_initramfs(Path::new("/")).is_err());
    }
}
