//! Puts kernel, initramfs, command line and tables into the guest's memory, as the 64-bit boot protocol
//! wants them (Linux' `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol"). Nothing of a processor.

use std::fs::File;
use std::io::{Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::elf::Elf;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::layout::{
    CMDLINE, CMDLINE_MAX, GDT, HIGH_START, HOLE, LOW_END, MAPPED, MP_TABLE, PAGE_TABLES, ZERO_PAGE,
};
use super::{Error, mptable};

/// `boot_flag` and `header` of a `struct setup_header` that is one, its version (2.15), and a loader
/// without a number of its own.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER: u32 = 0x5372_6448;
const PROTOCOL: u16 = 0x020f;
const OTHER_LOADER: u8 = 0xff;
/// Memory, in the memory map (`E820_TYPE_RAM`).
const RAM: u32 = 1;
/// The initramfs begins at a page.
const PAGE: u64 = 4096;

/// Descriptors where the protocol wants them: code at 0x10, data at 0x18, and a task's, which a
/// processor in protected mode has (Intel SDM 3, 3.4.5 and 8.2.3).
const DESCRIPTORS: [u64; 6] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
    0,
];
/// Size of [`DESCRIPTORS`], bytes.
pub(super) const GDT_SIZE: usize = size_of_val(&DESCRIPTORS);

/// Bits of an entry of a page table (Intel SDM 3, 4.5): present, writable; a page of 2 MiB.
const TABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const LARGE_SIZE: u64 = 2 << 20;

/// What a guest boots.
#[derive(Debug)]
pub struct Boot {
    /// ELF of an x86-64 Linux.
    pub kernel: File,
    /// A cpio archive.
    pub initramfs: Option<File>,
    /// The kernel's command line, without the words that name the devices.
    pub cmdline: String,
}

/// Where the initramfs lies.
#[derive(Debug, Clone, Copy)]
struct Module {
    start: u64,
    size: u64,
}

/// Fills the memory; returns the kernel's entry point.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    boot: &mut Boot,
    cmdline: &str,
    vcpus: u32,
) -> Result<u64, Error> {
    let loaded = Elf::load(
        memory,
        None,
        &mut boot.kernel,
        Some(GuestAddress(HIGH_START)),
    )
    .map_err(|e| Error::Kernel(e.to_string()))?;
    let (entry, end) = (loaded.kernel_load.raw_value(), loaded.kernel_end);
    if end > MAPPED || entry >= end {
        let why = format!("it enters at {entry:#x} and ends at {end:#x}, beyond {MAPPED:#x}");
        return Err(Error::Kernel(why));
    }
    let initramfs = match boot.initramfs.as_mut() {
        Some(file) => Some(load_initramfs(memory, file, end)?),
        None => None,
    };
    write_cmdline(memory, cmdline)?;
    put(memory, MP_TABLE, &mptable::build(vcpus))?;
    put(memory, GDT, &DESCRIPTORS.map(u64::to_le_bytes).concat())?;
    write_page_tables(memory)?;
    let params = params(memory, cmdline.len(), initramfs);
    let write = memory.write_obj(params, GuestAddress(ZERO_PAGE));
    write.map_err(|e| Error::Memory(format!("the zero page could not be written: {e}")))?;
    Ok(entry)
}

fn put(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), Error> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|e| {
            Error::Memory(format!(
                "{} bytes do not fit at {address:#x}: {e}",
                bytes.len()
            ))
        })
}

/// As high as it can be below the hole: the kernel is at the other end.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    file: &mut File,
    kernel_end: u64,
) -> Result<Module, Error> {
    let read = Error::io("read the initramfs");
    let size = file.seek(SeekFrom::End(0)).map_err(&read)?;
    file.rewind().map_err(&read)?;
    let end = memory
        .iter()
        .next()
        .map_or(0, |region| region.len())
        .min(HOLE.start);
    let start = end
        .checked_sub(size)
        .map(|start| start & !(PAGE - 1))
        .filter(|start| *start >= kernel_end.next_multiple_of(PAGE));
    let start = start.ok_or(Error::InitramfsTooLarge {
        size,
        kernel_end,
        end,
    })?;
    let count = usize::try_from(size).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(start), file, count)
        .map_err(|e| Error::Memory(format!("the initramfs could not be read: {e}")))?;
    Ok(Module { start, size })
}

