//! Memory in huge pages: mapped at a multiple of one, and advised to take them.
#![expect(
    unsafe_code,
    reason = "mapping and advising memory has no safe interface"
)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// A huge page of x86-64, bytes.
pub(crate) const SIZE: usize = 2 << 20;

/// Maps `size` bytes at a multiple of [`SIZE`], of a file from an offset or of nothing.
pub(crate) fn map(size: usize, file: Option<(i32, u64)>) -> io::Result<*mut c_void> {
    let reserved = size
        .checked_add(SIZE)
        .ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
    let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses; the result is checked.
    let start = unsafe {
        let none = std::ptr::null_mut();
        libc::mmap(none, reserved, libc::PROT_NONE, anonymous, -1, 0)
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let skip = start.addr().next_multiple_of(SIZE) - start.addr();
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let (flags, fd, offset) = match file {
        Some((fd, offset)) => (libc::MAP_SHARED | libc::MAP_NORESERVE, fd, offset),
        None => (anonymous, -1, 0),
    };
    let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: the fixed address and `size` bytes after it lie within what was just reserved, which
    // nobody else knows of; the rest of that is given back.
    unsafe {
        let address = start.byte_add(skip);
        let mapped = libc::mmap(address, size, access, flags | libc::MAP_FIXED, fd, offset);
        if mapped == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        if skip > 0 {
            libc::munmap(start, skip);
        }
        let page = size.next_multiple_of(4096);
        libc::munmap(address.byte_add(page), reserved - skip - page);
        // Advice; without huge pages the guest runs too.
        libc::madvise(address, size, libc::MADV_HUGEPAGE);
        // The guest's memory is not for core files.
        libc::madvise(address, size, libc::MADV_DONTDUMP);
        Ok(address)
    }
}

/// Has the kernel put the parts of a file that is memory itself (a tmpfs) into huge pages, each part a multiple of
/// [`SIZE`] long and at one: whoever maps the file gets them. Linux has this since 6.1; elsewhere, and where no huge page is
/// free, the file stays as it is.
pub(crate) fn collapse(file: &File, size: u64, parts: &[Range<u64>]) -> io::Result<()> {
    let size = usize::try_from(size).map_err(io::Error::other)?;
    if parts.iter().any(|part| part.end > size as u64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mapped = map(size, Some((file.as_raw_fd(), 0)))?;
    for part in parts {
        let (start, length) = (part.start as usize, (part.end - part.start) as usize);
        // SAFETY: within what was just mapped; its content stays.
        unsafe { libc::madvise(mapped.byte_add(start), length, libc::MADV_COLLAPSE) };
    }
    // SAFETY: mapped above, and nobody else knows of it.
    unsafe { libc::munmap(mapped, size.next_multiple_of(4096)) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use super::*;
    use crate::memfd::memfd;

    /// Of the mapping at an address, what is mapped in huge pages of a file in memory, KiB.
    fn huge_kib(address: *mut c_void) -> u64 {
        let head = format!("{:x}-", address.addr());
        let all = fs::read_to_string("/proc/self/smaps").unwrap();
        let lines = all.lines().skip_while(|line| !line.starts_with(&head));
        let mut found = lines.skip_while(|line| !line.starts_with("ShmemPmdMapped:"));
        let found = found.next().unwrap().split_whitespace().nth(1).unwrap();
        found.parse().unwrap()
    }

    /// Whether this kernel puts files into huge pages when it is asked.
    fn kernel_collapses() -> bool {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(['.', '-']).map(|n| n.parse::<u32>());
        let mut next = || numbers.next().unwrap().unwrap();
        (next(), next()) >= (6, 1) && Path::new("/sys/kernel/mm/transparent_hugepage").exists()
    }

    #[test]
    fn a_file_in_memory_is_put_into_huge_pages_and_stays_what_it_was() {
        let (size, huge) = (2 * SIZE as u64, SIZE as u64);
        let one = std::slice::from_ref;
        let file = memfd(c"test", size).unwrap();
        let pages = (0..size / 4096).map(|page| page as u8);
        let content: Vec<u8> = pages.flat_map(|page| [page; 4096]).collect();
        file.write_all_at(&content, 0).unwrap();

        collapse(&file, size, one(&(huge..size))).unwrap();
        let mapped = map(2 * SIZE, Some((file.as_raw_fd(), 0))).unwrap();
        // SAFETY: just mapped, that long, and nobody writes.
        let found = unsafe { std::slice::from_raw_parts(mapped.cast::<u8>(), 2 * SIZE) };
        assert!(found == content);
        if kernel_collapses() {
            assert_eq!(huge_kib(mapped), 2048);
        } else {
            eprintln!("SKIPPED in part: this kernel puts no file into huge pages");
        }
        // SAFETY: as above; not used any more.
        unsafe { libc::munmap(mapped, 2 * SIZE) };

        let beyond = collapse(&file, size, one(&(huge..size + huge))).unwrap_err();
        assert_eq!(beyond.kind(), io::ErrorKind::InvalidInput);
    }
}
