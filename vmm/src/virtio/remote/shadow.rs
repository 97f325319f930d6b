//! A queue in a [window](super::window) that stands for one of the guest's: this side is its driver, a daemon
//! its device. What a chain says is copied in, and what the daemon wrote is copied out, so that it never
//! sees the guest's memory. Each chain has two descriptors there, whatever it has in the guest.
//!
//! Nothing that the daemon says is taken for granted: it can answer what it was asked, once, with no
//! more than there is room for.
//!
//! Source: VIRTIO 1.2, section 2.7 (split virtqueues), the driver's side.

use std::num::Wrapping;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap};

use super::Error;
use crate::virtio::buffers::{Buffers, MAX_PIECES};

/// Rings and data begin at multiples of this, bytes.
const PAGE: u64 = 4096;
/// Data of a chain begins at a multiple of this, bytes.
const LINE: u64 = 64;

/// Ranges of guest memory, in order.
type Pieces = Vec<(GuestAddress, usize)>;

/// A chain of the guest's, as addresses: the guest has it back when the daemon has answered.
pub(super) struct Request {
    head: u16,
    said: Pieces,
    room: Pieces,
}

impl Request {
    /// What a chain consists of; nothing where it is not all memory, or in too many pieces.
    pub(super) fn new(
        guest: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Option<Self> {
        let head = chain.head_index();
        let (mut said, mut room) = (Pieces::new(), Pieces::new());
        for descriptor in chain {
            let pieces = match descriptor.is_write_only() {
                true => &mut room,
                false => &mut said,
            };
            let piece = (descriptor.addr(), descriptor.len() as usize);
            if pieces.len() == MAX_PIECES || !guest.check_range(piece.0, piece.1) {
                return None;
            }
            pieces.push(piece);
        }
        Some(Self { head, said, room })
    }
}

/// Why a request cannot be passed on.
pub(super) enum Refused {
    /// There will be room when the daemon has answered others.
    Later,
    /// It is empty, or larger than the queue's room.
    Never,
}

/// A request that the daemon has.
struct Flight {
    head: u16,
    place: RangeInclusive,
    /// Where in the window the daemon writes, and where that goes.
    answer: GuestAddress,
    room: usize,
    to: Pieces,
}

/// What a daemon said that cannot be.
#[derive(Debug, thiserror::Error)]
pub(super) enum Lie {
    #[error("it answers request {0}, which it does not have")]
    NotAsked(u32),
    #[error("it says that it wrote {0} bytes where there is room for {1}")]
    TooLong(u32, usize),
    #[error("its queue is not in the window: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// See the file's head.
pub(super) struct Shadow {
    queue: Queue,
    space: AddressAllocator,
    /// Bytes for data.
    capacity: u64,
    /// By slot: the descriptors of slot `n` are `2 * n` and the one after.
    flights: Vec<Option<Flight>>,
    idle: Vec<u16>,
    available: Wrapping<u16>,
    used: Wrapping<u16>,
}

impl Shadow {
    /// An empty queue for so many requests, a power of two, with so many bytes for their data, from `at` on in
    /// the window. Returns it with where it ends.
    pub(super) fn new(
        window: &GuestMemoryMmap,
        at: u64,
        slots: u16,
        capacity: u64,
    ) -> Result<(Self, u64), Error> {
        let senseless = || Error::Configuration("a queue does not fit into its window".into());
        let size = slots * 2;
        let descriptors = at.next_multiple_of(PAGE);
        let available = (descriptors + u64::from(size) * 16).next_multiple_of(PAGE);
        let used = (available + 6 + u64::from(size) * 2).next_multiple_of(PAGE);
        let data = (used + 6 + u64::from(size) * 8).next_multiple_of(PAGE);
        let end = data + capacity;
        let mut queue = Queue::new(size).map_err(|_| senseless())?;
        (queue.try_set_desc_table_address(GuestAddress(descriptors))).map_err(|_| senseless())?;
        (queue.try_set_avail_ring_address(GuestAddress(available))).map_err(|_| senseless())?;
        (queue.try_set_used_ring_address(GuestAddress(used))).map_err(|_| senseless())?;
        queue.set_ready(true);
        // An earlier driver's may still stand there.
        let zeros = vec![0; (data - descriptors) as usize];
        (window.write_slice(&zeros, GuestAddress(descriptors))).map_err(|_| senseless())?;
        if !window.check_range(GuestAddress(data), capacity as usize) {
            return Err(senseless());
        }
        let shadow = Self {
            queue,
            space: AddressAllocator::new(data, capacity).map_err(|_| senseless())?,
            capacity,
            flights: (0..slots).map(|_| None).collect(),
            idle: (0..slots).rev().collect(),
            available: Wrapping(0),
            used: Wrapping(0),
        };
        Ok((shadow, end))
    }

    /// How many requests there have been, around the end of the numbers.
    pub(super) fn asked(&self) -> u16 {
        self.available.0
    }

