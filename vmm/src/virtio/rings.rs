//! The queues of a device whose driver is up: takes chains out, gives them back, decides when the
//! guest is told. Knows rings and descriptors; not what is in a chain.
//!
//! Everything in a ring is the guest's word. A chain that is not memory, or in too many pieces, is
//! given back empty. A ring that contradicts itself is not looked at again until the driver resets
//! the device.
//!
//! Source: VIRTIO 1.2, section 2.7 (split virtqueues).

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use tracing::warn;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::buffers::Buffers;
use super::{Activation, Error, Interrupt, Memory, QueueState, Watch};
use crate::log;

/// Chains handled for one event, so that a guest that never stops lets others have their turn.
pub(super) const BUDGET: usize = 256;

/// What a guest made available at once: what it wrote, and room for what it wants to read.
pub(super) struct Chain<'a> {
    /// Names the chain when it is given back.
    pub(super) head: u16,
    pub(super) readable: Buffers<'a>,
    pub(super) writable: Buffers<'a>,
}

impl<'a> Chain<'a> {
    /// A chain with no memory stands for one that is malformed.
    fn new(memory: &'a GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Self {
        let head = chain.head_index();
        let (mut readable, mut writable) = (Buffers::default(), Buffers::default());
        for descriptor in chain {
            let buffers = match descriptor.is_write_only() {
                true => &mut writable,
                false => &mut readable,
            };
            if !buffers.push_guest(memory, descriptor.addr(), descriptor.len() as usize) {
                return Self {
                    head,
                    readable: Buffers::default(),
                    writable: Buffers::default(),
                };
            }
        }
        Self {
            head,
            readable,
            writable,
        }
    }
}

/// One queue.
pub(super) struct Ring {
    pub(super) queue: Queue,
    kick: EventFd,
    /// Where the used ring stood when the guest was last told, or need not have been.
    told: u16,
    broken: bool,
}

