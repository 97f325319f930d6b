//! What stands in a slot, in words: for whoever looks for the reason why a guest does not go on. What lies
//! in guest memory is the guest's word, and only told.

use std::fmt::Write;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Transport, lock};

impl Transport {
    /// One line, none for an empty slot: the device's type and status, and of each queue in use what its
    /// driver has made available and its device has used. Call it while nothing runs.
    #[must_use]
    pub fn describe(&self) -> Option<String> {
        let device = self.device()?;
        let mut line = format!(
            "device of type {}, status {:#x}, features {:#x}",
            lock(device).kind(),
            self.status,
            self.driver_features & !(1 << VIRTIO_F_VERSION_1),
        );
        if self.line.config_change() != 0 {
            line += ", change of configuration not seen";
        }
        let events = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let memory = self.memory.memory();
        for (index, (queue, kick)) in self.queues.iter().zip(&self.kicks).enumerate() {
            let _ = write!(line, "; queue {index}: ");
            match queue.ready() {
                true => line += &describe(queue, &memory, events),
                false => line += "not set up",
            }
            if is_signalled(kick) {
                line += ", kicked";
            }
        }
        Some(line)
    }
}

/// The indices of a queue, and from where on each side wants to be told (or its flags: 1 is not at all).
fn describe(queue: &Queue, memory: &GuestMemoryMmap, events: bool) -> String {
    let size = u64::from(queue.size());
    let word = |base: u64, offset: u64| {
        let at = base.checked_add(offset).map(GuestAddress);
        let word = at.and_then(|at| memory.read_obj::<u16>(at).ok());
        word.map_or("?".into(), |word| u16::from_le(word).to_string())
    };
    // VIRTIO 1.2, 2.7.6 and 2.7.8: flags, index, ring, event.
    let (available, used) = (queue.avail_ring(), queue.used_ring());
    let (what, driver, device) = match events {
        true => ("from", 4 + 2 * size, 4 + 8 * size),
        false => ("flags", 0, 0),
    };
    format!(
        "{} of {size} available ({what} {}), {} used ({what} {})",
        word(available, 2),
        word(used, device),
        word(used, 2),
        word(available, driver),
    )
}

/// Whether a kick waits for the device; it still does afterwards.
fn is_signalled(kick: &EventFd) -> bool {
    match kick.read() {
        Ok(count) => kick.write(count).is_ok(),
        Err(_) => false,
    }
}
