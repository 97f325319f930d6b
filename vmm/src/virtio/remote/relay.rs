//! A daemon that never sees the guest's memory: what the guest asks is copied into a [`Window`], and what
//! the daemon answers is copied back. For memory that cannot be shared, because it is mapped copy-on-write.
//!
//! ```text
//!  guest ──kick──▶ event loop ─ copy ─▶ window ──kick──▶ daemon
//!  guest ◀─irqfd── event loop ◀─ copy ─ window ◀─call─── daemon
//! ```

use std::sync::Arc;

use tracing::warn;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Error as QueueError, QueueOwnedT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;

use super::daemon::Daemon;
use super::shadow::{Lie, Refused, Request, Shadow};
use super::window::Window;
use super::{Activation, Error, QueueState, Way};
use crate::log;
use crate::virtio::rings::{BUDGET, Ring, Rings};
use crate::virtio::vsock;

/// Token of the first queue's answers; the guest's kicks have those below.
const CALLS: u32 = 1 << 16;

/// What lives as long as the driver is up.
pub(super) struct Relay {
    /// Device type.
    kind: u32,
    rings: Rings,
    window: Arc<Window>,
    /// One for each of the daemon's queues.
    shadows: Vec<Shadow>,
    /// Queues that were given to the daemon.
    started: usize,
    /// The daemon has lied, and is not listened to again.
    broken: bool,
}

impl Relay {
    /// `room`: bytes in the window for the data of each of the daemon's queues.
    pub(super) fn new(
        kind: u32,
        sizes: &[u16],
        room: &[u64],
        window: &Arc<Window>,
        activation: Activation,
    ) -> Result<Self, Error> {
        let mut shadows = Vec::new();
        let mut at = 0;
        for (size, room) in sizes.iter().zip(room) {
            let (shadow, end) = Shadow::new(&window.memory, at, *size, *room)?;
            shadows.push(shadow);
            at = end;
        }
        Ok(Self {
            kind,
            rings: Rings::new(kind, sizes.len(), activation)?,
            window: Arc::clone(window),
            shadows,
            started: 0,
            broken: false,
        })
    }

    /// Passes on what the guest asks, as far as there is room.
    fn ask(&mut self, index: usize) -> Result<(), Lie> {
        let guest = self.rings.memory.memory();
        let Some(ring) = self.rings.ring(index) else {
            return Ok(());
        };
        let shadow = &mut self.shadows[index];
        let window = &self.window.memory;
        let before = shadow.asked();
        let result = pass_on(ring, shadow, window, &guest);
        if shadow.asked() != before && shadow.publish(window)? {
            let _ = self.window.kicks[index].write(1); // fails only when it is signalled already
        }
        self.rings.finish(index, result);
        Ok(())
    }

    /// Gives the guest what the daemon has answered.
    fn answer(&mut self, index: usize) -> Result<(), Lie> {
        let guest = self.rings.memory.memory();
        let shadow = &mut self.shadows[index];
        let mut given = Ok(false);
        while let Some(done) = shadow.collect(&self.window.memory, &guest)? {
            if let Some(ring) = self.rings.ring(index)
                && given.is_ok()
            {
                given = ring.give(&guest, &[done]).map(|()| false);
            }
        }
        self.rings.finish(index, given);
        Ok(())
    }
}

impl Way for Relay {
    fn start(&mut self, daemon: &Daemon) -> Result<(), Error> {
        // Whatever the guest does with its rings, the daemon has plain ones.
        daemon.start(1 << VIRTIO_F_VERSION_1, &self.window.memory)?;
        for (index, shadow) in self.shadows.iter().enumerate() {
            if self.rings.ring(index).is_none() {
                return Err(Error::Queue(index));
            }
            let (call, kick) = (&self.window.calls[index], &self.window.kicks[index]);
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let watched = self.rings.watch.add(call, CALLS + index as u32, events);
            watched.map_err(|source| Error::Resource {
                what: "watch a daemon's signals",
                source,
            })?;
            self.started = index + 1;
            daemon.give_queue(index, shadow.queue(), &self.window.memory, call, kick)?;
        }
        Ok(())
    }

    /// What the daemon had is forgotten.
    fn stop(&mut self, daemon: &mut Daemon) {
        for index in 0..self.started {
            if let Err(e) = daemon.take_queue(index) {
                tracing::debug!("A device's daemon did not stop queue {index}: {e}");
                if daemon.give_up(&e) {
                    return;
                }
            }
        }
    }

    fn event(&mut self, token: u32) {
        let (index, called) = match token.checked_sub(CALLS) {
            Some(index) => (index as usize, true),
            None => (token as usize, false),
        };
        if index >= self.started || self.broken {
            return;
        }
        let done = if called { self.answer(index) } else { Ok(()) };
        let done = done.and_then(|()| self.ask(index));
        if let Err(lie) = done {
            self.broken = true;
            if log::worth_telling() {
                warn!("A device's daemon is not listened to any more: {lie}");
            }
        }
    }

    fn tell_reset(&mut self) -> Result<(), Error> {
        vsock::tell_reset(&mut self.rings);
        Ok(())
    }

    fn positions(&mut self, _: &Daemon) -> Result<Vec<QueueState>, Error> {
        Err(Error::NotSaved {
            kind: self.kind,
            why: "its daemon sees copies of what the guest asked, which would be lost",
        })
    }
}

/// Copies chains into the window until there are none or no room; malformed ones are given back empty.
/// Returns whether to come again, other than when there is room.
fn pass_on(
    ring: &mut Ring,
    shadow: &mut Shadow,
    window: &GuestMemoryMmap,
    guest: &GuestMemoryMmap,
) -> Result<bool, QueueError> {
    let mut promised = false;
    for _ in 0..BUDGET {
        let Some(chain) = ring.queue.iter(guest)?.next() else {
            if promised {
                return Err(QueueError::InvalidAvailRingIndex); // more is claimed, none is there
            }
            if !ring.ask(guest)? {
                return Ok(false);
            }
            promised = true;
            continue;
        };
        promised = false;
        let head = chain.head_index();
        let request = Request::new(guest, chain).ok_or(Refused::Never);
        let offered = request.and_then(|request| shadow.offer(window, guest, request));
        match offered {
            Ok(()) => {}
            Err(Refused::Never) => ring.give(guest, &[(head, 0)])?,
            Err(Refused::Later) => {
                ring.untake(1);
                return Ok(false);
            }
        }
    }
    Ok(true)
}

impl Drop for Relay {
    fn drop(&mut self) {
        for call in &self.window.calls[..self.started] {
            self.rings.watch.remove(call);
        }
    }
}
