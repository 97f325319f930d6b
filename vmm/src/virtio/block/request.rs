//! One request of the guest: what it says, whether it may, and its status. Every number in it is the
//! guest's.
//!
//! Source: VIRTIO 1.2, section 5.2.6.

use std::io;

use super::disk::Disk;
use super::{DISCARD_RANGES, DISCARD_SECTORS, SECTOR, SEGMENT, SEGMENTS, ZERO_SECTORS};
use crate::virtio::Buffers;
use crate::virtio::rings::Chain;

// Types of requests.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

// Status.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

/// Bytes of a request's header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a range of a discard or zeroing: sector, number of sectors, flags.
const RANGE: usize = 16;
/// Flag of a zeroed range: its space may be freed. A discard has no flags.
const UNMAP: u32 = 1;
/// Bytes of an identification (5.2.6: padded with zeros, not terminated when full).
const ID: usize = 20;

/// Why a request was not done.
enum Refusal {
    /// It is not one that this disk knows.
    Unsupported,
    /// It is malformed, reaches beyond the disk, or the disk failed.
    Failed,
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

/// What a chain asks for.
pub(super) enum Asked<'a> {
    /// To move bytes between guest and disk, which can take its time.
    Transfer(Transfer<'a>),
    /// Something else, or nothing that can be. It is done; so many bytes of the chain count as written.
    Done(u32),
}

/// Where the guest is told what became of its request.
struct Status<'a> {
    place: Buffers<'a>,
    /// Bytes of the chain that count as written: up to the status, which is last, even where nothing came before it.
    length: u32,
}

impl Status<'_> {
    fn tell(self, result: Result<(), Refusal>) -> u32 {
        let code = match result {
            Ok(()) => OK,
            Err(Refusal::Failed) => IOERR,
            Err(Refusal::Unsupported) => UNSUPP,
        };
        self.place.write(&[code]);
        self.length
    }
}

/// A read or a write that is checked and not done.
pub(super) struct Transfer<'a> {
    write: bool,
    data: Buffers<'a>,
    offset: u64,
    status: Status<'a>,
}

impl<'a> Transfer<'a> {
    /// To the disk.
    pub(super) fn is_write(&self) -> bool {
        self.write
    }

    /// The guest's memory.
    pub(super) fn data(&self) -> &Buffers<'a> {
        &self.data
    }

    /// On the disk, bytes.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Does it; returns how many bytes of the chain count as written.
    pub(super) fn perform(self, disk: &Disk) -> u32 {
        self.finish(disk, Ok(0))
    }

    /// Does the rest of one of which the kernel has moved so many bytes.
    pub(super) fn finish(mut self, disk: &Disk, moved: io::Result<usize>) -> u32 {
        let moved = match moved {
            Err(e) if !matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {
                return self.status.tell(Err(e.into()));
            }
            moved => moved.unwrap_or(0),
        };
        self.data.split_front(moved);
        let offset = self.offset + moved as u64; // within the disk, as its end is
        let done = match self.write {
            true => disk.write(&self.data, offset),
            false => disk.read(&self.data, offset),
        };
        self.status.tell(done.map_err(Refusal::from))
    }
}

/// Does a request; returns how many bytes of the chain count as written.
pub(super) fn handle(disk: &Disk, chain: Chain<'_>) -> u32 {
    match ask(disk, chain) {
        Asked::Transfer(transfer) => transfer.perform(disk),
        Asked::Done(length) => length,
    }
}

/// Finds out what a chain asks for, and does it if it is no transfer.
pub(super) fn ask<'a>(disk: &Disk, mut chain: Chain<'a>) -> Asked<'a> {
    let length = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
    let place = chain.writable.split_back(1);
    if place.is_empty() {
        return Asked::Done(0); // nowhere to say what became of it: nothing does
    }
    let status = Status { place, length };
    let mut header = [0; HEADER];
    if chain.readable.split_front(HEADER).read(&mut header) != HEADER {
        return Asked::Done(status.tell(Err(Refusal::Failed)));
    }
    let (kind, sector) = (u32_at(&header, 0), u64_at(&header, 8));
    let (write, data) = match kind {
        IN => (false, chain.writable),
        OUT => (true, chain.readable),
        _ => {
            let result = perform(disk, kind, &chain.readable, &chain.writable);
            return Asked::Done(status.tell(result));
        }
    };
    let checked = match write && disk.readonly() {
        true => Err(Refusal::Failed),
        false => range(disk, sector, data.len()),
    };
    match checked {
        Ok(offset) => Asked::Transfer(Transfer {
            write,
            data,
            offset,
            status,
        }),
        Err(refusal) => Asked::Done(status.tell(Err(refusal))),
    }
}

/// Does what is no transfer.
fn perform(disk: &Disk, kind: u32, said: &Buffers<'_>, room: &Buffers<'_>) -> Result<(), Refusal> {
    match kind {
        FLUSH => disk.flush()?,
        GET_ID => {
            let mut id = [0; ID];
            id[..disk.serial().len()].copy_from_slice(disk.serial());
            room.write(&id);
        }
        DISCARD => {
            for (offset, length, flags) in ranges(disk, said, DISCARD_RANGES, DISCARD_SECTORS)? {
                if flags != 0 {
                    return Err(Refusal::Unsupported);
                }
                disk.discard(offset, length)?;
            }
        }
        WRITE_ZEROES => {
            for (offset, length, flags) in ranges(disk, said, 1, ZERO_SECTORS)? {
                if flags & !UNMAP != 0 {
                    return Err(Refusal::Unsupported);
                }
                disk.zero(offset, length, flags & UNMAP != 0)?;
            }
        }
        _ => return Err(Refusal::Unsupported),
    }
    Ok(())
}

