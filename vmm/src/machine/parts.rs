//! What a machine is put together from, whether it boots or goes on from a snapshot: KVM's objects, memory,
//! bus and slots. The processors have no state yet; giving them one is `cpu`'s, or `saved`'s.

use std::fs::File;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{Bus, lock};
use super::serving::{Serving, is_disk};
use super::vcpu::Vcpus;
use super::{End, Error, Machine, layout, serial};
use crate::confine::{self, May};
use crate::mmio::{INTERRUPT_ACK, Page, QUEUE_NOTIFY, Transport, USED_BUFFER};
use crate::virtio::{Device, Memory};

/// A machine whose processors have no state yet.
pub(super) struct Parts {
    pub(super) kvm: Kvm,
    pub(super) vm: VmFd,
    pub(super) memory: GuestMemoryMmap,
    pub(super) serving: Serving,
    pub(super) bus: Arc<Bus>,
    pub(super) cpus: Vec<VcpuFd>,
}

/// A slot to be: room for so many queues, and what is in it from the start.
pub(super) type SlotPlan = (usize, Option<Arc<Mutex<dyn Device>>>);

impl Parts {
    pub(super) fn new(
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
        let serving = Serving::new()?;
        let irq = serial::Line(irqfd(&vm, layout::SERIAL_IRQ)?);
        let console = serial::console(irq, serial::Sink::new(console), uart)
            .map_err(Error::io("restore the console"))?;
        let shared = Memory::new(memory.clone());
        let pages = give_pages(&vm, memory.num_regions(), slots.len())?;
        let bus = Arc::new(build_bus(&vm, &shared, &serving, console, slots, pages)?);
        let vcpu = |id: u32| {
            vm.create_vcpu(id.into())
                .map_err(Error::kvm("KVM_CREATE_VCPU"))
        };
        let cpus = (0..vcpus).map(vcpu).collect::<Result<_, _>>()?;
        Ok(Self {
            kvm,
            vm,
            memory,
            serving,
            bus,
            cpus,
        })
    }

    /// Starts the threads, paused; confined ones, and the calling one, before any runs the guest.
    pub(super) fn start(
        self,
        confined: Option<May>,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<Machine, Error> {
        if confined.is_some() {
            confine::process()?;
        }
        let last_words = Arc::clone(&self.bus);
        let ended = move |end| {
            last_words.flush_console();
            ended(end);
        };
        let vcpus = Vcpus::start(self.cpus, &self.bus, confined, ended)?;
        let disks = (self.bus.slots.iter()).any(|slot| lock(slot).device().is_none_or(is_disk));
        self.serving.start(disks, confined)?;
        if let Some(may) = confined {
            confine::thread(confine::Thread::Main, may)?;
        }
        Ok(Machine {
            vcpus,
            bus: self.bus,
            serving: self.serving,
            memory: self.memory,
            kvm: self.kvm,
            vm: self.vm,
        })
    }
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

/// Gives KVM what the guest reads of its slots; what it writes there exits. KVM's number `after` is free.
#[expect(unsafe_code, reason = "memory is given to KVM by address")]
fn give_pages(vm: &VmFd, after: usize, slots: usize) -> Result<&'static [Page], Error> {
    let pages: Vec<Page> = (0..slots).map(|_| Page::default()).collect();
    // The process's for good, like the guest's memory.
    let pages: &'static [Page] = pages.leak();
    if pages.is_empty() {
        return Ok(pages);
    }
    let region = kvm_bindings::kvm_userspace_memory_region {
        slot: after as u32,
        flags: kvm_bindings::KVM_MEM_READONLY,
        guest_phys_addr: layout::registers(0),
        memory_size: size_of_val(pages) as u64,
        userspace_addr: pages.as_ptr() as u64,
    };
    // SAFETY: the pages live as long as the process; the guest only reads them, and this process
    // writes them as atomics.
    unsafe { vm.set_user_memory_region(region) }
        .map_err(Error::kvm("KVM_SET_USER_MEMORY_REGION"))?;
    Ok(pages)
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
    serving: &Serving,
    console: serial::Console,
    plans: Vec<SlotPlan>,
    pages: &'static [Page],
) -> Result<Bus, Error> {
    let mut slots = Vec::new();
    // That a driver has seen that buffers were used interests nobody: KVM takes it for a signal to this.
    let nobody = eventfd()?;
    for (index, ((queues, device), page)) in plans.into_iter().zip(pages).enumerate() {
        let address = IoEventAddress::Mmio(layout::registers(index) + INTERRUPT_ACK);
        vm.register_ioevent(&nobody, &address, USED_BUFFER)
            .map_err(Error::kvm("KVM_IOEVENTFD"))?;
        let mut kicks = Vec::new();
        for queue in 0..queues {
            let kick = eventfd()?;
            let address = IoEventAddress::Mmio(layout::registers(index) + QUEUE_NOTIFY);
            vm.register_ioevent(&kick, &address, queue as u32)
                .map_err(Error::kvm("KVM_IOEVENTFD"))?;
            kicks.push(kick);
        }
        let irq = irqfd(vm, layout::irq(index))?;
        let mut slot = Transport::new(memory.clone(), irq, kicks, page);
        if let Some(device) = device {
            let watch = serving.attach(&device);
            slot.plug(device, watch);
        }
        slots.push(Mutex::new(slot));
    }
    Ok(Bus {
        console: Mutex::new(console),
        slots,
    })
}
