//! Virtio devices without a transport: what a device is to the transport that shows it to a guest
//! ([`Device`], [`Activation`], [`Interrupt`]) and to the one thread that serves all of them
//! ([`EventLoop`]). `docs/virtio.md` has the devices, their limits and what a hostile guest can do.
//!
//! ```text
//!  vCPU thread                              device thread
//!  config, DRIVER_OK, reset ─▶ Mutex<dyn Device> ◀─ events ─ EventLoop ◀─ kicks (ioeventfd), taps, sockets
//!                                   │
//!                                   └─ Interrupt ─▶ transport ─▶ irqfd
//! ```
//! A device is locked for as long as one event or one access takes. It never waits for a guest.

mod balloon;
mod block;
mod buffers;
mod event_loop;
mod io;
mod net;
mod remote;
mod rings;
mod rng;
mod vsock;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

pub use balloon::Balloon;
pub use block::{Block, prepare_thread};
pub use buffers::{Buffers, MAX_PIECES, TooManyPieces};
pub use event_loop::{Attached, EventLoop, Watch};
pub use net::{Net, NetConfig, open_tap};
pub use remote::{Remote, Window};
pub use rng::Rng;
pub use vsock::Vsock;

/// Guest memory as devices hold it.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// A device of a guest (VIRTIO 1.2, section 2). What it offers is fixed when it is made.
pub trait Device: Send {
    /// Device type (section 5).
    fn kind(&self) -> u32;

    /// Feature bits that are offered.
    fn features(&self) -> u64;

    /// Largest size of each queue, descriptors; as many as there are queues.
    fn queue_sizes(&self) -> &[u16];

    /// Reads the device's configuration; bytes beyond its end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration; what is not writable stays.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver is up (`DRIVER_OK`): the device may use the queues. Called once after each reset.
    ///
    /// # Errors
    /// [`Error`]: the device cannot run with what the driver set up; it stays as after a reset.
    fn activate(&mut self, activation: Activation) -> Result<(), Error>;

    /// Forgets the driver: no queue is touched and no interrupt raised afterwards. Idempotent.
    fn reset(&mut self);

    /// A descriptor that the device watches ([`Watch::add`]) is ready. May come when it no longer
    /// is, and after a reset.
    fn event(&mut self, token: u32);

    /// Finishes what is under way and tells where the device stands. Called while the vCPUs and the
    /// event loop are paused; the device goes on afterwards as if nothing had been.
    ///
    /// # Errors
    /// [`Error::NotSaved`]: this device, as it is now, cannot be given to another process.
    fn save(&mut self) -> Result<Saved, Error>;

    /// Takes over what [`Device::save`] told of a device made the same way, before
    /// [`Device::activate`] with the queues of [`Saved::queues`].
    ///
    /// # Errors
    /// [`Error::WrongState`]: that was another kind of device.
    fn restore(&mut self, state: &State) -> Result<(), Error>;
}

/// What a device gets from its transport when the driver is up.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// Features that the driver accepted.
    pub features: u64,
    /// Each queue with what the guest's kick signals, in the device's order. Queues that the driver
    /// did not set up are there too, and are not ready.
    pub queues: Vec<(Queue, EventFd)>,
    /// How the guest is told.
    pub interrupt: Arc<dyn Interrupt>,
    /// Where the device registers its descriptors.
    pub watch: Watch,
}

/// How a device tells its driver that it has done something. Called from any thread.
pub trait Interrupt: Send + Sync {
    /// Buffers of this queue were used.
    fn queue(&self, index: u16);

    /// The configuration has changed, and is this now.
    fn config(&self, config: &[u8]);

    /// A descriptor that does what [`Interrupt::queue`] does when it is signalled, for another
    /// process (a vhost-user back end) to signal. Without one that takes a way through the event loop.
    fn notifier(&self, index: u16) -> Option<EventFd> {
        let _ = index;
        None
    }
}

/// A device that has stopped, for another process to go on with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// Where each queue stands; empty when the driver was not up.
    pub queues: Vec<QueueState>,
    /// What the device itself remembers.
    pub state: State,
}

