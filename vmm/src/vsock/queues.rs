//! The device's virtqueues: takes the guest's packets out of its transmit queue and puts the
//! engine's into its receive queue. Knows rings and descriptors; not who kicks and who is signalled.
//!
//! Source: VIRTIO 1.2, sections 2.7 (split virtqueues) and 5.10 (socket device).

use virtio_queue::{DescriptorChain, Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::engine::Engine;
use super::packet::{HEADER_LEN, Header, MAX_PAYLOAD};
use crate::virtio::Buffers;

/// Index of the queue with packets for the guest (5.10.2).
pub const RX: usize = 0;
/// Index of the queue with packets of the guest.
pub const TX: usize = 1;
/// Queues of the device; the third one tells a guest that it was moved, which never happens.
pub const COUNT: usize = 3;
/// Largest queue, descriptors.
pub const MAX_SIZE: u16 = 256;

/// Chains handled in one call, so that a guest that never stops lets others have their turn.
const BUDGET: usize = 2 * MAX_SIZE as usize;

/// What the transport has to do now.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Tell the guest that packets for it have arrived.
    pub signal_rx: bool,
    /// Tell the guest that packets of it have been taken.
    pub signal_tx: bool,
    /// Call again without waiting for the guest.
    pub again: bool,
}

/// Moves packets both ways until there are none, or no room, or it has been long enough.
///
/// # Errors
/// The guest has broken a ring; it is of no use until the guest resets the device.
pub fn service(
    engine: &mut Engine,
    memory: &GuestMemoryMmap,
    rx: &mut Queue,
    tx: &mut Queue,
) -> Result<Outcome, QueueError> {
    let mut moved = Moved::default();
    let mut promised = false;
    let again = loop {
        let before = moved;
        take_packets(engine, memory, tx, &mut moved.taken)?;
        give_packets(engine, memory, rx, &mut moved.given)?;
        if moved.taken.max(moved.given) >= BUDGET {
            break true;
        }
        if moved != before {
            promised = false;
            continue;
        }
        if promised {
            return Err(QueueError::InvalidAvailRingIndex); // more is claimed, none is there
        }
        // Nothing moved: go to sleep, unless the guest has added something just before it was
        // asked to say so.
        let more_tx = engine.accepts_packets() && tx.enable_notification(memory)?;
        let more_rx = engine.has_output() && rx.enable_notification(memory)?;
        if !more_tx && !more_rx {
            break false;
        }
        promised = true;
    };
    Ok(Outcome {
        signal_rx: moved.given > 0 && rx.needs_notification(memory)?,
        signal_tx: moved.taken > 0 && tx.needs_notification(memory)?,
        again,
    })
}

/// Takes what the guest has sent, for the last time: it will not look at the queue again.
///
/// # Errors
/// As [`service`].
pub fn drain(
    engine: &mut Engine,
    memory: &GuestMemoryMmap,
    tx: &mut Queue,
) -> Result<(), QueueError> {
    take_packets(engine, memory, tx, &mut 0)
}

#[derive(Default, Clone, Copy, PartialEq, Eq)]
struct Moved {
    taken: usize,
    given: usize,
}

fn take_packets(
    engine: &mut Engine,
    memory: &GuestMemoryMmap,
    tx: &mut Queue,
    taken: &mut usize,
) -> Result<(), QueueError> {
    let mut left = BUDGET;
    while left > 0 && engine.accepts_packets() {
        let Some(chain) = tx.iter(memory)?.next() else {
            break;
        };
        let head = chain.head_index();
        if let Some(mut packet) = buffers(memory, chain, false)
            && let Some(header) = take_header(&mut packet)
        {
            packet.truncate(header.len.min(MAX_PAYLOAD) as usize);
            engine.receive(&header, &packet);
        }
        tx.add_used(memory, head, 0)?;
        *taken += 1;
        left -= 1;
    }
    Ok(())
}

fn give_packets(
    engine: &mut Engine,
    memory: &GuestMemoryMmap,
    rx: &mut Queue,
    given: &mut usize,
) -> Result<(), QueueError> {
    let mut left = BUDGET;
    while left > 0 && engine.has_output() {
        let mut chains = rx.iter(memory)?;
        let Some(chain) = chains.next() else {
            break;
        };
        let head = chain.head_index();
        let mut used = 0;
        if let Some(mut space) = buffers(memory, chain, true)
            && space.len() > HEADER_LEN
        {
            let header_space = space.split_front(HEADER_LEN);
            let Some(header) = engine.next_packet(&space) else {
                chains.go_to_previous_position();
                break;
            };
            header_space.write(&header.encode());
            used = HEADER_LEN as u32 + header.len;
        }
        rx.add_used(memory, head, used)?;
        *given += 1;
        left -= 1;
    }
    Ok(())
}

/// The memory of a chain. `None` when part of it is not memory, of the wrong kind, or in too many
/// pieces.
fn buffers<'a>(
    memory: &'a GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    writable: bool,
) -> Option<Buffers<'a>> {
    let mut buffers = Buffers::default();
    for descriptor in chain {
        if descriptor.is_write_only() != writable {
            return None;
        }
        // A transmitted packet ends where its longest payload does.
        if buffers.len() >= HEADER_LEN + MAX_PAYLOAD as usize {
            break;
        }
        if !buffers.push_guest(memory, descriptor.addr(), descriptor.len() as usize) {
            return None;
        }
    }
    Some(buffers)
}

fn take_header(packet: &mut Buffers<'_>) -> Option<Header> {
    let mut raw = [0; HEADER_LEN];
    let front = packet.split_front(HEADER_LEN);
    (front.read(&mut raw) == HEADER_LEN).then(|| Header::decode(&raw))
}
