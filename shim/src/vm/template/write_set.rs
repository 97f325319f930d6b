//! Which pages of a template's memory VMs from it make their own by writing to them until their container runs, as
//! the kernel knows it of the VMM's process.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{major, minor};
use serde::{Deserialize, Serialize};

/// Bytes of a page of x86-64, and of its entry in a pagemap.
const PAGE: u64 = 4096;
const ENTRY: usize = 8;
/// Of an entry (the kernel's admin-guide/mm/pagemap.rst): the page is there; it is a file's, or shared.
const PRESENT: u64 = 1 << 63;
const OF_A_FILE: u64 = 1 << 61;
/// Most pages that are kept: a VMM can write to what it likes, and those after it pay for it.
const PAGES_MAX: usize = 4096;
/// So many VMs are looked at; what not all of them wrote to the next ones would pay for in vain.
const VMS: u32 = 2;
/// Entries read at a time.
const CHUNK: u64 = 8192;

/// What is known of it.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WriteSet {
    /// How many were looked at.
    vms: u32,
    /// What all of these wrote to: pages of the memory's file, in order.
    pages: Vec<u64>,
}

impl WriteSet {
    /// Whether another VM is to be looked at.
    pub(super) fn is_open(&self) -> bool {
        self.vms < VMS
    }

    /// The same, after one more VM that wrote to these, in order.
    pub(super) fn and(mut self, mut written: Vec<u64>) -> Self {
        if self.vms == 0 {
            written.truncate(PAGES_MAX);
            self.pages = written;
        } else {
            self.pages
                .retain(|page| written.binary_search(page).is_ok());
        }
        self.vms += 1;
        self
    }

    /// The pages, once they are known, as runs of pages that follow each other: (first, count).
    pub(super) fn runs(&self) -> Vec<(u64, u64)> {
        if self.is_open() {
            return Vec::new();
        }
        let runs = self.pages.chunk_by(|a, b| a.checked_add(1) == Some(*b));
        runs.map(|run| (run[0], run.len() as u64)).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len()
    }
}

/// The pages of `memory` that the process has mapped, and written to, in order.
///
/// # Errors
/// The kernel does not say, because the process has ended or this one may not ask; it has mapped more than there is.
pub(super) fn of(pid: u32, memory: &File) -> io::Result<Vec<u64>> {
    let file = memory.metadata()?;
    let length = file.len() / PAGE;
    let device = format!("{:02x}:{:02x}", major(file.dev()), minor(file.dev()));
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut found = Vec::new();
    let mut left = length;
    for line in maps.lines() {
        let Some(mapping) = Mapping::parse(line, &device, file.ino()) else {
            continue;
        };
        // A clone maps each part once; one that does not could keep this busy without end.
        left = (left.checked_sub(mapping.pages))
            .ok_or_else(|| io::Error::other("it maps parts of the memory twice"))?;
        mapping.written(&pagemap, &mut found)?;
    }
    if left == length {
        // It is about to end, say.
        return Err(io::Error::other("it maps nothing of the memory"));
    }
    found.retain(|page| *page < length);
    found.sort_unstable();
    Ok(found)
}

/// A part of a file in a process, in pages.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: u64,
    pages: u64,
    offset: u64,
}

impl Mapping {
    /// That of a line of `/proc/PID/maps` (proc_pid_maps(5)), if it is one of this file.
    fn parse(line: &str, device: &str, inode: u64) -> Option<Self> {
        let words: Vec<&str> = line.split_ascii_whitespace().take(5).collect();
        let [range, _, offset, of, number] = words[..] else {
            return None;
        };
        if of != device || number.parse() != Ok(inode) {
            return None;
        }
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let (start, end) = range.split_once('-')?;
        let (start, end) = (hex(start)?, hex(end)?);
        Some(Self {
            start: start / PAGE,
            pages: end.checked_sub(start)? / PAGE,
            offset: hex(offset)? / PAGE,
        })
    }

    /// Adds those of its pages that are not the file's any more.
    fn written(&self, pagemap: &File, found: &mut Vec<u64>) -> io::Result<()> {
        let mut entries = [0; CHUNK as usize * ENTRY];
        for begin in (0..self.pages).step_by(CHUNK as usize) {
            let count = CHUNK.min(self.pages - begin) as usize;
            let entries = &mut entries[..count * ENTRY];
            pagemap.read_exact_at(entries, (self.start + begin) * ENTRY as u64)?;
            for (page, entry) in (self.offset + begin..).zip(entries.as_chunks::<ENTRY>().0) {
                if u64::from_ne_bytes(*entry) & (PRESENT | OF_A_FILE) == PRESENT {
                    found.push(page);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[expect(unsafe_code, reason = "memory is mapped")]
mod tests {
    use std::os::fd::AsRawFd;
    use std::ptr::null_mut;

    use super::*;

    #[test]
    fn a_line_of_another_file_or_none_at_all_is_no_mapping() {
        let line = "7f0000002000-7f0000005000 rw-p 00003000 00:1f 1234   /memory (deleted)";
        let mapping = Mapping::parse(line, "00:1f", 1234).unwrap();
        let expected = Mapping {
            start: 0x7_f000_0002,
            pages: 3,
            offset: 3,
        };
        assert_eq!(mapping, expected);
        assert_eq!(Mapping::parse(line, "00:20", 1234), None);
        assert_eq!(Mapping::parse(line, "00:1f", 123), None);
        for bad in [
            "",
            "7f-",
            "5000-2000 rw-p 0 00:1f 1234",
            "x-y rw-p 0 00:1f 1234",
        ] {
            assert_eq!(Mapping::parse(bad, "00:1f", 1234), None, "{bad}");
        }
    }

    #[test]
    fn what_two_vms_wrote_to_is_kept_as_runs_of_pages() {
        let one = WriteSet::default().and(vec![1, 2, 3, 5, 9, 10]);
        assert!(one.is_open() && one.runs().is_empty());
        let both = one.and(vec![0, 2, 3, 9, 10, 11]);
        assert!(!both.is_open());
        assert_eq!(both.runs(), [(2, 2), (9, 2)]);
        let all: Vec<u64> = (0..100_000).collect();
        let all = WriteSet::default().and(all.clone()).and(all);
        assert_eq!(all.runs(), [(0, PAGES_MAX as u64)]);
        assert_eq!(WriteSet::default().and(vec![]).and(vec![1]).runs(), []);
    }

    #[test]
    fn what_a_process_has_written_to_is_found_and_what_it_has_only_read_is_not() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.write_all_at(&[7; 64 * PAGE as usize], 0).unwrap();
        let map = || {
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let (size, fd) = (63 * 4096, file.as_raw_fd());
            // SAFETY: a new mapping where the kernel likes, of a file that nobody cuts; it is for nobody else, and not
            // unmapped before the process ends.
            unsafe {
                let all = libc::mmap(null_mut(), size, both, libc::MAP_PRIVATE, fd, 4096);
                assert_ne!(all, libc::MAP_FAILED);
                std::slice::from_raw_parts_mut(all.cast::<u8>(), size)
            }
        };
        let all = map();
        assert!(all.iter().all(|byte| *byte == 7));
        for page in [0, 1, 40] {
            all[page * 4096 + 5] = 1;
        }
        let of_this = || of(std::process::id(), &file);
        assert_eq!(of_this().unwrap(), [1, 2, 41]);
        let other = tempfile::tempfile_in("/dev/shm").unwrap();
        other.set_len(PAGE).unwrap();
        assert!(of(std::process::id(), &other).is_err());
        map();
        assert!(of_this().unwrap_err().to_string().contains("twice"));
    }
}
