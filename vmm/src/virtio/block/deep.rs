//! Several reads of a queue at once: what a disk that can do more than one thing at a time needs. A write only goes to
//! the host's page cache: no other could overtake it there, and to have somebody else do it costs more than to do it. All
//! have ended when a turn has, so that a disk that is paused, saved or taken out has nothing under way.

use virtio_queue::Error as QueueError;
use vm_memory::GuestMemoryMmap;

use super::disk::Disk;
use super::request::{self, Asked, Transfer};
use super::uring::{DEPTH, Uring};
use crate::virtio::rings::{BUDGET, Ring};

/// A read that the kernel works on.
struct Flight<'a> {
    head: u16,
    transfer: Transfer<'a>,
    /// What the kernel was told of the transfer's memory.
    _pieces: Vec<libc::iovec>,
}

/// Those under way, by their numbers.
#[derive(Default)]
struct Flights<'a> {
    all: Vec<Option<Flight<'a>>>,
    count: usize,
}

/// Handles chains until there are none or it has been long enough, as [`Ring::serve`] does; `tell` lets the guest know of those
/// given back before others have ended.
pub(super) fn serve(
    ring: &mut Ring,
    memory: &GuestMemoryMmap,
    disk: &Disk,
    uring: &mut Uring,
    tell: impl Fn(),
) -> Result<bool, QueueError> {
    let mut flights = Flights::default();
    let result = flights.serve(ring, memory, disk, uring, tell);
    // A ring that is broken gets no answers; the kernel has to be done with its memory all the same.
    while flights.count > 0 {
        flights.land(disk, uring);
    }
    result
}

impl<'a> Flights<'a> {
    fn serve(
        &mut self,
        ring: &mut Ring,
        memory: &'a GuestMemoryMmap,
        disk: &Disk,
        uring: &mut Uring,
        tell: impl Fn(),
    ) -> Result<bool, QueueError> {
        let mut left = BUDGET;
        let mut promised = false;
        loop {
            let before = left;
            let mut waiting = Vec::new();
            while left > 0
                && self.count + waiting.len() < DEPTH
                && let Some(chain) = ring.take(memory)?
            {
                (left, promised) = (left - 1, false);
                let head = chain.head;
                match request::ask(disk, chain) {
                    Asked::Done(length) => ring.give(memory, &[(head, length)])?,
                    Asked::Transfer(transfer) if transfer.is_write() => {
                        ring.give(memory, &[(head, transfer.perform(disk))])?;
                    }
                    Asked::Transfer(transfer) => waiting.push((head, transfer)),
                }
            }
            let alone = self.count == 0 && waiting.len() == 1;
            for (head, transfer) in waiting {
                let done = match alone {
                    true => Some(transfer.perform(disk)),
                    false => self.launch(head, transfer, disk, uring),
                };
                if let Some(length) = done {
                    ring.give(memory, &[(head, length)])?;
                }
            }
            if self.count > 0 {
                ring.give(memory, &self.land(disk, uring))?;
                if ring.must_tell(memory)? {
                    tell();
                }
            } else if left == 0 {
                return Ok(true);
            } else if left == before {
                if promised {
                    return Err(QueueError::InvalidAvailRingIndex); // more is claimed, none is there
                }
                if !ring.ask(memory)? {
                    return Ok(false);
                }
                promised = true;
            }
        }
    }

    /// Has the kernel do a read; it begins with the next [`Flights::land`]. One for which the kernel has no room is done at
    /// once: then so many bytes count as written.
    #[expect(unsafe_code, reason = "the kernel gets addresses of guest memory")]
    fn launch(
        &mut self,
        head: u16,
        transfer: Transfer<'a>,
        disk: &Disk,
        uring: &mut Uring,
    ) -> Option<u32> {
        let number = match self.all.iter().position(Option::is_none) {
            Some(free) => free,
            None => {
                self.all.push(None);
                self.all.len() - 1
            }
        };
        let data = transfer.data();
        let pieces = data.iovecs(0, data.len());
        // SAFETY: the pieces and the memory (volatile slices) are the flight's, which is kept until its number has
        // come back: `serve` does not return before, and `land` ends the process rather than forget one.
        let added = unsafe { uring.add(disk.file(), &pieces, transfer.offset(), number) };
        if !added {
            return Some(transfer.perform(disk));
        }
        self.all[number] = Some(Flight {
            head,
            transfer,
            _pieces: pieces,
        });
        self.count += 1;
        None
    }

    /// Waits until some have ended. Returns their chains, with how many bytes count as written.
    fn land(&mut self, disk: &Disk, uring: &mut Uring) -> Vec<(u16, u32)> {
        let ended = uring.wait().unwrap_or_else(|e| {
            // The last words of the VMM, which the shim tells.
            eprintln!("sealpod-vmm: The kernel does not say what became of a disk's requests: {e}");
            std::process::abort()
        });
        let mut given = Vec::with_capacity(ended.len());
        for (number, moved) in ended {
            if let Some(flight) = self.all.get_mut(number).and_then(Option::take) {
                self.count -= 1;
                given.push((flight.head, flight.transfer.finish(disk, moved)));
            }
        }
        given
    }
}
