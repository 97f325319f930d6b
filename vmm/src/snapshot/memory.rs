//! The guest's memory as a sparse file, and as memory again: mapped so that only what the guest writes
//! is copied, or copied into shared memory where another process works in it too.
#![expect(
    unsafe_code,
    reason = "mapping a file and seeking data in it have no safe interface"
)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use super::Error;

/// Read and looked at, at a time, bytes.
const CHUNK: usize = 1 << 20;
/// Left out of the file if all zero, bytes.
const PAGE: usize = 4096;

/// A range of guest memory; their content follows each other in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionState {
    /// Guest address.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// Where a memory lies.
pub(crate) fn regions(memory: &GuestMemoryMmap) -> Vec<RegionState> {
    (memory.iter())
        .map(|region| RegionState {
            start: region.start_addr().raw_value(),
            size: region.len(),
        })
        .collect()
}

/// Refuses regions that no machine can have had.
pub(super) fn check(regions: &[RegionState]) -> Result<(), String> {
    let mut end = 0;
    for region in regions {
        let whole = region.start.is_multiple_of(PAGE as u64)
            && region.size.is_multiple_of(PAGE as u64)
            && region.size > 0;
        let after = region.start.checked_add(region.size);
        match after {
            Some(after) if whole && region.start >= end => end = after,
            _ => return Err(format!("its memory cannot be: {region:x?}")),
        }
    }
    match regions.is_empty() {
        true => Err("it has no memory".into()),
        false => Ok(()),
    }
}

/// Writes all pages that are not zero.
pub(super) fn write(memory: &GuestMemoryMmap, file: &File) -> io::Result<()> {
    let mut base = 0;
    let mut chunk = vec![0; CHUNK];
    for region in memory.iter() {
        let mut at = 0;
        while at < region.len() {
            let count = (region.len() - at).min(CHUNK as u64) as usize;
            let chunk = &mut chunk[..count];
            (region.read_slice(chunk, MemoryRegionAddress(at))).map_err(io::Error::other)?;
            write_pages(chunk, file, base + at)?;
            at += count as u64;
        }
        base += region.len();
    }
    file.set_len(base)
}

/// Writes runs of pages that are not zero.
fn write_pages(chunk: &[u8], file: &File, offset: u64) -> io::Result<()> {
    let pages: Vec<&[u8]> = chunk.chunks(PAGE).collect();
    let zero = |page: &[u8]| page == &[0; PAGE][..page.len()];
    let mut at = 0;
    for run in pages.chunk_by(|a, b| zero(a) == zero(b)) {
        let length = run.iter().map(|page| page.len()).sum::<usize>();
        if !zero(run[0]) {
            file.write_all_at(&chunk[at..at + length], offset + at as u64)?;
        }
        at += length;
    }
    Ok(())
}

/// Fills fresh memory with what is in the file.
pub(crate) fn fill(memory: &GuestMemoryMmap, file: &File) -> Result<(), Error> {
    let failed = |e: io::Error| Error::Memory(format!("it cannot be read: {e}"));
    let mut base = 0;
    for region in memory.iter() {
        let end = base + region.len();
        let mut at = base;
        while let Some(start) = seek(file, at, libc::SEEK_DATA).map_err(failed)?
            && start < end
        {
            let hole = seek(file, start, libc::SEEK_HOLE).map_err(failed)?;
            let stop = hole.unwrap_or(end).min(end);
            (&*file).seek(SeekFrom::Start(start)).map_err(failed)?;
            let place = MemoryRegionAddress(start - base);
            let count = usize::try_from(stop - start).map_err(|e| failed(io::Error::other(e)))?;
            // Straight into the guest's memory.
            (region.read_exact_volatile_from(place, &mut &*file, count))
                .map_err(|e| Error::Memory(e.to_string()))?;
            at = stop;
        }
        base = end;
    }
    Ok(())
}

/// Maps the file so that the guest sees it, and what the guest writes is its own. Like all guest
/// memory it is the process's for good.
pub(crate) fn map(regions: &[RegionState], file: &File) -> Result<GuestMemoryMmap, Error> {
    let mut offset = 0;
    let mut mapped = Vec::new();
    for region in regions {
        mapped.push(map_region(*region, file, offset)?);
        offset += region.size;
    }
    GuestMemoryMmap::from_regions(mapped).map_err(|e| Error::Memory(e.to_string()))
}

