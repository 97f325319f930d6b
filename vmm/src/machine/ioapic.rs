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

/// Sets up the pins.
pub(super) fn set_up(vm: &VmFd) -> Result<(), Error> {
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
    // SAFETY: KVM has just written the I/O APIC's state there, and every bit pattern is one.
    let pins = unsafe { &mut chip.chip.ioapic.redirtbl };
    for pin in &mut *pins {
        pin.bits = MASKED | SMI;
    }
    pins[0].bits = EXTERNAL;
    vm.set_irqchip(&chip).map_err(Error::kvm("KVM_SET_IRQCHIP"))
}
