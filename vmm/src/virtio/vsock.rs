//! Socket device: the vsock engine with virtqueues of this process's guest. Packets and connections
//! are the engine's business, rings `vsock::queues`'.
//!
//! Source: VIRTIO 1.2, section 5.10.

use tracing::debug;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::rings::Rings;
use super::{Activation, Device, Error, Saved, State, read_bytes};
use crate::vsock::Engine;
use crate::vsock::queues::{self, COUNT, RX, TX};

/// Device type.
pub(super) const KIND: u32 = 19;
/// The queue by which the guest learns that its connections are gone.
pub(super) const EVENTS: usize = 2;
/// Event: all connections are gone (5.10.6.7, `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
pub(super) const TRANSPORT_RESET: u32 = 0;
/// Token of the engine's sockets; the queues have theirs below.
const ENGINE: u32 = COUNT as u32;

/// The socket device of one guest.
pub struct Vsock {
    engine: Engine,
    rings: Option<Rings>,
    /// The engine's sockets are watched, which they stay: what a guest sent before it reset the
    /// device still goes to its clients.
    watched: bool,
    /// The guest comes from another process, and so do its connections.
    moved: bool,
}

impl Vsock {
    /// A device for an engine, which goes on listening.
    #[must_use]
    pub fn new(engine: Engine) -> Self {
        Self {
            engine,
            rings: None,
            watched: false,
            moved: false,
        }
    }

    /// Moves packets both ways.
    fn service(&mut self) {
        let Some(rings) = &mut self.rings else {
            return;
        };
        let memory = rings.memory.memory();
        let Some([rx, tx]) = rings.pair(RX) else {
            return;
        };
        match queues::service(&mut self.engine, &memory, &mut rx.queue, &mut tx.queue) {
            Ok(outcome) => {
                if outcome.again {
                    tx.kick();
                }
                for (wanted, index) in [(outcome.signal_rx, RX), (outcome.signal_tx, TX)] {
                    if wanted {
                        rings.interrupt.queue(index as u16);
                    }
                }
            }
            Err(e) => {
                rings.finish(TX, Err(e));
                self.engine.reset();
            }
        }
    }
}

/// Tells the guest that its connections are gone.
pub(super) fn tell_reset(rings: &mut Rings) {
    let memory = rings.memory.memory();
    let Some(ring) = rings.ring(EVENTS) else {
        return;
    };
    let told = ring.take(&memory).and_then(|chain| {
        let Some(chain) = chain else {
            debug!("vsock: the guest left no room for the news that its connections are gone");
            return Ok(false);
        };
        let written = chain.writable.write(&TRANSPORT_RESET.to_le_bytes()) as u32;
        ring.give(&memory, &[(chain.head, written)])?;
        Ok(false)
    });
    rings.finish(EVENTS, told);
}

impl Device for Vsock {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX
    }

    /// Linux fills the first with buffers of 4 KiB, which are lost to the guest, and the third with 8
    /// events.
    fn queue_sizes(&self) -> &[u16] {
        const { &[128, 128, 8] }
    }

    /// `struct virtio_vsock_config` (5.10.4): the guest's CID.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.engine.guest_cid().to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {} // nothing in it is writable

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let rings = Rings::new(KIND, COUNT, activation)?;
        if !self.watched {
            let watched = rings.watch.add(&self.engine, ENGINE, EventSet::IN);
            watched.map_err(|source| Error::Resource {
                what: "watch the vsock engine",
                source,
            })?;
            self.watched = true;
        }
        let rings = self.rings.insert(rings);
        if std::mem::take(&mut self.moved) {
            tell_reset(rings);
        }
        self.service();
        Ok(())
    }

    fn reset(&mut self) {
        let Some(mut rings) = self.rings.take() else {
            return;
        };
        // What the guest sent last may still lie in its queue.
        let memory = rings.memory.memory();
        if let Some(tx) = rings.ring(TX)
            && let Err(e) = queues::drain(&mut self.engine, &memory, &mut tx.queue)
        {
            debug!("vsock: cannot look at the queue of a device that was reset: {e}");
        }
        self.engine.reset();
    }

    fn event(&mut self, token: u32) {
        if token == ENGINE {
            self.engine.handle_events();
        }
        self.service();
    }

    /// Connections are not saved: the guest is told that they are gone when it goes on elsewhere.
    fn save(&mut self) -> Result<Saved, Error> {
        Ok(Saved::stateless(KIND, self.rings.as_ref()))
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        state.expect_stateless(KIND)?;
        self.moved = true;
        Ok(())
    }
}