impl Saved {
    /// Of a device that remembers nothing.
    fn stateless(kind: u32, rings: Option<&rings::Rings>) -> Self {
        Self {
            queues: rings.map(rings::Rings::states).unwrap_or_default(),
            state: State::Stateless { kind },
        }
    }
}

/// What a device remembers beyond its queues.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum State {
    /// Nothing.
    Stateless {
        /// [`Device::kind`].
        kind: u32,
    },
    /// A network device.
    Net {
        /// Queue pairs that the driver uses.
        pairs: u16,
    },
    /// A balloon.
    Balloon {
        /// Size the host asked for, pages of 4 KiB.
        target: u32,
        /// Size the guest says it has, pages of 4 KiB.
        actual: u32,
    },
}

impl State {
    fn expect_stateless(&self, kind: u32) -> Result<(), Error> {
        if *self == (Self::Stateless { kind }) {
            return Ok(());
        }
        let found = self.clone();
        Err(Error::WrongState { kind, found })
    }
}

/// A queue as it is written down (VIRTIO 1.2, section 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    /// Whether the driver has set it up.
    pub ready: bool,
    /// Largest size, descriptors.
    pub max_size: u16,
    /// Size the driver chose, descriptors.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Next entry of the available ring.
    pub next_available: u16,
    /// Next entry of the used ring.
    pub next_used: u16,
    /// Whether `VIRTIO_F_EVENT_IDX` was accepted.
    pub event_idx: bool,
}

impl From<&Queue> for QueueState {
    fn from(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            ready: state.ready,
            max_size: state.max_size,
            size: state.size,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
            event_idx: state.event_idx_enabled,
        }
    }
}

impl TryFrom<QueueState> for Queue {
    type Error = Error;

    /// A queue that goes on where the other one stood. That its rings lie in guest memory is checked
    /// when the device is activated.
    fn try_from(state: QueueState) -> Result<Self, Error> {
        Queue::try_from(virtio_queue::QueueState {
            max_size: state.max_size,
            next_avail: state.next_available,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.descriptors,
            avail_ring: state.available,
            used_ring: state.used,
        })
        .map_err(|_| Error::QueueState(state))
    }
}

/// Why a device could not be made, activated or saved. What a guest does while it runs is no error
/// here: it costs the guest that queue, and is logged within a budget.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused something.
    #[error("Cannot {what}")]
    Resource {
        /// What was wanted, after "cannot".
        what: &'static str,
        /// Cause.
        source: std::io::Error,
    },
    /// The driver's queue lies outside of guest memory, or has an impossible size.
    #[error("Driver set up queue {0} outside of guest memory or with a size that cannot be")]
    Queue(usize),
    /// The transport gave another number of queues than the device has.
    #[error("Device has {expected} queues, {found} were given")]
    Queues {
        /// As [`Device::queue_sizes`].
        expected: usize,
        /// As in the activation.
        found: usize,
    },
    /// The device is not made to move to another process.
    #[error("Device of type {kind} cannot be saved: {why}")]
    NotSaved {
        /// [`Device::kind`].
        kind: u32,
        /// Reason.
        why: &'static str,
    },
    /// A state of another device.
    #[error("State is not one of a device of type {kind}: {found:?}")]
    WrongState {
        /// [`Device::kind`].
        kind: u32,
        /// What was given.
        found: State,
    },
    /// A written-down queue that no device can have had.
    #[error("Queue is impossible: {0:?}")]
    QueueState(QueueState),
    /// A device's daemon did not do its part.
    #[error("The daemon of a device could not be {what}")]
    Daemon {
        /// After "could not be".
        what: &'static str,
        /// Cause.
        source: vhost::Error,
    },
    /// What a device was to be made of is unusable.
    #[error("Device cannot be made: {0}")]
    Configuration(String),
}

/// Reads part of a configuration; what is beyond its end is zero.
fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let rest = config.get(start..).unwrap_or_default();
    let count = rest.len().min(data.len());
    data[..count].copy_from_slice(&rest[..count]);
    data[count..].fill(0);
}