    /// The queue as the daemon is told of it.
    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Copies a request into the window. The daemon sees it with [`Shadow::publish`].
    pub(super) fn offer(
        &mut self,
        window: &GuestMemoryMmap,
        guest: &GuestMemoryMmap,
        request: Request,
    ) -> Result<(), Refused> {
        let length = |pieces: &Pieces| pieces.iter().map(|piece| piece.1 as u64).sum::<u64>();
        let (said, room) = (length(&request.said), length(&request.room));
        if said + room == 0 || said + room > self.capacity {
            return Err(Refused::Never);
        }
        let slot = *self.idle.last().ok_or(Refused::Later)?;
        let size = (said + room).next_multiple_of(LINE);
        let place = (self.space.allocate(size, LINE, AllocPolicy::FirstMatch))
            .map_err(|_| Refused::Later)?;
        let (question, answer) = (place.start(), place.start() + said);
        let first = slot * 2;
        let mut descriptors = Vec::with_capacity(2);
        if said > 0 {
            let next = if room > 0 { VRING_DESC_F_NEXT } else { 0 };
            descriptors.push(Descriptor::new(
                question,
                said as u32,
                next as u16,
                first + 1,
            ));
        }
        if room > 0 {
            let flags = VRING_DESC_F_WRITE as u16;
            descriptors.push(Descriptor::new(answer, room as u32, flags, 0));
        }
        let written = copy_in(guest, &request.said, window, question)
            .and_then(|()| self.write(window, first, &descriptors).ok());
        if written.is_none() {
            let _ = self.space.free(&place); // it was just taken
            return Err(Refused::Never);
        }
        self.idle.pop();
        self.available += 1;
        self.flights[usize::from(slot)] = Some(Flight {
            head: request.head,
            place,
            answer: GuestAddress(answer),
            room: room as usize,
            to: request.room,
        });
        Ok(())
    }

    /// Writes a request's descriptors and its entry in the available ring.
    fn write(
        &self,
        window: &GuestMemoryMmap,
        first: u16,
        descriptors: &[Descriptor],
    ) -> Result<(), GuestMemoryError> {
        for (n, descriptor) in descriptors.iter().enumerate() {
            let at = self.queue.desc_table() + (u64::from(first) + n as u64) * 16;
            window.write_obj(*descriptor, GuestAddress(at))?;
        }
        let entry = u64::from(self.available.0 % self.queue.size());
        let at = self.queue.avail_ring() + 4 + entry * 2;
        window.write_obj(first.to_le(), GuestAddress(at))
    }

    /// Shows the daemon what was offered. Returns whether it wants to be woken for it.
    pub(super) fn publish(&self, window: &GuestMemoryMmap) -> Result<bool, Lie> {
        let index = GuestAddress(self.queue.avail_ring() + 2);
        window.store(self.available.0.to_le(), index, Ordering::Release)?;
        fence(Ordering::SeqCst); // the daemon sees it before we look at what it wants
        let flags: u16 = window.load(GuestAddress(self.queue.used_ring()), Ordering::Relaxed)?;
        Ok(u32::from(u16::from_le(flags)) & VRING_USED_F_NO_NOTIFY == 0)
    }

    /// The next request that the daemon has answered: its head in the guest's queue, and how many
    /// bytes were written for it.
    pub(super) fn collect(
        &mut self,
        window: &GuestMemoryMmap,
        guest: &GuestMemoryMmap,
    ) -> Result<Option<(u16, u32)>, Lie> {
        let index = GuestAddress(self.queue.used_ring() + 2);
        let now: u16 = window.load(index, Ordering::Acquire)?;
        if Wrapping(u16::from_le(now)) == self.used {
            return Ok(None);
        }
        let entry = u64::from(self.used.0 % self.queue.size());
        let at = self.queue.used_ring() + 4 + entry * 8;
        let [id, length]: [u32; 2] = window.read_obj(GuestAddress(at))?;
        let (id, length) = (u32::from_le(id), u32::from_le(length));
        let slot = (id / 2) as usize;
        let asked = id.is_multiple_of(2);
        let flight = (self.flights.get_mut(slot)).filter(|flight| asked && flight.is_some());
        let flight = flight.and_then(Option::take).ok_or(Lie::NotAsked(id))?;
        if length as usize > flight.room {
            return Err(Lie::TooLong(length, flight.room));
        }
        copy_out(window, flight.answer, length as usize, guest, &flight.to);
        let _ = self.space.free(&flight.place); // what a flight has was taken
        self.idle.push(slot as u16);
        self.used += 1;
        Ok(Some((flight.head, length)))
    }
}

/// Copies pieces of the guest's memory into the window; none if they are not memory.
fn copy_in(
    guest: &GuestMemoryMmap,
    from: &Pieces,
    window: &GuestMemoryMmap,
    mut to: u64,
) -> Option<()> {
    for (address, length) in from {
        for piece in guest.get_slices(*address, *length) {
            let piece = piece.ok()?;
            let place = window.get_slice(GuestAddress(to), piece.len()).ok()?;
            piece.copy_to_volatile_slice(place);
            to += piece.len() as u64;
        }
    }
    Some(())
}

/// Copies so many bytes out of the window to where the guest has room for them.
fn copy_out(
    window: &GuestMemoryMmap,
    from: GuestAddress,
    length: usize,
    guest: &GuestMemoryMmap,
    to: &Pieces,
) {
    let mut room = Buffers::default();
    for (address, length) in to {
        room.push_guest(guest, *address, *length);
    }
    // The window is one piece.
    let Ok(mut answer) = window.get_slice(from, length) else {
        return;
    };
    for place in room.slices() {
        let Ok((piece, rest)) = answer.split_at(place.len().min(answer.len())) else {
            return; // cannot be: the cut is within the answer
        };
        piece.copy_to_volatile_slice(*place);
        answer = rest;
    }
}

#[cfg(test)]
mod tests;
