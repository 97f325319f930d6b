//! Puts kernel, initramfs, command line and tables into the guest's memory, as PVH boot wants them
//! (Xen's `docs/misc/pvh.markdown`, Linux' `arch/x86/platform/pvh`).

use std::fs::File;
use std::io::{Seek, SeekFrom};

use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};

use super::layout::{
    CMDLINE, CMDLINE_MAX, HIGH_START, HOLE, LOW_END, MEMORY_MAP, MODULES, MP_TABLE, START_INFO,
};
use super::{Error, mptable};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 has a memory map.
const VERSION: u32 = 1;
/// Memory, in the map: its type, and 32 bits that are reserved.
const RAM: u64 = 1;
/// The initramfs begins at a page.
const PAGE: u64 = 4096;

/// What a guest boots.
#[derive(Debug)]
pub struct Boot {
    /// ELF with a PVH entry.
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
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(Error::Kernel("it has no PVH entry".into()));
    };
    let module = match boot.initramfs.as_mut() {
        Some(file) => Some(load_initramfs(memory, file, loaded.kernel_end)?),
        None => None,
    };
    write_cmdline(memory, cmdline)?;
    put(memory, MP_TABLE, &mptable::build(vcpus))?;
    write_start_info(memory, module)?;
    Ok(entry.raw_value())
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

/// Writes `struct hvm_start_info`, its module and its memory map
/// (`include/xen/interface/hvm/start_info.h`; 56, 32 and 24 bytes).
fn write_start_info(memory: &GuestMemoryMmap, module: Option<Module>) -> Result<(), Error> {
    let mut ram = vec![(0, LOW_END)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value();
        ram.push((start.max(HIGH_START), start + region.len()));
    }
    let mut map = Vec::new();
    for (start, end) in &ram {
        map.extend([*start, end - start, RAM].map(u64::to_le_bytes).concat());
    }
    let modules = u32::from(module.is_some());
    let mut info = [MAGIC, VERSION, 0, modules].map(u32::to_le_bytes).concat();
    let no_acpi = 0;
    let places = [MODULES, CMDLINE, no_acpi, MEMORY_MAP];
    info.extend(places.map(u64::to_le_bytes).concat());
    info.extend([ram.len() as u32, 0].map(u32::to_le_bytes).concat());
    put(memory, START_INFO, &info)?;
    if let Some(Module { start, size }) = module {
        let no_cmdline = 0;
        let entry = [start, size, no_cmdline, 0].map(u64::to_le_bytes).concat();
        put(memory, MODULES, &entry)?;
    }
    put(memory, MEMORY_MAP, &map)
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
