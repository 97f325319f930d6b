//! The virtio-mmio transport (VIRTIO 1.2, section 4.2): shows a [`Device`](crate::virtio::Device) to a guest as a page of
//! registers and an interrupt. Knows no device type.
//!
//! ```text
//!  status: 0 ─ACKNOWLEDGE─ DRIVER ─ FEATURES_OK ─ DRIVER_OK ─▶ device is active
//!          ▲                                         │
//!          └──────────────── 0 written ──────────────┘        NEEDS_RESET when it cannot be
//! ```
//! A slot without a device has device id 0, which a driver passes by; one can be plugged into it
//! later, and be looked for again.
//!
//! What a guest reads it reads from a page of memory ([`Page`]) that it cannot write: a read is no exit.
//! A write is one, and afterwards the page shows what it has changed.

mod describe;
mod page;
#[cfg(test)]
mod tests;

use std::sync::{Arc, PoisonError};

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

pub use self::page::{Page, USED_BUFFER};

use self::page::{CONFIG, CONFIG_CHANGE, CONFIG_SIZE, Line};
use crate::log;
use crate::virtio::{Activation, Attached, Memory, QueueState, Saved, Watch};

/// "virt".
const MAGIC: u32 = 0x7472_6976;
/// Version 2: not legacy.
const VERSION: u32 = 2;
/// Vendor, which means nothing.
const VENDOR: u32 = 0;
/// Register that tells the device of new buffers; KVM turns a write into an eventfd.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Register by which a driver says which interrupt causes it has seen.
pub const INTERRUPT_ACK: u64 = 0x64;
/// Registers that the guest reads; `InterruptStatus` and `ConfigGeneration` are the line's own.
const READABLE: [u64; 8] = [0x00, 0x04, 0x08, 0x0c, 0x10, 0x34, 0x44, 0x70];

/// Status bits (section 2.1).
const ACKNOWLEDGE: u32 = 1;
const FEATURES_OK: u32 = 8;
const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// Where a slot stands with its driver, beyond the queues.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    status: u32,
    driver_features: u64,
    config_change: u32,
    generation: u32,
    queues: Vec<QueueState>,
}

/// A device and its registers.
pub struct Transport {
    slot: Slot,
    page: &'static Page,
    line: Arc<Line>,
    memory: Memory,
    /// What the guest's kick of each queue signals; there before any device is.
    kicks: Vec<EventFd>,
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<Queue>,
}

/// What is in a slot.
enum Slot {
    Empty,
    Device { device: Attached, watch: Watch },
}

impl Transport {
    /// An empty slot, of which the guest reads `page`. `kicks` bounds the queues of what can be plugged
    /// into it.
    #[must_use]
    pub fn new(memory: Memory, irq: EventFd, kicks: Vec<EventFd>, page: &'static Page) -> Self {
        let slot = Self {
            slot: Slot::Empty,
            page,
            line: Arc::new(Line::new(irq, page)),
            memory,
            kicks,
            status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
        };
        slot.show();
        slot
    }

