//! From the tap to the guest. A frame goes straight into the guest's buffers: enough of them for the
//! longest frame are taken from the ring first, and what was not needed is put back.

use std::collections::VecDeque;
use std::io;

use tracing::debug;
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryMmap;

use super::tap::{HEADER, Tap};
use crate::virtio::Buffers;
use crate::virtio::rings::{Chain, Ring};

/// Frames handed over in one turn.
const BUDGET: usize = 256;
/// Longest frame, with its header: 64 KiB of a segmented one, Ethernet and VLAN headers.
const LONGEST: usize = 65536 + 18 + HEADER;
/// Offset of `num_buffers` in the header (VIRTIO 1.2, 5.1.6).
const NUM_BUFFERS: usize = 10;

/// Why a turn ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The tap has no frame.
    NoFrame,
    /// The guest has no room; it kicks when it has.
    NoRoom,
    /// It has been long enough.
    Budget,
}

/// Moves frames until there are none, or no room, or it has been long enough. With `mergeable` a
/// frame may take several of the guest's buffers.
pub(super) fn receive(
    tap: &Tap,
    ring: &mut Ring,
    memory: &GuestMemoryMmap,
    mergeable: bool,
) -> Result<End, QueueError> {
    let mut parked = Parked::default();
    let result = parked.receive(tap, ring, memory, mergeable);
    ring.untake(parked.chains.len() as u16); // at most as many as the ring has
    result
}

/// The guest's buffers that are taken and not given back yet, in the ring's order.
#[derive(Default)]
struct Parked<'a> {
    chains: VecDeque<Chain<'a>>,
    /// In all of them.
    bytes: usize,
}

impl<'a> Parked<'a> {
    fn receive(
        &mut self,
        tap: &Tap,
        ring: &mut Ring,
        memory: &'a GuestMemoryMmap,
        mergeable: bool,
    ) -> Result<End, QueueError> {
        for _ in 0..BUDGET {
            if !self.fill(ring, memory, if mergeable { LONGEST } else { 1 })? {
                return Ok(End::NoRoom);
            }
            let room = self.room(mergeable);
            // A frame that does not fit is cut off by the kernel, which shows only here.
            let (mut spill, mut space) = ([0], room.clone());
            let _ = space.append(&Buffers::from(&mut spill[..]));
            match tap.read(&space) {
                Ok(length) if length <= room.len() => {
                    let used = self.use_up(length);
                    // The tap leaves this field alone.
                    room.write_at(NUM_BUFFERS, &(used.len() as u16).to_le_bytes());
                    ring.give(memory, &used)?;
                }
                // The guest's buffers are too short for this frame, or even for a header: it is lost.
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    if e.kind() != io::ErrorKind::WouldBlock {
                        debug!("A tap gives no frames: {e}"); // it is gone, or never was up
                    }
                    return Ok(End::NoFrame);
                }
            }
        }
        Ok(End::Budget)
    }

    /// Takes buffers of `wanted` bytes, or all that the ring can have. Returns whether that was
    /// possible; if not, the guest has been asked to kick.
    fn fill(
        &mut self,
        ring: &mut Ring,
        memory: &'a GuestMemoryMmap,
        wanted: usize,
    ) -> Result<bool, QueueError> {
        let mut promised = false;
        loop {
            self.drop_useless(ring, memory)?;
            if self.bytes >= wanted || self.chains.len() >= ring.queue.size().into() {
                return Ok(true);
            }
            if let Some(chain) = ring.take(memory)? {
                self.bytes += chain.writable.len();
                self.chains.push_back(chain);
                promised = false;
            } else if promised {
                return Err(QueueError::InvalidAvailRingIndex); // more is claimed, none is there
            } else if ring.ask(memory)? {
                promised = true;
            } else {
                return Ok(false);
            }
        }
    }

    /// Gives buffers back that cannot hold anything, once it is their turn.
    fn drop_useless(
        &mut self,
        ring: &mut Ring,
        memory: &GuestMemoryMmap,
    ) -> Result<(), QueueError> {
        while let Some(chain) = self.chains.front().filter(|c| c.writable.is_empty()) {
            ring.give(memory, &[(chain.head, 0)])?;
            self.chains.pop_front();
        }
        Ok(())
    }

    /// Where the next frame goes.
    fn room(&self, mergeable: bool) -> Buffers<'a> {
        let most = if mergeable { self.chains.len() } else { 1 };
        let mut room = Buffers::default();
        for chain in self.chains.iter().take(most) {
            if room.append(&chain.writable).is_err() {
                break;
            }
        }
        room
    }

    /// Takes out the buffers that a frame of `length` bytes has filled: head and bytes of each.
    fn use_up(&mut self, length: usize) -> Vec<(u16, u32)> {
        let mut left = length;
        let mut used = Vec::with_capacity(1);
        while left > 0
            && let Some(chain) = self.chains.pop_front()
        {
            let count = left.min(chain.writable.len());
            used.push((chain.head, count as u32)); // below 64 KiB and a bit
            self.bytes -= chain.writable.len();
            left -= count;
        }
        used
    }
}
