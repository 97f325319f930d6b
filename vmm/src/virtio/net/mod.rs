//! Network device on a tap: frames in both directions, each with a header by which checksums and
//! segmentation are left to whoever can do them best. Several queue pairs for a multi-queue tap.
//!
//! ```text
//!  queue 0, 2, …  receive.rs  ◀── tap queue 0, 1, …
//!  queue 1, 3, …  transmit    ──▶ tap queue 0, 1, …
//!  last queue     control     how many pairs are used (only with several)
//! ```
//! Source: VIRTIO 1.2, section 5.1.

mod receive;
mod tap;

use std::os::fd::OwnedFd;

use tracing::debug;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

pub use self::tap::open_tap;

use self::receive::End;
use self::tap::{OFFLOAD_CSUM, OFFLOAD_TSO_ECN, OFFLOAD_TSO4, OFFLOAD_TSO6, Tap};
use super::rings::{Chain, Rings};
use super::{Activation, Device, Error, Saved, State, read_bytes};

/// Device type.
const KIND: u32 = 1;

// Features (5.1.3). "Host" is this side, in the specification's words.
const CSUM: u32 = 0;
const GUEST_CSUM: u32 = 1;
const MTU: u32 = 3;
const MAC: u32 = 5;
const GUEST_TSO4: u32 = 7;
const GUEST_TSO6: u32 = 8;
const GUEST_ECN: u32 = 9;
const HOST_TSO4: u32 = 11;
const HOST_TSO6: u32 = 12;
const HOST_ECN: u32 = 13;
const MRG_RXBUF: u32 = 15;
const CTRL_VQ: u32 = 17;
const MQ: u32 = 22;

/// Descriptors of a queue for frames, and of the control queue.
const QUEUE: u16 = 256;
const CONTROL_QUEUE: u16 = 64;
/// Most queue pairs.
const MAX_PAIRS: usize = 16;
/// Token of the first tap queue; the device's own queues have theirs below.
const TAPS: u32 = 2 * MAX_PAIRS as u32 + 1;

// Control messages (5.1.6.5).
const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const CONTROL_OK: u8 = 0;
const CONTROL_ERROR: u8 = 1;

/// What the guest is told about its network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// Largest packet, bytes, 68 to 65535.
    pub mtu: u16,
}

/// A network device of a guest.
pub struct Net {
    pairs: Vec<Pair>,
    config: NetConfig,
    queue_sizes: Vec<u16>,
    rings: Option<Rings>,
    /// Pairs that the driver uses.
    used: usize,
    /// Pairs that the driver used in another process.
    restored: Option<usize>,
}

/// A queue of the tap.
struct Pair {
    tap: Tap,
    /// It may have a frame.
    readable: bool,
}

impl Net {
    /// A device on a tap, open and made with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`; several
    /// descriptors are the queues of one made with `IFF_MULTI_QUEUE`.
    ///
    /// # Errors
    /// [`Error`]: no or too many queues, an MTU that cannot be, or not a tap.
    pub fn new(taps: Vec<OwnedFd>, config: NetConfig) -> Result<Self, Error> {
        if !(1..=MAX_PAIRS).contains(&taps.len()) {
            return Err(Error::Configuration(format!(
                "a tap has 1 to {MAX_PAIRS} queues, not {}",
                taps.len()
            )));
        }
        if config.mtu < 68 {
            return Err(Error::Configuration(format!(
                "an MTU is at least 68, not {}",
                config.mtu
            )));
        }
        let mut queue_sizes = vec![QUEUE; 2 * taps.len()];
        if taps.len() > 1 {
            queue_sizes.push(CONTROL_QUEUE);
        }
        let pair = |fd| {
            let tap = Tap::new(fd)?;
            Ok(Pair {
                tap,
                readable: false,
            })
        };
        Ok(Self {
            pairs: taps.into_iter().map(pair).collect::<Result<_, Error>>()?,
            config,
            queue_sizes,
            rings: None,
            used: 1,
            restored: None,
        })
    }

    /// `struct virtio_net_config` (5.1.4) up to `mtu`.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.config.mac);
        config[8..10].copy_from_slice(&(self.pairs.len() as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.config.mtu.to_le_bytes());
        config
    }

