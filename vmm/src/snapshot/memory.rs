//! The guest's memory as a sparse file, and as memory again: mapped so that only what the guest writes
//! is copied.
#![expect(
    unsafe_code,
    reason = "mapping a file and seeking data in it have no safe interface"
)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use vm_memory::{
    Address, Bytes, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
    VolatileSlice,
};

use super::Error;
use crate::huge;

/// Read and looked at, at a time, bytes.
const CHUNK: usize = 1 << 20;
/// Left out of the file if all zero, bytes.
const PAGE: usize = 4096;
/// Shortest hole that is left unmapped, bytes: there can be as many as the kernel has room for mappings.
const GAP: u64 = 64 << 10;

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

/// Writes all pages that are not zero, and has the kernel keep what is whole in huge pages.
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
    file.set_len(base)?;
    // A clone gets its kernel's code by a few page faults then, and all clones the same pages.
    huge::collapse(file, base, &whole_blocks(file, base)?)
}

/// The huge pages of a file that will be mapped as a whole: holes so short that they are mapped too count as data.
fn whole_blocks(file: &File, end: u64) -> io::Result<Vec<Range<u64>>> {
    let huge = huge::SIZE as u64;
    let blocks = extents(file, 0, end)?.into_iter().map(|data| {
        let start = data.start.next_multiple_of(huge);
        start..data.end - data.end % huge
    });
    Ok(blocks.filter(|block| block.start < block.end).collect())
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

/// Maps what is in the file into fresh private memory: the guest sees it, and what it writes is its own.
/// Where the file has nothing the memory stays as it is, so that the file never grows by what guests
/// look at.
pub(crate) fn map(memory: &GuestMemoryMmap, file: &File) -> Result<(), Error> {
    let failed = |e: io::Error| Error::Memory(format!("it cannot be mapped: {e}"));
    let mut base = 0;
    for region in memory.iter() {
        let end = base + region.len();
        for data in extents(file, base, end).map_err(failed)? {
            let place = MemoryRegionAddress(data.start - base);
            let length = usize::try_from(data.end - data.start);
            let length = length.map_err(|e| failed(io::Error::other(e)))?;
            let place = region.get_slice(place, length);
            let place = place.map_err(|e| failed(io::Error::other(e)))?;
            map_over(&place, file, data.start).map_err(failed)?;
        }
        base = end;
    }
    Ok(())
}

/// Gives the guest copies of its own of these pages, runs of (first, count) of the file, before it writes to them: it
/// need not be stopped then, neither to see them nor to write.
pub(crate) fn copy(memory: &GuestMemoryMmap, pages: &[(u64, u64)]) -> Result<(), Error> {
    for &(first, count) in pages {
        let place = place(memory, first, count);
        let place = place.ok_or_else(|| {
            Error::Memory(format!("it has no {count} pages from page {first} on"))
        })?;
        let guard = place.ptr_guard_mut();
        // SAFETY: memory of the guest, whose content stays. Linux before 5.14 does not know this advice, and where
        // there is no memory left the guest's writes say so.
        unsafe {
            libc::madvise(
                guard.as_ptr().cast(),
                place.len(),
                libc::MADV_POPULATE_WRITE,
            );
        }
    }
    Ok(())
}

/// Where these pages of the file are; they are in one region.
fn place(memory: &GuestMemoryMmap, first: u64, count: u64) -> Option<VolatileSlice<'_>> {
    let page = PAGE as u64;
    let mut start = first.checked_mul(page)?;
    let length = usize::try_from(count.checked_mul(page)?).ok()?;
    for region in memory.iter() {
        if start < region.len() {
            return region.get_slice(MemoryRegionAddress(start), length).ok();
        }
        start -= region.len();
    }
    None
}

/// Maps a part of the file over a piece of fresh memory.
fn map_over(place: &VolatileSlice<'_>, file: &File, offset: u64) -> io::Result<()> {
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED;
    let (guard, size) = (place.ptr_guard_mut(), place.len());
    // SAFETY: the piece is memory of the guest, mapped for as long as the process lives, in which nobody
    // has anything yet; it is whole pages, because the offset and the length are.
    let address = unsafe {
        let address = guard.as_ptr().cast();
        libc::mmap(address, size, access, flags, file.as_raw_fd(), offset)
    };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the range was just mapped. The guest's memory is not for core files.
    unsafe { libc::madvise(address, size, libc::MADV_DONTDUMP) };
    Ok(())
}