/// Where `length` bytes from `sector` on begin, bytes, if that is whole sectors of the disk and not
/// more than a request may have.
fn range(disk: &Disk, sector: u64, length: usize) -> Result<u64, Refusal> {
    let length = length as u64;
    let sectors = length / SECTOR;
    let fits = (sector.checked_add(sectors)).is_some_and(|end| end <= disk.sectors());
    let most = u64::from(SEGMENTS) * u64::from(SEGMENT);
    if !fits || !length.is_multiple_of(SECTOR) || length > most {
        return Err(Refusal::Failed);
    }
    Ok(sector * SECTOR) // below the disk's length
}

/// The ranges of a discard or zeroing: offset, bytes, flags. All are checked before any is done.
fn ranges(
    disk: &Disk,
    said: &Buffers<'_>,
    most: u32,
    most_sectors: u32,
) -> Result<Vec<(u64, u64, u32)>, Refusal> {
    if disk.readonly() {
        return Err(Refusal::Failed);
    }
    if said.is_empty() || !said.len().is_multiple_of(RANGE) || said.len() / RANGE > most as usize {
        return Err(Refusal::Failed);
    }
    let mut raw = vec![0; said.len()];
    said.read(&mut raw);
    (raw.chunks_exact(RANGE))
        .map(|raw| {
            let (sector, count, flags) = (u64_at(raw, 0), u32_at(raw, 8), u32_at(raw, 12));
            let end = sector.checked_add(count.into());
            if count > most_sectors || end.is_none_or(|end| end > disk.sectors()) {
                return Err(Refusal::Failed);
            }
            Ok((sector * SECTOR, u64::from(count) * SECTOR, flags))
        })
        .collect()
}

fn u32_at(raw: &[u8], at: usize) -> u32 {
    raw[at..]
        .first_chunk()
        .map_or(0, |raw| u32::from_le_bytes(*raw))
}

fn u64_at(raw: &[u8], at: usize) -> u64 {
    raw[at..]
        .first_chunk()
        .map_or(0, |raw| u64::from_le_bytes(*raw))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers around which sums and products go wrong.
    fn edges(around: &[u64]) -> Vec<u64> {
        let mut edges = Vec::new();
        for at in around
            .iter()
            .chain(&[0, 1 << 31, 1 << 32, 1 << 55, 1 << 63])
        {
            edges.extend((0..3).flat_map(|n| [at.wrapping_add(n), at.wrapping_sub(n)]));
        }
        edges
    }

    fn disk(sectors: u64) -> Disk {
        let file = tempfile::tempfile().unwrap();
        file.set_len(sectors * SECTOR).unwrap();
        Disk::new(file, false, "d").unwrap()
    }

    #[test]
    fn a_range_is_whole_sectors_of_the_disk_or_refused_whatever_the_numbers() {
        let most = u64::from(SEGMENTS) * u64::from(SEGMENT);
        for sectors in [1, 7, 1 << 20] {
            let disk = disk(sectors);
            for sector in edges(&[sectors, u64::MAX / SECTOR]) {
                for length in edges(&[SECTOR, sectors * SECTOR, most]) {
                    // In numbers that no sum of these can leave.
                    let (from, count) = (u128::from(sector) * 512, u128::from(length));
                    let good = from + count <= u128::from(sectors) * 512
                        && count.is_multiple_of(512)
                        && count <= u128::from(most);
                    match range(&disk, sector, length as usize) {
                        Ok(offset) => assert!(good && u128::from(offset) == from),
                        Err(_) => assert!(!good, "{sector} {length} of {sectors}"),
                    }
                }
            }
        }
    }

    #[test]
    fn ranges_of_a_discard_lie_on_the_disk_or_all_are_refused_whatever_the_numbers() {
        let sectors = 1 << 10;
        let disk = disk(sectors);
        for sector in edges(&[sectors, u64::MAX / SECTOR]) {
            for count in edges(&[sectors, DISCARD_SECTORS.into()]) {
                let Ok(count) = u32::try_from(count) else {
                    continue;
                };
                let mut raw = [0; 2 * RANGE];
                raw[RANGE..RANGE + 8].copy_from_slice(&sector.to_le_bytes());
                raw[RANGE + 8..RANGE + 12].copy_from_slice(&count.to_le_bytes());
                let end = u128::from(sector) + u128::from(count);
                let good = end <= u128::from(sectors) && count <= DISCARD_SECTORS;
                let said = Buffers::from(&mut raw[..]);
                match ranges(&disk, &said, DISCARD_RANGES, DISCARD_SECTORS) {
                    Ok(found) => {
                        let expected = (sector * SECTOR, u64::from(count) * SECTOR, 0);
                        assert!(good && found == [(0, 0, 0), expected]);
                    }
                    Err(_) => assert!(!good, "{count} from {sector} on"),
                }
            }
        }
    }
}