    /// Has the first `count` pairs take part and the others not.
    fn use_pairs(&mut self, count: usize) -> Result<(), Error> {
        self.used = count;
        if self.pairs.len() == 1 {
            return Ok(());
        }
        for (index, pair) in self.pairs.iter().enumerate() {
            match pair.tap.set_attached(index < count) {
                // It is so already.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                other => other.map_err(|source| Error::Resource {
                    what: "attach or detach a queue of the tap",
                    source,
                })?,
            }
        }
        Ok(())
    }

    /// Frames for the guest.
    fn receive(&mut self, index: usize) {
        let (Some(rings), Some(pair)) = (&mut self.rings, self.pairs.get_mut(index)) else {
            return;
        };
        if !pair.readable || index >= self.used {
            return;
        }
        let mergeable = rings.accepted(MRG_RXBUF);
        let memory = rings.memory.memory();
        let Some(ring) = rings.ring(2 * index) else {
            return;
        };
        let end = receive::receive(&pair.tap, ring, &memory, mergeable);
        pair.readable = !matches!(end, Ok(End::NoFrame));
        rings.finish(2 * index, end.map(|end| end == End::Budget));
    }

    /// Frames of the guest.
    fn transmit(&mut self, index: usize) {
        let (Some(rings), Some(pair)) = (&mut self.rings, self.pairs.get_mut(index)) else {
            return;
        };
        let memory = rings.memory.memory();
        let Some(ring) = rings.ring(2 * index + 1) else {
            return;
        };
        let sent = ring.serve(&memory, |chain| {
            // One that the kernel does not take, because its header is wrong or the queue full, is
            // lost like any frame.
            if let Err(e) = pair.tap.write(&chain.readable) {
                debug!("A frame of the guest is lost: {e}");
            }
            0
        });
        // The host's answers are there already: one interrupt tells of both.
        pair.readable = true;
        self.receive(index);
        if let Some(rings) = &mut self.rings {
            rings.finish(2 * index + 1, sent);
        }
    }

    /// Wishes of the driver.
    fn control(&mut self) {
        let index = 2 * self.pairs.len();
        let most = self.pairs.len();
        let Some(rings) = &mut self.rings else {
            return;
        };
        let mut wanted = None;
        rings.serve(index, |chain| {
            let pairs = wanted_pairs(&chain).filter(|n| (1..=most).contains(n));
            wanted = pairs.or(wanted);
            let answer = if pairs.is_some() {
                CONTROL_OK
            } else {
                CONTROL_ERROR
            };
            chain.writable.write(&[answer]) as u32
        });
        if let Some(count) = wanted
            && let Err(e) = self.use_pairs(count)
        {
            debug!("The guest's wish for {count} queue pairs is not met: {e}");
        }
    }

    fn watch_taps(&self, rings: &Rings) -> Result<(), Error> {
        for (index, pair) in self.pairs.iter().enumerate() {
            // Edge-triggered: a tap whose frames the guest does not take wakes nobody.
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let watched = rings.watch.add(&pair.tap, TAPS + index as u32, events);
            watched.map_err(|source| Error::Resource {
                what: "watch a tap",
                source,
            })?;
        }
        Ok(())
    }

    fn set_offload(&self, features: u64) -> Result<(), Error> {
        let mut offload = 0;
        for (feature, flag) in [
            (GUEST_CSUM, OFFLOAD_CSUM),
            (GUEST_TSO4, OFFLOAD_TSO4),
            (GUEST_TSO6, OFFLOAD_TSO6),
            (GUEST_ECN, OFFLOAD_TSO_ECN),
        ] {
            if features & 1 << feature != 0 {
                offload |= flag;
            }
        }
        // One needs the other (5.1.3.1).
        if offload & OFFLOAD_CSUM == 0 {
            offload = 0;
        }
        if offload & (OFFLOAD_TSO4 | OFFLOAD_TSO6) == 0 {
            offload &= !OFFLOAD_TSO_ECN;
        }
        // One is for all queues of a tap.
        (self.pairs.iter().take(1)).try_for_each(|pair| {
            (pair.tap.set_offload(offload)).map_err(|source| Error::Resource {
                what: "set the offloads of the tap",
                source,
            })
        })
    }
}

/// The number of queue pairs that a control message asks for.
fn wanted_pairs(chain: &Chain<'_>) -> Option<usize> {
    let mut message = [0; 4];
    if chain.readable.read(&mut message) < message.len() {
        return None;
    }
    let [class, command, low, high] = message;
    let known = (class, command) == (CLASS_MQ, MQ_PAIRS_SET);
    known.then(|| u16::from_le_bytes([low, high]).into())
}

impl Device for Net {
    fn kind(&self) -> u32 {
        KIND
    }

    fn features(&self) -> u64 {
        let multiple = match self.pairs.len() {
            1 => 0,
            _ => 1 << CTRL_VQ | 1 << MQ,
        };
        [
            CSUM, GUEST_CSUM, MTU, MAC, GUEST_TSO4, GUEST_TSO6, GUEST_ECN, HOST_TSO4, HOST_TSO6,
            HOST_ECN, MRG_RXBUF,
        ]
        .iter()
        .fold(multiple, |all, feature| all | 1 << feature)
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {} // nothing in it is writable

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let rings = Rings::new(KIND, self.queue_sizes.len(), activation)?;
        self.set_offload(rings.features)?;
        let pairs = self.restored.take().unwrap_or(1);
        self.use_pairs(pairs)?;
        if let Err(e) = self.watch_taps(&rings) {
            self.pairs
                .iter()
                .for_each(|pair| rings.watch.remove(&pair.tap));
            return Err(e);
        }
        self.rings = Some(rings);
        for index in 0..self.pairs.len() {
            self.pairs[index].readable = true;
            self.receive(index);
        }
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(rings) = self.rings.take() {
            self.pairs
                .iter()
                .for_each(|pair| rings.watch.remove(&pair.tap));
        }
    }

    fn event(&mut self, token: u32) {
        let queues = 2 * self.pairs.len() as u32;
        if let Some(index) = token.checked_sub(TAPS).map(|index| index as usize) {
            if let Some(pair) = self.pairs.get_mut(index) {
                pair.readable = true;
                self.receive(index);
            }
        } else if token == queues {
            self.control();
        } else if token < queues {
            let index = token as usize / 2;
            match token % 2 {
                0 => self.receive(index),
                _ => self.transmit(index),
            }
        }
    }

    fn save(&mut self) -> Result<Saved, Error> {
        Ok(Saved {
            queues: self.rings.as_ref().map(Rings::states).unwrap_or_default(),
            state: State::Net {
                pairs: self.used as u16, // at most MAX_PAIRS
            },
        })
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        match *state {
            State::Net { pairs } if (1..=self.pairs.len()).contains(&pairs.into()) => {
                self.restored = Some(pairs.into());
                Ok(())
            }
            _ => {
                let found = state.clone();
                Err(Error::WrongState { kind: KIND, found })
            }
        }
    }
}
