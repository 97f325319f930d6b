//! A virtual machine on KVM: memory, processors, interrupts and slots for virtio devices, without
//! firmware, PCI or ACPI. `docs/vmm.md` has its map. Devices are made by whoever uses this; processes,
//! privileges and the control protocol are no business of this room.
//!
//! ```text
//!  Machine::new ─▶ built ─ resume() ─▶ running ◀─ pause() / resume() ─▶ paused
//!                                          │
//!                                          └─ the guest resets or fails; stop() ─▶ ended (told once)
//! ```

mod boot;
mod bus;
mod cpu;
mod layout;
mod memory;
mod mptable;
mod saved;
mod serial;
mod vcpu;

use std::fmt::Write;
use std::fs::File;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

pub use boot::Boot;
pub use layout::{CMDLINE_MAX, DEVICES_MAX};
pub use saved::Restore;

use crate::mmio::{QUEUE_NOTIFY, Transport};
use crate::virtio::{Device, EventLoop, Memory};
use bus::{Bus, lock};
use vcpu::Vcpus;

/// Queues of a device that is plugged in later: a network device's pair and its control queue.
const LATER_QUEUES: usize = 3;
/// What the kernel must know of a machine without ACPI and PCI: not to look for them, and that it
/// restarts by a triple fault.
const CMDLINE: &str = "acpi=off pci=off reboot=t";
/// The thread that serves the devices needs little.
const STACK: usize = 256 * 1024;

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
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest has reset it, which is how a guest ends.
    Guest,
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
    events: Arc<EventLoop>,
    memory: GuestMemoryMmap,
    kvm: Kvm,
    // Last: what runs in it is gone by then.
    vm: VmFd,
}

/// A machine whose processors have no state yet.
struct Parts {
    kvm: Kvm,
    vm: VmFd,
    memory: GuestMemoryMmap,
    events: Arc<EventLoop>,
    bus: Arc<Bus>,
    cpus: Vec<VcpuFd>,
}

/// A slot to be: room for so many queues, and what is in it from the start.
type SlotPlan = (usize, Option<Arc<Mutex<dyn Device>>>);

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
        let supported = cpu::supported(&parts.kvm)?;
        for (id, vcpu) in (0..).zip(&parts.cpus) {
            cpu::set_up(vcpu, &supported, id, config.vcpus)?;
        }
        cpu::enter_pvh(&parts.cpus[0], entry)?;
        parts.start(ended)
    }

    /// Lets the processors run. Idempotent.
    pub fn resume(&self) {
        self.events.resume();
        self.vcpus.resume();
    }

    /// Stops processors and devices where they are. Idempotent.
    pub fn pause(&self) {
        self.vcpus.pause();
        self.events.pause();
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
        let watch = self.events.attach(Arc::clone(&device));
        if slot.plug(device, watch.clone()) {
            return Ok(index);
        }
        self.events.detach(&watch);
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
        if let Some((_, watch)) = taken {
            self.events.detach(&watch);
        }
    }

    /// Ends it. Idempotent: returns when no processor and no device does anything any more.
    pub fn stop(&self) {
        self.vcpus.stop();
        self.events.pause();
        self.events.stop();
        self.bus.flush_console();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Parts {
    fn new(
        memory: GuestMemoryMmap,
        vcpus: u32,
        console: File,
        uart: Option<&vm_superio::serial::SerialState>,
        slots: Vec<SlotPlan>,
    ) -> Result<Self, Error> {
        let kvm = Kvm::new().map_err(Error::kvm("to open /dev/kvm"))?;
        let vm = kvm.create_vm().map_err(Error::kvm("KVM_CREATE_VM"))?;
        give_memory(&vm, &memory)?;
        vm.set_tss_address(layout::KVM_TSS)
            .map_err(Error::kvm("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(Error::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.create_irq_chip()
            .map_err(Error::kvm("KVM_CREATE_IRQCHIP"))?;
        let events = Arc::new(EventLoop::new()?);
        let irq = serial::Line(irqfd(&vm, layout::SERIAL_IRQ)?);
        let console = serial::console(irq, serial::Sink::new(console), uart)
            .map_err(Error::io("restore the console"))?;
        let shared = Memory::new(memory.clone());
        let bus = Arc::new(build_bus(&vm, &shared, &events, console, slots)?);
        let vcpu = |id: u32| {
            vm.create_vcpu(id.into())
                .map_err(Error::kvm("KVM_CREATE_VCPU"))
        };
        let cpus = (0..vcpus).map(vcpu).collect::<Result<_, _>>()?;
        Ok(Self {
            kvm,
            vm,
            memory,
            events,
            bus,
            cpus,
        })
    }

    /// Starts the threads, paused.
    fn start(self, ended: impl FnOnce(End) + Send + 'static) -> Result<Machine, Error> {
        let last_words = Arc::clone(&self.bus);
        let ended = move |end| {
            last_words.flush_console();
            ended(end);
        };
        let vcpus = Vcpus::start(self.cpus, &self.bus, ended)?;
        let serving = Arc::clone(&self.events);
        let serve = move || {
            if let Err(e) = serving.run() {
                tracing::error!("The VM's devices stop: {e}");
            }
        };
        thread::Builder::new()
            .name("devices".into())
            .stack_size(STACK)
            .spawn(serve)
            .map_err(Error::io("start the devices' thread"))?;
        Ok(Machine {
            vcpus,
            bus: self.bus,
            events: self.events,
            memory: self.memory,
            kvm: self.kvm,
            vm: self.vm,
        })
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

/// Gives KVM the guest's memory.
#[expect(unsafe_code, reason = "guest memory is given to KVM by address")]
fn give_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_bindings::kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the memory is mapped for as long as the process lives (memory.rs), and what the
        // guest does with it is seen through volatile accesses only.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

fn eventfd() -> Result<EventFd, Error> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(Error::io("make an eventfd"))
}

/// An eventfd that raises an interrupt of the guest.
fn irqfd(vm: &VmFd, irq: u32) -> Result<EventFd, Error> {
    let fd = eventfd()?;
    vm.register_irqfd(&fd, irq)
        .map_err(Error::kvm("KVM_IRQFD"))?;
    Ok(fd)
}

/// The console and the slots, with the devices that are there from the start.
fn build_bus(
    vm: &VmFd,
    memory: &Memory,
    events: &EventLoop,
    console: serial::Console,
    plans: Vec<SlotPlan>,
) -> Result<Bus, Error> {
    let mut slots = Vec::new();
    for (index, (queues, device)) in plans.into_iter().enumerate() {
        let mut kicks = Vec::new();
        for queue in 0..queues {
            let kick = eventfd()?;
            let address = IoEventAddress::Mmio(layout::registers(index) + QUEUE_NOTIFY);
            vm.register_ioevent(&kick, &address, queue as u32)
                .map_err(Error::kvm("KVM_IOEVENTFD"))?;
            kicks.push(kick);
        }
        let irq = irqfd(vm, layout::irq(index))?;
        let mut slot = Transport::new(memory.clone(), irq, kicks);
        if let Some(device) = device {
            let watch = events.attach(Arc::clone(&device));
            slot.plug(device, watch);
        }
        slots.push(Mutex::new(slot));
    }
    Ok(Bus {
        console: Mutex::new(console),
        slots,
    })
}

fn lock_device<'a>(device: &'a Arc<Mutex<dyn Device>>) -> MutexGuard<'a, dyn Device + 'static> {
    device
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
