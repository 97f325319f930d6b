//! The I/O APIC as firmware would leave it to a kernel. Linux reads and rewrites every pin several times
//! before it uses any (`arch/x86/kernel/apic/io_apic.c`), each access an exit; what it finds here makes it
//! skip 268 of them. A kernel that knows nothing of this finds masked pins.
#![expect(unsafe_code, reason = "KVM's interrupt controllers are a union")]

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_irqchip};
use kvm_ioctls::VmFd;

use super::Error;

/// Bits of a pin's entry (82093AA data sheet, 3.2.4): masked, and two kinds of delivery.
const MASKED: u64 = 1 << 16;
/// A system management interrupt. It is the firmware's, and a kernel does not clear it.
const SMI: u64 = 0b010 << 8;
/// The interrupt of the old controller (which has none here). A kernel looks for such a pin until it
/// finds one.
const EXTERNAL: u64 = 0b111 << 8;

fn read(vm: &VmFd) -> Result<kvm_irqchip, Error> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
    Ok(chip)
}

/// Sets up the pins.
pub(super) fn set_up(vm: &VmFd) -> Result<(), Error> {
    let mut chip = read(vm)?;
    // SAFETY: KVM has just written the I/O APIC's state there, and every bit pattern is one.
    let pins = unsafe { &mut chip.chip.ioapic.redirtbl };
    for pin in &mut *pins {
        pin.bits = MASKED | SMI;
    }
    pins[0].bits = EXTERNAL;
    vm.set_irqchip(&chip).map_err(Error::kvm("KVM_SET_IRQCHIP"))
}

/// Where the pins stand.
pub(super) struct Pins {
    entries: Vec<u64>,
    /// A bit for each pin whose interrupt has come and not been delivered.
    requested: u32,
}

impl Pins {
    pub(super) fn read(vm: &VmFd) -> Result<Self, Error> {
        let chip = read(vm)?;
        // SAFETY: KVM has just written the I/O APIC's state there, and every bit pattern is one.
        let (pins, requested) = unsafe { (chip.chip.ioapic.redirtbl, chip.chip.ioapic.irr) };
        // SAFETY: as above; an entry is 64 bits, by fields or as a whole.
        let entries = pins.iter().map(|pin| unsafe { pin.bits }).collect();
        Ok(Self { entries, requested })
    }

    /// One pin, in words.
    pub(super) fn describe(&self, pin: u32) -> String {
        let entry = self.entries.get(pin as usize).copied().unwrap_or_default();
        let masked = if entry & MASKED == 0 { "" } else { ", masked" };
        let requested = match self.requested & 1 << pin {
            0 => "",
            _ => ", requested",
        };
        format!("pin {pin} is vector {:#x}{masked}{requested}", entry & 0xff)
    }
}
