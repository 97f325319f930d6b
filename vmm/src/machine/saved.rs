//! A machine that is written down, and one that goes on from what was written. Files and formats are
//! `snapshot`'s; here is what of a machine goes into them, and in which order it comes back.
//!
//! ```text
//!  paused ── save(files) ──▶ paused, unchanged
//!  files ── Machine::restore ──▶ paused ── resume() ──▶ running, as if nothing had been
//! ```

use std::fs::File;
use std::sync::{Arc, Mutex};
use std::thread;

use super::bus::lock;
use super::parts::{Parts, SlotPlan};
use super::{End, Error, Machine, lock_device, memory};
use crate::confine::May;
use crate::mmio::Transport;
use crate::snapshot::{self, Files, MachineState, SlotDevice, SlotState, VcpuState, VmState};
use crate::virtio::Device;

/// A machine to be, as one that was written down.
pub struct Restore {
    /// What it was written into; any number of machines may use it. Of its memory what the guest writes is
    /// copied, so that no other process can share it.
    pub snapshot: Files,
    /// Runs of pages of the memory's file, (first, count), that the guest is known to write to.
    pub write_set: Vec<(u64, u64)>,
    /// Where the guest's console goes.
    pub console: File,
    /// Its devices, made as those of the first machine were, in the order of their slots.
    pub devices: Vec<Arc<Mutex<dyn Device>>>,
    /// As in [`Config::confined`](super::Config::confined).
    pub confined: Option<May>,
}

impl Machine {
    /// Writes the machine, which must be paused, into empty files. One that is confined must be one
    /// that may be saved ([`May::BeSaved`]).
    ///
    /// # Errors
    /// [`Error`]: it is not paused, a device cannot be written down (which is named), or a file
    /// cannot be written.
    pub fn save(&self, into: &Files) -> Result<(), Error> {
        let registers = snapshot::registers(&self.kvm)?;
        let vcpus = (self.vcpus)
            .each(move |vcpu| VcpuState::save(vcpu, &registers))
            .ok_or(Error::NotPaused)?;
        let slots = self.bus.slots.iter().map(|slot| save_slot(&lock(slot)));
        let state = MachineState {
            regions: snapshot::regions(&self.memory),
            vm: VmState::save(&self.vm)?,
            vcpus: vcpus.into_iter().collect::<Result<_, _>>()?,
            serial: lock(&self.bus.console).state().into(),
            slots: slots.collect::<Result<_, Error>>()?,
        };
        Ok(snapshot::write(into, &state, &self.memory)?)
    }

    /// Builds a machine, paused, that goes on where another one stood. `ended` as for
    /// [`Machine::new`].
    ///
    /// # Errors
    /// [`Error`]: the snapshot is damaged, needs other devices, or comes from another kind of host.
    pub fn restore(
        restore: Restore,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<Self, Error> {
        let state = snapshot::read(&restore.snapshot)?;
        let bytes = state.regions.iter().map(|region| region.size).sum();
        let guest = memory::create(bytes, false)?;
        if snapshot::regions(&guest) != state.regions {
            return Err(Error::Unfit("its memory lies elsewhere".into()));
        }
        snapshot::map(&guest, &restore.snapshot.memory)?;
        let plans = plan(&state.slots, restore.devices)?;
        let uart = state.serial.into();
        let vcpus = state.vcpus.len() as u32; // as many as KVM made
        let copied = guest.clone();
        let parts = thread::scope(|scope| {
            // Beside what KVM takes its time for.
            let copying = scope.spawn(|| snapshot::copy(&copied, &restore.write_set));
            let parts = Parts::new(guest, vcpus, restore.console, Some(&uart), plans);
            let copied = copying.join();
            copied.map_err(|_| Error::Memory("its pages were not copied".into()))??;
            parts
        })?;
        for (vcpu, saved) in parts.cpus.iter().zip(&state.vcpus) {
            saved.restore(vcpu)?;
        }
        state.vm.restore(&parts.vm)?;
        // Last: devices may raise interrupts as soon as they go on.
        for (slot, saved) in parts.bus.slots.iter().zip(&state.slots) {
            restore_slot(&mut lock(slot), saved)?;
        }
        parts.start(restore.confined, ended)
    }
}

fn save_slot(slot: &Transport) -> Result<SlotState, Error> {
    let device = match slot.device() {
        None => None,
        Some(device) => {
            let mut device = lock_device(device);
            let saved = device.save()?;
            let kind = device.kind();
            drop(device);
            Some(SlotDevice {
                kind,
                transport: slot.save(&saved),
                device: saved.state,
            })
        }
    };
    Ok(SlotState {
        queues: slot.room(),
        device,
    })
}

/// Puts the devices into the slots where their like were.
fn plan(slots: &[SlotState], devices: Vec<Arc<Mutex<dyn Device>>>) -> Result<Vec<SlotPlan>, Error> {
    if slots.len() > super::DEVICES_MAX {
        let why = format!("it has {} slots for devices", slots.len());
        return Err(Error::Unfit(why));
    }
    let mut devices = devices.into_iter();
    let mut plans = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        let device = match &slot.device {
            None => None,
            Some(saved) => {
                let device = devices.next();
                let found = device.as_ref().map(|device| {
                    let device = lock_device(device);
                    (device.kind(), device.queue_sizes().len() <= slot.queues)
                });
                if found != Some((saved.kind, true)) {
                    return Err(Error::Unfit(format!(
                        "slot {index} needs a device of type {}, with at most {} queues",
                        saved.kind, slot.queues
                    )));
                }
                device
            }
        };
        if slot.queues > QUEUES_MAX {
            let why = format!("slot {index} has {} queues", slot.queues);
            return Err(Error::Unfit(why));
        }
        plans.push((slot.queues, device));
    }
    match devices.next() {
        Some(_) => Err(Error::Unfit("it has fewer devices".into())),
        None => Ok(plans),
    }
}

/// Most queues of a slot: a network device's pairs and its control queue.
const QUEUES_MAX: usize = 33;

fn restore_slot(slot: &mut Transport, saved: &SlotState) -> Result<(), Error> {
    let Some(saved) = &saved.device else {
        return Ok(());
    };
    if let Some(device) = slot.device() {
        lock_device(device).restore(&saved.device)?;
    }
    match slot.restore(&saved.transport) {
        true => Ok(()),
        false => Err(Error::Unfit(format!(
            "a device of type {} does not go on where it stood",
            saved.kind
        ))),
    }
}
