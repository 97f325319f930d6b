//! The guest's memory: private and anonymous, or a memfd where another process shares it. Mapped at
//! a multiple of 2 MiB and advised to take huge pages, so that a guest's page faults are few.

#![expect(
    unsafe_code,
    reason = "memory that is mapped elsewhere has no safe interface"
)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::Error;
use super::layout::HOLE;
use crate::huge;
use crate::memfd::memfd;

/// Memory of `bytes`, a multiple of 1 MiB, around the hole below 4 GiB. It is the process's for good:
/// a VMM has one guest in its life.
pub(super) fn create(bytes: u64, shared: bool) -> Result<GuestMemoryMmap, Error> {
    let file = shared
        .then(|| memfd(c"guest", bytes).map(Arc::new))
        .transpose();
    let file = file.map_err(Error::io("make shared memory"))?;
    let low = bytes.min(HOLE.start);
    let mut regions = vec![region(0, low, file.as_ref(), 0)?];
    if bytes > low {
        regions.push(region(HOLE.end, bytes - low, file.as_ref(), low)?);
    }
    GuestMemoryMmap::from_regions(regions)
        .map_err(|e| Error::Memory(format!("its regions do not fit together: {e}")))
}

fn region(
    guest: u64,
    bytes: u64,
    file: Option<&Arc<File>>,
    offset: u64,
) -> Result<GuestRegionMmap, Error> {
    let size = usize::try_from(bytes)
        .map_err(|_| Error::Memory(format!("{bytes} bytes do not fit into a process")))?;
    let mapped = huge::map(size, file.map(|f| (f.as_raw_fd(), offset)));
    let address = mapped.map_err(Error::io("map the guest's memory"))?;
    let mut builder = MmapRegionBuilder::new(size)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE);
    if let Some(file) = file {
        builder = builder.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    }
    // SAFETY: `huge::map` has just mapped `size` bytes there, and nothing ever unmaps them.
    let mapping = unsafe { builder.with_raw_mmap_pointer(address.cast()) }.build();
    let mapping = mapping.map_err(|e| Error::Memory(e.to_string()))?;
    GuestRegionMmap::new(mapping, GuestAddress(guest))
        .ok_or_else(|| Error::Memory(format!("{bytes:#x} bytes at {guest:#x} end beyond 2^64")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Address, Bytes, GuestMemoryBackend, GuestMemoryRegion};

    #[test]
    fn memory_lies_around_the_hole_and_at_multiples_of_a_huge_page() {
        for shared in [false, true] {
            let memory = create(5 << 30, shared).unwrap();
            let found: Vec<_> = memory
                .iter()
                .map(|r| (r.start_addr().raw_value(), r.len()))
                .collect();
            assert_eq!(found, [(0, 3 << 30), (4 << 30, 2 << 30)]);
            for region in memory.iter() {
                assert_eq!(region.as_ptr().addr() % huge::SIZE, 0);
                assert_eq!(region.file_offset().is_some(), shared);
                let last = region.last_addr();
                memory.write_obj(7_u8, last).unwrap();
                assert_eq!(memory.read_obj::<u8>(last).unwrap(), 7);
            }
        }
    }
}