fn write_cmdline(memory: &GuestMemoryMmap, cmdline: &str) -> Result<(), Error> {
    if cmdline.len() >= CMDLINE_MAX || cmdline.bytes().any(|b| b == 0) {
        return Err(Error::Cmdline(cmdline.len()));
    }
    put(memory, CMDLINE, cmdline.as_bytes())?;
    put(memory, CMDLINE + cmdline.len() as u64, &[0])
}

/// Maps the first GiB to itself, where everything lies that the kernel reads before it has tables of
/// its own.
fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), Error> {
    let [top, middle, bottom] = PAGE_TABLES;
    put(memory, top, &(middle | TABLE).to_le_bytes())?;
    put(memory, middle, &(bottom | TABLE).to_le_bytes())?;
    let pages = (0..MAPPED / LARGE_SIZE).map(|page| (page * LARGE_SIZE) | TABLE | LARGE);
    let entries: Vec<u8> = pages.flat_map(u64::to_le_bytes).collect();
    put(memory, bottom, &entries)
}

/// The zero page: where everything lies.
fn params(memory: &GuestMemoryMmap, cmdline: usize, initramfs: Option<Module>) -> boot_params {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER;
    params.hdr.version = PROTOCOL;
    params.hdr.type_of_loader = OTHER_LOADER;
    params.hdr.cmd_line_ptr = CMDLINE as u32;
    params.hdr.cmdline_size = cmdline as u32;
    if let Some(Module { start, size }) = initramfs {
        // Below the hole: 32 bits are enough.
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (start as u32, size as u32);
    }
    let regions = memory.iter().map(|region| {
        let start = region.start_addr().raw_value();
        (start.max(HIGH_START), start + region.len())
    });
    for (start, end) in std::iter::once((0, LOW_END)).chain(regions) {
        let entry = &mut params.e820_table[usize::from(params.e820_entries)];
        *entry = boot_e820_entry {
            addr: start,
            size: end - start,
            r#type: RAM,
        };
        params.e820_entries += 1;
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let memory = super::super::memory::create(16 << 20, false).unwrap();
        for bytes in [&b""[..], b"MZ", &[0x7f; 4096]] {
            let mut kernel = tempfile::tempfile().unwrap();
            kernel.write_all(bytes).unwrap();
            let mut boot = Boot {
                kernel,
                initramfs: None,
                cmdline: String::new(),
            };
            let error = load(&memory, &mut boot, "", 1).unwrap_err();
            assert!(matches!(error, Error::Kernel(_)), "{error}");
        }
    }

    #[test]
    fn an_initramfs_that_does_not_fit_beside_the_kernel_is_refused() {
        let memory = super::super::memory::create(16 << 20, false).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(6 << 20).unwrap();
        let module = load_initramfs(&memory, &mut file, 8 << 20).unwrap();
        assert_eq!((module.start, module.size), (10 << 20, 6 << 20));
        let error = load_initramfs(&memory, &mut file, 11 << 20).unwrap_err();
        assert!(matches!(error, Error::InitramfsTooLarge { .. }), "{error}");
    }

    #[test]
    fn a_command_line_that_the_kernel_would_cut_is_refused() {
        let memory = super::super::memory::create(16 << 20, false).unwrap();
        write_cmdline(&memory, &"x".repeat(CMDLINE_MAX - 1)).unwrap();
        for bad in [&"x".repeat(CMDLINE_MAX)[..], "a\0b"] {
            assert!(matches!(
                write_cmdline(&memory, bad),
                Err(Error::Cmdline(_))
            ));
        }
    }
}