fn map_region(region: RegionState, file: &File, offset: u64) -> Result<GuestRegionMmap, Error> {
    let failed = |e: &dyn std::fmt::Display| Error::Memory(e.to_string());
    let size = usize::try_from(region.size).map_err(|e| failed(&e))?;
    let offset = libc::off_t::try_from(offset).map_err(|e| failed(&e))?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses; the result is checked.
    let address = unsafe {
        let none = std::ptr::null_mut();
        libc::mmap(none, size, access, flags, file.as_raw_fd(), offset)
    };
    if address == libc::MAP_FAILED {
        return Err(failed(&io::Error::last_os_error()));
    }
    // SAFETY: the range was just mapped. The guest's memory is not for core files.
    unsafe { libc::madvise(address, size, libc::MADV_DONTDUMP) };
    // That a file is behind it concerns nobody: it is not shared with anyone.
    let builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(access)
        .with_mmap_flags(flags);
    // SAFETY: `size` bytes are mapped there, and nothing ever unmaps them.
    let mapping = unsafe { builder.with_raw_mmap_pointer(address.cast()) }.build();
    let mapping = mapping.map_err(|e| failed(&e))?;
    GuestRegionMmap::new(mapping, GuestAddress(region.start))
        .ok_or_else(|| Error::Memory(format!("{region:x?} ends beyond 2^64")))
}

/// The next data or hole from an offset on, if there is one.
fn seek(file: &File, from: u64, what: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off_t::try_from(from).map_err(io::Error::other)?;
    // SAFETY: no pointers are passed.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, what) };
    match u64::try_from(found) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            e if e.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            e => Err(e),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    /// Two regions with a hole between them, and something here and there.
    fn memory() -> GuestMemoryMmap {
        let high = GuestAddress(1 << 32);
        let memory =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 * MIB), (high, 4 * MIB)]).unwrap();
        for (at, value) in [(0, 1), (5000, 2), (8 * MIB as u64 - 1, 3), (high.0, 4)] {
            memory.write_obj::<u8>(value, GuestAddress(at)).unwrap();
        }
        memory
    }

    fn assert_same(a: &GuestMemoryMmap, b: &GuestMemoryMmap) {
        assert_eq!(regions(a), regions(b));
        for region in a.iter() {
            let (mut left, mut right) = (vec![0; region.len() as usize], vec![]);
            a.read_slice(&mut left, region.start_addr()).unwrap();
            right.resize(left.len(), 0);
            b.read_slice(&mut right, region.start_addr()).unwrap();
            assert!(left == right, "{:x}", region.start_addr().0);
        }
    }

    #[test]
    fn memory_comes_back_as_it_was_mapped_or_copied_and_takes_little_room() {
        use std::os::unix::fs::MetadataExt;
        let before = memory();
        let file = tempfile::tempfile().unwrap();
        write(&before, &file).unwrap();
        let found = file.metadata().unwrap();
        assert_eq!(found.len(), 12 * MIB as u64);
        assert!(
            found.blocks() * 512 <= 64 * 1024,
            "{} blocks",
            found.blocks()
        );
        assert_same(&before, &map(&regions(&before), &file).unwrap());
        let fresh: Vec<_> = (regions(&before).iter())
            .map(|region| (GuestAddress(region.start), region.size as usize))
            .collect();
        let fresh = GuestMemoryMmap::from_ranges(&fresh).unwrap();
        fill(&fresh, &file).unwrap();
        assert_same(&before, &fresh);
    }

    #[test]
    fn what_one_clone_writes_neither_the_file_nor_another_clone_sees() {
        let before = memory();
        let file = tempfile::tempfile().unwrap();
        write(&before, &file).unwrap();
        let (one, other) = (
            map(&regions(&before), &file).unwrap(),
            map(&regions(&before), &file).unwrap(),
        );
        one.write_obj(0xff_u8, GuestAddress(0)).unwrap();
        one.write_obj(0xff_u8, GuestAddress(MIB as u64)).unwrap();
        assert_same(&before, &other);
        assert_same(&before, &map(&regions(&before), &file).unwrap());
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        let region = |start, size| RegionState { start, size };
        assert!(check(&[region(0, 4096), region(4096, 4096)]).is_ok());
        for bad in [
            &[][..],
            &[region(0, 0)],
            &[region(1, 4096)],
            &[region(0, 4095)],
            &[region(0, 8192), region(4096, 4096)],
            &[region(u64::MAX - 4095, 8192)],
        ] {
            assert!(check(bad).is_err(), "{bad:x?}");
        }
    }
}
