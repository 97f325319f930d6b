//! Entropy device: what the guest asks for comes from the host's generator.
//!
//! Source: VIRTIO 1.2, section 5.4.

use std::fs::File;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::rings::Rings;
use super::{Activation, Device, Error, Saved, State, io};

/// Device type.
const KIND: u32 = 4;
/// Bytes given for one request; a guest that wants more asks again.
const MOST: usize = 4096;

/// Entropy for one guest.
pub struct Rng {
    source: File,
    rings: Option<Rings>,
}

impl Rng {
    /// A device that reads the host's `/dev/urandom`, which is opened now.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn new() -> Result<Self, Error> {
        let source = File::open("/dev/urandom").map_err(|source| Error::Resource {
            what: "open /dev/urandom",
            source,
        })?;
        Ok(Self {
            source,
            rings: None,
        })
    }
}

impl Device for Rng {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0); // there is none
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        self.rings = Some(Rings::new(KIND, self.queue_sizes().len(), activation)?);
        Ok(())
    }

    fn reset(&mut self) {
        self.rings = None;
    }

    fn event(&mut self, token: u32) {
        let Some(rings) = &mut self.rings else {
            return;
        };
        let source = &self.source;
        rings.serve(token as usize, |mut chain| {
            chain.writable.truncate(MOST);
            // Nothing was written when it fails, and that is what the guest is told.
            io::read(source, &chain.writable).unwrap_or(0) as u32
        });
    }

    fn save(&mut self) -> Result<Saved, Error> {
        Ok(Saved::stateless(KIND, self.rings.as_ref()))
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        state.expect_stateless(KIND)
    }
}