    /// Whether nothing is plugged in.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        matches!(self.slot, Slot::Empty)
    }

    /// What is plugged in.
    pub fn device(&self) -> Option<&Attached> {
        match &self.slot {
            Slot::Empty => None,
            Slot::Device { device, .. } => Some(device),
        }
    }

    /// How many queues what is plugged in can have.
    pub fn room(&self) -> usize {
        self.kicks.len()
    }

    /// Whether a driver uses what is plugged in, or has begun to. A guest whose driver has gone says ACKNOWLEDGE
    /// again: it knows of the device, and does nothing with it.
    #[must_use]
    pub fn is_driven(&self) -> bool {
        self.status & !ACKNOWLEDGE != 0
    }

    /// Plugs a device into an empty slot; returns whether it has few enough queues.
    pub fn plug(&mut self, device: Attached, watch: Watch) -> bool {
        let fits = lock(&device).queue_sizes().len() <= self.kicks.len();
        if fits {
            self.slot = Slot::Device { device, watch };
            self.reset();
            self.show();
        }
        fits
    }

    /// Takes the device out; its driver sees an empty slot.
    pub fn unplug(&mut self) -> Option<(Attached, Watch)> {
        self.reset();
        let taken = std::mem::replace(&mut self.slot, Slot::Empty);
        self.show();
        match taken {
            Slot::Empty => None,
            Slot::Device { device, watch } => Some((device, watch)),
        }
    }

    fn reset(&mut self) {
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.line.acknowledge(CONFIG_CHANGE);
        if let Slot::Device { device, .. } = &self.slot {
            let mut device = lock(device);
            device.reset();
            let sizes = device.queue_sizes();
            // A size that no queue can have is the device's mistake; such a queue is not offered.
            self.queues = (sizes.iter())
                .map(|size| Queue::new(*size).unwrap_or_default())
                .collect();
        } else {
            self.queues.clear();
        }
        for kick in &self.kicks {
            let _ = kick.read(); // nobody is interested in what was signalled before
        }
    }

    /// Has the guest read what there is now.
    fn show(&self) {
        for offset in READABLE {
            self.page.show(offset, self.register(offset));
        }
        let mut config = [0; CONFIG_SIZE];
        // Locked until it is shown: a change that the device tells of meanwhile comes afterwards.
        let device = self.device().map(lock);
        if let Some(device) = &device {
            device.read_config(0, &mut config);
        }
        self.page.show_config(&config);
    }

    fn register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => match &self.slot {
                Slot::Empty => 0,
                Slot::Device { device, .. } => lock(device).kind(),
            },
            0x0c => VENDOR,
            0x10 => half(self.offered(), self.device_features_select),
            0x34 => queue.map_or(0, |q| q.max_size().into()),
            0x44 => queue.is_some_and(QueueT::ready).into(),
            0x70 => self.status,
            _ => 0,
        }
    }

    fn offered(&self) -> u64 {
        match &self.slot {
            Slot::Empty => 0,
            Slot::Device { device, .. } => lock(device).features() | 1 << VIRTIO_F_VERSION_1,
        }
    }

    /// A write of the guest.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(start) = offset.checked_sub(CONFIG) {
            if let Slot::Device { device, .. } = &self.slot {
                lock(device).write_config(start, data);
            }
        } else if let Ok(value) = <[u8; 4]>::try_from(data) {
            self.set_register(offset, u32::from_le_bytes(value));
        }
        self.show();
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 if self.status & FEATURES_OK == 0 => {
                let (select, old) = (self.driver_features_select, self.driver_features);
                self.driver_features = match select {
                    0 => old & !0xffff_ffff | u64::from(value),
                    1 => old & 0xffff_ffff | u64::from(value) << 32,
                    _ => old,
                };
            }
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            QUEUE_NOTIFY => {
                // Usually KVM has done this already.
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            INTERRUPT_ACK => self.line.acknowledge(value),
            0x70 => self.set_status(value),
            _ => self.set_queue_register(offset, value),
        }
    }

    /// Where a queue lies can be said until it is used.
    fn set_queue_register(&mut self, offset: u64, value: u32) {
        if self.status & DRIVER_OK != 0 {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        match offset {
            0x38 => queue.set_size(u16::try_from(value).unwrap_or(0)),
            0x44 => queue.set_ready(value == 1),
            0x80 => queue.set_desc_table_address(Some(value), None),
            0x84 => queue.set_desc_table_address(None, Some(value)),
            0x90 => queue.set_avail_ring_address(Some(value), None),
            0x94 => queue.set_avail_ring_address(None, Some(value)),
            0xa0 => queue.set_used_ring_address(Some(value), None),
            0xa4 => queue.set_used_ring_address(None, Some(value)),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if self.is_empty() || self.status & (FAILED | NEEDS_RESET) != 0 {
            return;
        }
        let mut value = value & !NEEDS_RESET;
        // The driver may accept what was offered, and must accept that this is not legacy.
        let accepted = self.driver_features & !self.offered() == 0
            && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if value & FEATURES_OK != 0 && !accepted {
            value &= !FEATURES_OK;
        }
        let starts = value & DRIVER_OK != 0 && self.status & DRIVER_OK == 0;
        self.status |= value;
        if starts && (self.status & FEATURES_OK == 0 || !self.activate()) {
            self.status |= NEEDS_RESET;
            self.line.config_changed();
        }
    }

    /// Hands the queues to the device; returns whether it runs.
    fn activate(&mut self) -> bool {
        let Slot::Device { device, watch } = &self.slot else {
            return false;
        };
        let mut queues = Vec::new();
        for (queue, kick) in self.queues.iter().zip(&self.kicks) {
            let Ok(state) = Queue::try_from(queue.state()) else {
                return false;
            };
            let Ok(kick) = kick.try_clone() else {
                return false;
            };
            queues.push((state, kick));
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.line.clone(),
            watch: watch.clone(),
        };
        match lock(device).activate(activation) {
            Ok(()) => true,
            Err(e) => {
                if log::worth_telling() {
                    tracing::warn!("A device does not run with what its driver set up: {e}");
                }
                false
            }
        }
    }

    /// What a driver has set up, with the queues as the device says they stand.
    #[must_use]
    pub fn save(&self, device: &Saved) -> TransportState {
        let queues = if device.queues.is_empty() {
            self.queues.iter().map(QueueState::from).collect()
        } else {
            device.queues.clone()
        };
        TransportState {
            status: self.status,
            driver_features: self.driver_features,
            config_change: self.line.config_change(),
            generation: self.line.generation(),
            queues,
        }
    }

    /// Goes on where another transport stood, with the same kind of device, which was restored.
    /// Returns whether the state was one that this device can have.
    pub fn restore(&mut self, state: &TransportState) -> bool {
        if state.queues.len() != self.queues.len() {
            return false;
        }
        let queues: Result<Vec<Queue>, _> =
            (state.queues.iter()).map(|q| Queue::try_from(*q)).collect();
        let Ok(queues) = queues else {
            return false;
        };
        self.queues = queues;
        self.status = state.status;
        self.driver_features = state.driver_features;
        self.line.restore(state.config_change, state.generation);
        let runs = state.status & DRIVER_OK == 0 || self.activate();
        self.show();
        runs
    }
}

/// Bits 0 to 31, or 32 to 63.
fn half(bits: u64, select: u32) -> u32 {
    match select {
        0 => bits as u32,
        1 => (bits >> 32) as u32,
        _ => 0,
    }
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole.
fn lock(device: &Attached) -> std::sync::MutexGuard<'_, dyn crate::virtio::Device + 'static> {
    device.lock().unwrap_or_else(PoisonError::into_inner)
}
