//! Block device on a raw file or a block device of the host. Knows the queue and the device's
//! configuration; what a request says is `request`'s business, how it is done `disk`'s.
//!
//! Requests go through the host's page cache, one after the other; several reads at once where the thread has an
//! io_uring ([`prepare_thread`]) and the guest asks for several.
//!
//! Source: VIRTIO 1.2, section 5.2.

mod deep;
mod disk;
mod request;
mod uring;

use std::fs::File;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::GuestAddressSpace;

pub use self::uring::prepare_thread;

use self::disk::Disk;
use super::rings::Rings;
use super::{Activation, Device, Error, Saved, State, read_bytes};

/// Device type.
const KIND: u32 = 2;

// Features (5.2.3).
const SIZE_MAX: u32 = 1;
const SEG_MAX: u32 = 2;
const RO: u32 = 5;
const FLUSH: u32 = 9;
const DISCARD: u32 = 13;
const WRITE_ZEROES: u32 = 14;

/// Unit of addresses, bytes, whatever the disk's own are.
const SECTOR: u64 = 512;
/// Descriptors.
const QUEUE: u16 = 256;
/// Most pieces of a request's data: what a queue of this size can hold beside header and status.
const SEGMENTS: u32 = QUEUE as u32 - 2;
/// Longest piece, bytes. With [`SEGMENTS`] of them a request is below 16 MiB.
const SEGMENT: u32 = 64 * 1024;
/// Most sectors discarded at once.
const DISCARD_SECTORS: u32 = 1 << 22;
/// Most ranges of a discard.
const DISCARD_RANGES: u32 = 32;
/// Most sectors zeroed at once: where the disk cannot zero, they are written.
const ZERO_SECTORS: u32 = 1 << 15;

/// A disk of a guest.
pub struct Block {
    disk: Disk,
    rings: Option<Rings>,
}

impl Block {
    /// A disk of a raw file or block device, as large as that is now, less what does not fill a
    /// sector of 512 bytes. `serial`, 1 to 20 bytes, is by what the guest finds it.
    ///
    /// # Errors
    /// [`Error`]: neither file nor block device, smaller than a sector, or an unusable serial.
    pub fn new(file: File, readonly: bool, serial: &str) -> Result<Self, Error> {
        Ok(Self {
            disk: Disk::new(file, readonly, serial)?,
            rings: None,
        })
    }

    /// `struct virtio_blk_config` (5.2.4) up to `write_zeroes_may_unmap`.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |offset: usize, value: u32| {
            config[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        };
        let capacity = self.disk.sectors();
        put(0, capacity as u32);
        put(4, (capacity >> 32) as u32);
        put(8, SEGMENT);
        put(12, SEGMENTS);
        put(36, DISCARD_SECTORS);
        put(40, DISCARD_RANGES);
        put(44, 4096 / SECTOR as u32); // a page of the host is what can be freed
        put(48, ZERO_SECTORS);
        put(52, 1); // ranges
        put(56, 1); // a byte: may unmap
        config
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let writable = match self.disk.readonly() {
            true => 1 << RO,
            false => 1 << DISCARD | 1 << WRITE_ZEROES,
        };
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << SIZE_MAX
            | 1 << SEG_MAX
            | 1 << FLUSH
            | writable
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {} // nothing in it is writable

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let rings = Rings::new(KIND, self.queue_sizes().len(), activation)?;
        // A driver that cannot flush expects that what was written stays.
        self.disk.write_through(!rings.accepted(FLUSH));
        self.rings = Some(rings);
        Ok(())
    }

    fn reset(&mut self) {
        self.rings = None;
    }

    fn event(&mut self, token: u32) {
        let Some(rings) = &mut self.rings else {
            return;
        };
        let disk = &self.disk;
        let index = token as usize;
        uring::with_own(|uring| match uring {
            None => rings.serve(index, |chain| request::handle(disk, chain)),
            Some(uring) => {
                let (memory, interrupt) = (rings.memory.memory(), Arc::clone(&rings.interrupt));
                let tell = || interrupt.queue(token as u16); // a queue's index
                let turn = rings.ring(index);
                let turn = turn.map(|ring| deep::serve(ring, &memory, disk, uring, tell));
                if let Some(result) = turn {
                    rings.finish(index, result);
                }
            }
        });
    }

    fn save(&mut self) -> Result<Saved, Error> {
        Ok(Saved::stateless(KIND, self.rings.as_ref()))
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        state.expect_stateless(KIND)
    }
}