/// Where a part of the file has data; holes that are not worth a mapping of their own are taken for it.
fn extents(file: &File, from: u64, end: u64) -> io::Result<Vec<Range<u64>>> {
    let mut extents: Vec<Range<u64>> = Vec::new();
    let mut at = from;
    while let Some(start) = seek(file, at, libc::SEEK_DATA)?
        && start < end
    {
        let hole = seek(file, start, libc::SEEK_HOLE)?.unwrap_or(end);
        at = hole.next_multiple_of(PAGE as u64).min(end);
        let start = start - start % PAGE as u64;
        match extents.last_mut() {
            Some(last) if start - last.end < GAP => last.end = at,
            _ => extents.push(start..at),
        }
    }
    Ok(extents)
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
    use std::os::unix::fs::MetadataExt;
    use vm_memory::GuestAddress;

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

    /// Memory that goes on from a file.
    fn mapped(like: &GuestMemoryMmap, file: &File) -> GuestMemoryMmap {
        let ranges: Vec<_> = (regions(like).iter())
            .map(|region| (GuestAddress(region.start), region.size as usize))
            .collect();
        let fresh = GuestMemoryMmap::from_ranges(&ranges).unwrap();
        map(&fresh, file).unwrap();
        fresh
    }

    #[test]
    fn memory_comes_back_as_it_was_and_takes_little_room() {
        let before = memory();
        let file = tempfile::tempfile().unwrap();
        write(&before, &file).unwrap();
        assert_eq!(file.metadata().unwrap().len(), 12 * MIB as u64);
        let blocks = |file: &File| file.metadata().unwrap().blocks();
        let written = blocks(&file);
        assert!(written * 512 <= 64 * 1024, "{written} blocks");
        // Looking at all of it, and writing to all of it, leaves the file as it is but for short holes.
        let after = mapped(&before, &file);
        assert_same(&before, &after);
        for region in after.iter() {
            let whole = vec![0x5a; region.len() as usize];
            after.write_slice(&whole, region.start_addr()).unwrap();
        }
        assert!(blocks(&file) * 512 <= 128 * 1024, "{}", blocks(&file));
        assert_same(&before, &mapped(&before, &file));
    }

    #[test]
    fn short_holes_are_mapped_with_what_is_around_them_and_long_ones_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        for at in [0, GAP, 3 * GAP, 1 << 20, (4 << 20) - 1] {
            file.write_all_at(&[1], at).unwrap();
        }
        let page = PAGE as u64;
        let expected = [
            0..GAP + page,
            3 * GAP..3 * GAP + page,
            1 << 20..(1 << 20) + page,
            (4 << 20) - page..4 << 20,
        ];
        assert_eq!(extents(&file, 0, 4 << 20).unwrap(), expected);
        let one = std::slice::from_ref;
        let part = extents(&file, page, 3 * GAP).unwrap();
        assert_eq!(part, one(&(GAP..GAP + page)));
        assert_eq!(extents(&file, 2 << 20, 3 << 20).unwrap(), []);
    }

    #[test]
    fn what_one_clone_writes_neither_the_file_nor_another_clone_sees() {
        let before = memory();
        let file = tempfile::tempfile().unwrap();
        write(&before, &file).unwrap();
        let (one, other) = (mapped(&before, &file), mapped(&before, &file));
        one.write_obj(0xff_u8, GuestAddress(0)).unwrap();
        one.write_obj(0xff_u8, GuestAddress(MIB as u64)).unwrap();
        assert_same(&before, &other);
        assert_same(&before, &mapped(&before, &file));
    }

    #[test]
    fn pages_that_will_be_written_to_are_copied_before_and_no_others() {
        let before = memory();
        let file = tempfile::tempfile().unwrap();
        write(&before, &file).unwrap();
        let after = mapped(&before, &file);
        // Page 1 is in the first region, the other one the first of the second.
        let high = (8 * MIB / PAGE) as u64;
        copy(&after, &[(1, 1), (high, 1)]).unwrap();
        assert_same(&before, &after);
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let own = |address: u64| {
            let host = after.get_host_address(GuestAddress(address)).unwrap();
            let mut entry = [0; 8];
            let at = (host.addr() / PAGE * entry.len()) as u64;
            pagemap.read_exact_at(&mut entry, at).unwrap();
            // Present, and not a page of a file (pagemap.rst).
            u64::from_ne_bytes(entry) & (1 << 63 | 1 << 61) == 1 << 63
        };
        assert_eq!([0, 5000, 1 << 32].map(own), [false, true, true]);
        for wrong in [
            (0, 2049),
            (high - 1, 2),
            (high + 1024, 1),
            (1, u64::MAX),
            (u64::MAX, 1),
        ] {
            let refused = copy(&after, &[wrong]).unwrap_err().to_string();
            assert!(refused.contains("pages from page"), "{refused}");
        }
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