impl Ring {
    /// The next chain, if there is one.
    pub(super) fn take<'a>(
        &mut self,
        memory: &'a GuestMemoryMmap,
    ) -> Result<Option<Chain<'a>>, QueueError> {
        let next = self.queue.iter(memory)?.next();
        Ok(next.map(|chain| Chain::new(memory, chain)))
    }

    /// Puts the last `count` chains back that were taken.
    pub(super) fn untake(&mut self, count: u16) {
        let position = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(position);
    }

    /// Gives chains back, each with the number of bytes written to it; the driver sees all of them
    /// or none.
    pub(super) fn give(
        &mut self,
        memory: &GuestMemoryMmap,
        chains: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some(((head, length), before)) = chains.split_last() else {
            return Ok(());
        };
        // The library moves the index with every chain: all but the last are written by hand.
        let first = self.queue.next_used();
        for (n, (head, length)) in before.iter().enumerate() {
            let slot = first.wrapping_add(n as u16) % self.queue.size();
            let at = GuestAddress(self.queue.used_ring())
                .checked_add(4 + u64::from(slot) * 8)
                .ok_or(QueueError::AddressOverflow)?;
            let element = [u32::from(*head).to_le_bytes(), length.to_le_bytes()].concat();
            (memory.write_slice(&element, at)).map_err(QueueError::GuestMemory)?;
        }
        (self.queue).set_next_used(first.wrapping_add(before.len() as u16));
        self.queue.add_used(memory, *head, *length)
    }

    /// Asks the guest to kick when it adds a chain. Returns whether it has done so meanwhile.
    pub(super) fn ask(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        self.queue.enable_notification(memory)
    }

    /// Whether the guest wants to be told about the chains given back since it was last asked.
    pub(super) fn must_tell(&mut self, memory: &GuestMemoryMmap) -> Result<bool, QueueError> {
        let now = self.queue.next_used();
        let before = std::mem::replace(&mut self.told, now);
        if now == before {
            return Ok(false);
        }
        fence(Ordering::SeqCst); // the driver sees the index before we look at what it wants
        let available = GuestAddress(self.queue.avail_ring());
        let load = |offset: u64| -> Result<u16, QueueError> {
            let at = (available.checked_add(offset)).ok_or(QueueError::AddressOverflow)?;
            let value = memory.load(at, Ordering::Relaxed);
            value.map(u16::from_le).map_err(QueueError::GuestMemory)
        };
        if self.queue.event_idx_enabled() {
            let event = load(4 + 2 * u64::from(self.queue.size()))?;
            return Ok(passed(event, before, now));
        }
        Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Has the device's event come again, as if the guest had kicked.
    pub(super) fn kick(&self) {
        let _ = self.kick.write(1); // fails only when it is signalled already
    }

    /// Hands chains to `handle`, which returns how many bytes it wrote, until there are none or it
    /// has been long enough. Returns whether there may be more.
    pub(super) fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        mut handle: impl FnMut(Chain<'_>) -> u32,
    ) -> Result<bool, QueueError> {
        let mut left = BUDGET;
        let mut promised = false;
        while left > 0 {
            if let Some(chain) = self.take(memory)? {
                let head = chain.head;
                let length = handle(chain);
                self.give(memory, &[(head, length)])?;
                (left, promised) = (left - 1, false);
            } else if promised {
                return Err(QueueError::InvalidAvailRingIndex); // more is claimed, none is there
            } else if self.ask(memory)? {
                promised = true;
            } else {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether an index that moved from `before` to `now` passed `event` (section 2.7.10): the guest is
/// to be told when entry `event` was used.
fn passed(event: u16, before: u16, now: u16) -> bool {
    let (event, before, now) = (Wrapping(event), Wrapping(before), Wrapping(now));
    now - event - Wrapping(1) < now - before
}

/// All queues of an active device, with everything around them.
pub(super) struct Rings {
    pub(super) memory: Memory,
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) watch: Watch,
    rings: Vec<Ring>,
    kind: u32,
}

impl Rings {
    /// Checks and watches the queues; kicks come as events with the queue's index as their token.
    ///
    /// # Errors
    /// [`Error`]: not the device's queues, a queue outside of memory, or the kernel refuses.
    pub(super) fn new(kind: u32, count: usize, activation: Activation) -> Result<Self, Error> {
        let found = activation.queues.len();
        if found != count {
            let expected = count;
            return Err(Error::Queues { expected, found });
        }
        let memory = activation.memory.memory();
        let event_idx = activation.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut rings = Vec::with_capacity(count);
        for (index, (mut queue, kick)) in activation.queues.into_iter().enumerate() {
            if queue.ready() && (queue.size() == 0 || !queue.is_valid(&*memory)) {
                return Err(Error::Queue(index));
            }
            queue.set_event_idx(event_idx);
            rings.push(Ring {
                told: queue.next_used(),
                queue,
                kick,
                broken: false,
            });
        }
        let all = Self {
            memory: activation.memory,
            features: activation.features,
            interrupt: activation.interrupt,
            watch: activation.watch,
            rings,
            kind,
        };
        // From here on a failure undoes what was watched before.
        for (index, ring) in all
            .rings
            .iter()
            .enumerate()
            .filter(|(_, r)| r.queue.ready())
        {
            // Edge-triggered: nobody has to read what is only a signal.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let watched = all.watch.add(&ring.kick, index as u32, events);
            watched.map_err(|source| Error::Resource {
                what: "watch a queue",
                source,
            })?;
            if ring.queue.next_used() != 0 || ring.queue.next_avail() != 0 {
                // Taken over from another process: a kick or an interrupt may have been lost there.
                ring.kick();
                all.interrupt.queue(index as u16);
            }
        }
        Ok(all)
    }

    /// Whether the driver accepted this feature bit.
    pub(super) fn accepted(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// A queue that the driver has set up and not broken.
    pub(super) fn ring(&mut self, index: usize) -> Option<&mut Ring> {
        let ring = self.rings.get_mut(index)?;
        (ring.queue.ready() && !ring.broken).then_some(ring)
    }

    /// Two such queues at once.
    pub(super) fn pair(&mut self, first: usize) -> Option<[&mut Ring; 2]> {
        let pair = self.rings.get_mut(first..)?.first_chunk_mut::<2>()?;
        let usable = pair.iter().all(|ring| ring.queue.ready() && !ring.broken);
        usable.then(|| pair.each_mut())
    }

    /// Handles the chains of a queue; `handle` returns how many bytes it wrote.
    pub(super) fn serve(&mut self, index: usize, handle: impl FnMut(Chain<'_>) -> u32) {
        let memory = self.memory.memory();
        let Some(ring) = self.ring(index) else {
            return;
        };
        let result = ring.serve(&memory, handle);
        self.finish(index, result);
    }

    /// Ends a turn at a queue: tells the guest if it wants that, comes back when there is more, and
    /// gives the queue up when the guest has broken it.
    pub(super) fn finish(&mut self, index: usize, result: Result<bool, QueueError>) {
        let memory = self.memory.memory();
        let Some(ring) = self.ring(index) else {
            return;
        };
        let result = result.and_then(|again| Ok((again, ring.must_tell(&memory)?)));
        match result {
            Ok((again, tell)) => {
                if again {
                    ring.kick();
                }
                if tell {
                    self.interrupt.queue(index as u16);
                }
            }
            Err(e) => {
                ring.broken = true;
                complain(self.kind, index, &e);
            }
        }
    }

    /// The queues as they are written down.
    pub(super) fn states(&self) -> Vec<QueueState> {
        (self.rings.iter())
            .map(|ring| QueueState::from(&ring.queue))
            .collect()
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        for ring in &self.rings {
            self.watch.remove(&ring.kick);
        }
    }
}

/// Logs that a queue is of no use any more.
fn complain(kind: u32, queue: usize, fault: &QueueError) {
    if log::worth_telling() {
        warn!(
            kind,
            queue, "The guest's driver has broken a virtqueue, which stops: {fault}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_told_exactly_when_the_entry_it_named_was_used() {
        // Every move of up to 300 entries from some places, also across the end of the numbers.
        for before in [0_u16, 1, 255, 32_768, 65_280, 65_535] {
            for count in 0..300_u16 {
                let now = before.wrapping_add(count);
                let used: Vec<u16> = (0..count).map(|n| before.wrapping_add(n)).collect();
                let events = (0..320_u16).map(|n| before.wrapping_sub(10).wrapping_add(n));
                for event in events {
                    let expected = used.contains(&event);
                    assert_eq!(
                        passed(event, before, now),
                        expected,
                        "{event} {before} {now}"
                    );
                }
            }
        }
    }
}
