//! What is at which address: hands a guest's accesses to ports and registers to their device. An
//! access to nothing reads ones and writes nowhere, as on a PC.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::layout::{I8042_COMMAND, I8042_RESET, MMIO, MMIO_SIZE, SERIAL_PORT};
use super::serial::Console;
use crate::mmio::Transport;

/// Ports of a UART.
const SERIAL_PORTS: u16 = 8;

/// Everything that a guest can reach besides its memory.
pub(super) struct Bus {
    pub(super) console: Mutex<Console>,
    pub(super) slots: Vec<Mutex<Transport>>,
}

impl Bus {
    pub(super) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (Some(offset), [byte]) = (serial(port), &mut *data) {
            *byte = lock(&self.console).read(offset);
        } else if port == I8042_COMMAND {
            // Ready for a command.
            data.fill(0);
        }
    }

    /// Returns whether the guest has reset the machine.
    pub(super) fn port_write(&self, port: u16, data: &[u8]) -> bool {
        let [byte] = *data else { return false };
        if let Some(offset) = serial(port) {
            // An error is of the interrupt, and the guest looks at the UART anyway.
            let _ = lock(&self.console).write(offset, byte);
        }
        (port, byte) == (I8042_COMMAND, I8042_RESET)
    }

    /// Registers of slots are memory when they are read.
    pub(super) fn read(data: &mut [u8]) {
        data.fill(0xff);
    }

    pub(super) fn write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.slot(address) {
            lock(slot).write(offset, data);
        }
    }

    fn slot(&self, address: u64) -> Option<(&Mutex<Transport>, u64)> {
        let offset = address.checked_sub(MMIO)?;
        let index = usize::try_from(offset / MMIO_SIZE).ok()?;
        Some((self.slots.get(index)?, offset % MMIO_SIZE))
    }

    /// Sends what the guest wrote without ending the line.
    pub(super) fn flush_console(&self) {
        lock(&self.console).writer_mut().send();
    }
}

/// Register of the UART at a port.
fn serial(port: u16) -> Option<u8> {
    let offset = port.checked_sub(SERIAL_PORT)?;
    (offset < SERIAL_PORTS).then_some(offset as u8)
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
