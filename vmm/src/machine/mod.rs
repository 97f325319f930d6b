//! A virtual machine on KVM: memory, processors, interrupts and slots for virtio devices, without
//! firmware, PCI or ACPI. `docs/vmm.md` has its map. Devices are made by whoever uses this; processes
//! and the control protocol are no business of this room.
//!
//! ```text
//!  Machine::new ─▶ built ─ resume() ─▶ running ◀─ pause() / resume() ─▶ paused
//!                                          │
//!                                          └─ the guest resets or fails; stop() ─▶ ended (told once)
//! ```

mod boot;
mod bus;
mod cpu;
mod describe;
mod ioapic;
mod layout;
mod memory;
mod mptable;
mod parts;
mod saved;
mod serial;
mod serving;
mod vcpu;

use std::fmt::Write;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard};

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestMemoryMmap;

pub use boot::Boot;
pub use layout::{CMDLINE_MAX, DEVICES_MAX};
pub use saved::Restore;

use crate::confine::{self, May};
use crate::mmio::Transport;
use crate::virtio::Device;
use bus::{Bus, lock};
use parts::Parts;
use serving::Serving;
use vcpu::Vcpus;

/// Queues of a device that is plugged in later: a network device's pair and its control queue.
const LATER_QUEUES: usize = 3;
/// What the kernel must know of a machine without ACPI and PCI: not to look for them, and that it
/// restarts by a triple fault.
const CMDLINE: &str = "acpi=off pci=off reboot=t";
/// A machine to be.
pub struct Config {
    /// What it boots.
    pub boot: Boot,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// Whether another process (a vhost-user back end) shares the memory.
    pub shared_memory: bool,
    /// Processors, 1 to 254.
    pub vcpus: u32,
    /// Where the guest's console goes.
    pub console: File,
    /// Its devices, in the order in which the guest finds them.
    pub devices: Vec<Arc<Mutex<dyn Device>>>,
    /// Slots for devices that come later; with `devices` at most [`DEVICES_MAX`].
    pub spare_slots: usize,
    /// To confine the calling thread and the machine's ([`confine`]), for a process that has nothing
    /// to do but this: what they may still do.
    pub confined: Option<May>,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest has reset it by the keyboard controller.
    Reset,
    /// The guest has reset it by a triple fault, which is how sealpod's end.
    TripleFault,
    /// KVM could not go on with it, for this reason.
    Failed(String),
}

