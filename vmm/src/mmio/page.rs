//! What a guest reads of a slot, and the slot's interrupt, whose causes are part of that.

use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::virtio::Interrupt;

/// Where a device's own configuration begins.
pub(super) const CONFIG: u64 = 0x100;
/// Bytes of it that a guest can read; no device here has more.
pub(super) const CONFIG_SIZE: usize = 256;
pub(super) const INTERRUPT_STATUS: u64 = 0x60;
pub(super) const CONFIG_GENERATION: u64 = 0xfc;

/// Interrupt causes (register `InterruptStatus`).
pub const USED_BUFFER: u32 = 1;
pub(super) const CONFIG_CHANGE: u32 = 2;

/// What a guest reads of one slot.
#[derive(Debug)]
#[repr(C, align(4096))]
pub struct Page([AtomicU32; 1024]);

impl Default for Page {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU32::new(0)))
    }
}

impl Page {
    /// The register at an offset below 4096.
    pub(super) fn at(&self, offset: u64) -> &AtomicU32 {
        &self.0[offset as usize / 4 % self.0.len()]
    }

    pub(super) fn show(&self, offset: u64, value: u32) {
        self.at(offset).store(value, Ordering::SeqCst);
    }

    pub(super) fn show_config(&self, config: &[u8]) {
        for (offset, word) in (CONFIG..)
            .step_by(4)
            .zip(config.chunks(4).take(CONFIG_SIZE / 4))
        {
            let mut bytes = [0; 4];
            bytes[..word.len()].copy_from_slice(word);
            self.show(offset, u32::from_le_bytes(bytes));
        }
    }
}

/// The interrupt of one slot.
///
/// `InterruptStatus` always says that buffers may have been used: then whoever uses a buffer, also
/// in another process, only has to signal one eventfd, and nobody has to know that a driver has seen it.
/// A driver that looks in vain loses nothing.
pub(super) struct Line {
    irq: EventFd,
    page: &'static Page,
}

impl Line {
    /// A line that signals `irq`, an eventfd that raises an edge of the slot's interrupt.
    pub(super) fn new(irq: EventFd, page: &'static Page) -> Self {
        page.show(INTERRUPT_STATUS, USED_BUFFER);
        Self { irq, page }
    }

    /// Whether the driver has not yet seen a change of the configuration.
    pub(super) fn config_change(&self) -> u32 {
        self.page.at(INTERRUPT_STATUS).load(Ordering::SeqCst) & CONFIG_CHANGE
    }

    /// The driver has seen these causes.
    pub(super) fn acknowledge(&self, causes: u32) {
        let left = !(causes & CONFIG_CHANGE);
        (self.page.at(INTERRUPT_STATUS)).fetch_and(left, Ordering::SeqCst);
    }

    /// How often the configuration has changed.
    pub(super) fn generation(&self) -> u32 {
        self.page.at(CONFIG_GENERATION).load(Ordering::SeqCst)
    }

    /// Goes on where another line stood.
    pub(super) fn restore(&self, config_change: u32, generation: u32) {
        let status = USED_BUFFER | config_change & CONFIG_CHANGE;
        self.page.show(INTERRUPT_STATUS, status);
        self.page.show(CONFIG_GENERATION, generation);
    }

    /// Tells the driver to look at the device's status and configuration.
    pub(super) fn config_changed(&self) {
        (self.page.at(CONFIG_GENERATION)).fetch_add(1, Ordering::SeqCst);
        (self.page.at(INTERRUPT_STATUS)).fetch_or(CONFIG_CHANGE, Ordering::SeqCst);
        self.raise();
    }

    fn raise(&self) {
        let _ = self.irq.write(1); // fails only when the counter is full, and then it is signalled
    }
}

impl Interrupt for Line {
    fn queue(&self, _: u16) {
        self.raise();
    }

    fn config(&self, config: &[u8]) {
        self.page.show_config(config);
        self.config_changed();
    }

    fn notifier(&self, _: u16) -> Option<EventFd> {
        self.irq.try_clone().ok()
    }
}