/// Why a machine could not be built or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused something.
    #[error("KVM refused {call}")]
    Kvm {
        /// The ioctl.
        call: &'static str,
        /// What it said.
        source: kvm_ioctls::Error,
    },
    /// The kernel refused something.
    #[error("Cannot {what}")]
    Io {
        /// What was wanted, after "cannot".
        what: &'static str,
        /// What it said.
        source: std::io::Error,
    },
    /// A value that no machine can have.
    #[error("{what} {value} is refused: {allowed}")]
    Config {
        /// Which value.
        what: &'static str,
        /// The value.
        value: u64,
        /// What is allowed.
        allowed: String,
    },
    /// The guest's memory could not be made or filled.
    #[error("Guest memory: {0}")]
    Memory(String),
    /// The kernel cannot be booted.
    #[error("Guest kernel cannot be booted: {0}")]
    Kernel(String),
    /// The initramfs does not fit.
    #[error("Initramfs of {size:#x} bytes does not fit between {kernel_end:#x} and {end:#x}")]
    InitramfsTooLarge {
        /// Its size, bytes.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// Where memory ends.
        end: u64,
    },
    /// The command line does not fit, or holds a NUL.
    #[error(
        "Kernel command line of {0} bytes is refused: at most {max}, no NUL",
        max = CMDLINE_MAX - 1
    )]
    Cmdline(usize),
    /// A processor could not be set up.
    #[error("vCPU: {0}")]
    Cpu(String),
    /// All slots are taken.
    #[error("All {0} device slots of the VM are taken")]
    NoSlot(usize),
    /// A device that no slot can take.
    #[error("Device has more queues than a slot takes, {LATER_QUEUES}")]
    Queues,
    /// The event loop could not be made.
    #[error(transparent)]
    Device(#[from] crate::virtio::Error),
    /// What the VMM may do could not be limited.
    #[error(transparent)]
    Confine(#[from] confine::Error),
    /// It could not be written down, or what was written cannot be used.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::Error),
    /// A snapshot of another machine than the one that is to go on.
    #[error("Snapshot does not fit: {0}")]
    Unfit(String),
    /// It runs, or has ended: only a paused machine can be written down.
    #[error("VM is not paused")]
    NotPaused,
}

impl Error {
    fn kvm(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { call, source }
    }

    fn io(what: &'static str) -> impl Fn(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

/// A machine. Dropping it stops it.
pub struct Machine {
    vcpus: Vcpus,
    bus: Arc<Bus>,
    serving: Serving,
    memory: GuestMemoryMmap,
    kvm: Kvm,
    // Last: what runs in it is gone by then.
    vm: VmFd,
}

impl Machine {
    /// Builds a machine, paused, with its kernel loaded. `ended` is called once when it ends, in a
    /// thread of its own, but not for [`Machine::stop`].
    ///
    /// # Errors
    /// [`Error`]: a value that cannot be, an unusable kernel, or KVM refuses.
    pub fn new(
        mut config: Config,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<Self, Error> {
        check(&config)?;
        let guest = memory::create(config.memory_mib << 20, config.shared_memory)?;
        let devices = std::mem::take(&mut config.devices).into_iter();
        let devices = devices.map(|device| {
            let queues = lock_device(&device).queue_sizes().len();
            (queues, Some(device))
        });
        let spares = (0..config.spare_slots).map(|_| (LATER_QUEUES, None));
        let slots = devices.chain(spares).collect();
        let parts = Parts::new(guest, config.vcpus, config.console, None, slots)?;
        let cmdline = cmdline(&config.boot.cmdline, parts.bus.slots.len());
        let entry = boot::load(&parts.memory, &mut config.boot, &cmdline, config.vcpus)?;
        ioapic::set_up(&parts.vm)?;
        let supported = cpu::supported(&parts.kvm)?;
        for (id, vcpu) in (0..).zip(&parts.cpus) {
            cpu::set_up(vcpu, &supported, id, config.vcpus)?;
        }
        cpu::enter(&parts.cpus[0], entry)?;
        parts.start(config.confined, ended)
    }

    /// Lets the processors run. Idempotent.
    pub fn resume(&self) {
        self.serving.resume();
        self.vcpus.resume();
    }

    /// Stops processors and devices where they are. Idempotent.
    pub fn pause(&self) {
        self.vcpus.pause();
        self.serving.pause();
    }

    /// Plugs a device into a spare slot; returns the slot, by which it is taken out again. The guest
    /// finds it when it looks there.
    ///
    /// # Errors
    /// [`Error::NoSlot`], [`Error::Queues`].
    pub fn plug(&self, device: Arc<Mutex<dyn Device>>) -> Result<usize, Error> {
        let slots = &self.bus.slots;
        let free = |(_, slot): &(usize, MutexGuard<'_, Transport>)| slot.is_empty();
        let found = slots.iter().map(lock).enumerate().find(free);
        let (index, mut slot) = found.ok_or(Error::NoSlot(slots.len()))?;
        let watch = self.serving.attach(&device);
        if slot.plug(Arc::clone(&device), watch.clone()) {
            return Ok(index);
        }
        self.serving.detach(&device, &watch);
        Err(Error::Queues)
    }

    /// Whether the guest's driver uses what is in a slot.
    #[must_use]
    pub fn is_driven(&self, slot: usize) -> bool {
        (self.bus.slots.get(slot)).is_some_and(|slot| lock(slot).is_driven())
    }

    /// Takes a device out of its slot; a driver that still uses it gets no answers. Idempotent.
    pub fn unplug(&self, slot: usize) {
        let taken = (self.bus.slots.get(slot)).and_then(|slot| lock(slot).unplug());
        if let Some((device, watch)) = taken {
            self.serving.detach(&device, &watch);
        }
    }

    /// Ends it. Idempotent: returns when no processor and no device does anything any more.
    pub fn stop(&self) {
        self.vcpus.stop();
        self.serving.pause();
        self.serving.stop();
        self.bus.flush_console();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

fn check(config: &Config) -> Result<(), Error> {
    let refused = |what, value: u64, allowed: String| Error::Config {
        what,
        value,
        allowed,
    };
    if !(1..=mptable::CPUS_MAX).contains(&config.vcpus) {
        let allowed = format!("1 to {} are allowed", mptable::CPUS_MAX);
        return Err(refused("Number of vCPUs", config.vcpus.into(), allowed));
    }
    // The top is what a process can map; KVM and the processor say the rest.
    if !(32..=4 << 20).contains(&config.memory_mib) {
        let allowed = "32 to 4194304 MiB are allowed".into();
        return Err(refused("Memory", config.memory_mib, allowed));
    }
    let slots = config.devices.len() + config.spare_slots;
    if slots > DEVICES_MAX {
        let allowed = format!("at most {DEVICES_MAX}, with those that can come later");
        return Err(refused("Number of devices", slots as u64, allowed));
    }
    Ok(())
}

/// The kernel's command line: what this machine is, what was asked for, where the devices are.
fn cmdline(asked: &str, slots: usize) -> String {
    let mut cmdline = format!("{CMDLINE} {asked}");
    for slot in 0..slots {
        let (at, irq) = (layout::registers(slot), layout::irq(slot));
        let _ = write!(cmdline, " virtio_mmio.device=4K@{at:#x}:{irq}");
    }
    cmdline
}

fn lock_device<'a>(device: &'a Arc<Mutex<dyn Device>>) -> MutexGuard<'a, dyn Device + 'static> {
    device
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
