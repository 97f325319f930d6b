//! Where everything lies in the guest's physical memory, and which interrupt is whose. Numbers only.
//!
//! ```text
//!  0x0000_0000  descriptors, zero page, page tables, command line      (boot.rs)
//!  0x000a_0000  nothing: the hole of a PC
//!  0x000f_0000  MP table
//!  0x0010_0000  memory: kernel, initramfs at its end      up to 3 GiB
//!  0xd000_0000  virtio-mmio, a page for each device
//!  0xfec0_0000  I/O APIC        0xfee0_0000  local APICs   (in the kernel)
//!  0x1_0000_0000  the rest of the memory
//! ```

use std::ops::Range;

/// Segment descriptors with which the kernel is entered.
pub(super) const GDT: u64 = 0x500;
/// `struct boot_params`, which boot loaders call the zero page.
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Page tables with which the kernel is entered, the first one the top.
pub(super) const PAGE_TABLES: [u64; 3] = [0x9000, 0xa000, 0xb000];
/// They map memory below this address to itself.
pub(super) const MAPPED: u64 = 1 << 30;
/// The kernel's command line.
pub(super) const CMDLINE: u64 = 0x2_0000;
/// Longest command line, bytes, with its NUL (x86's `COMMAND_LINE_SIZE`).
pub const CMDLINE_MAX: usize = 2048;

/// End of the memory below the PC's hole; nothing is below it that the guest must keep after boot.
pub(super) const LOW_END: u64 = 0xa_0000;
/// MP floating pointer and table, where a PC has its firmware: the kernel looks there (MP
/// specification 1.4, chapter 4).
pub(super) const MP_TABLE: u64 = 0xf_0000;
/// Memory that is the kernel's begins here.
pub(super) const HIGH_START: u64 = 0x10_0000;

/// Addresses below 4 GiB that are not memory.
pub(super) const HOLE: Range<u64> = 0xc000_0000..0x1_0000_0000;
/// virtio-mmio devices, one after the other.
pub(super) const MMIO: u64 = 0xd000_0000;
/// Size of a device's registers.
pub(super) const MMIO_SIZE: u64 = 0x1000;

/// I/O APIC of the kernel's interrupt controller.
pub(super) const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub(super) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors, and one more, in the hole.
pub(super) const KVM_TSS: usize = 0xfffb_d000;
pub(super) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// First port and interrupt of the serial console (COM1).
pub(super) const SERIAL_PORT: u16 = 0x3f8;
pub(super) const SERIAL_IRQ: u32 = 4;
/// Command port of the keyboard controller, by which a PC is reset.
pub(super) const I8042_COMMAND: u16 = 0x64;
/// The command that pulses the reset line.
pub(super) const I8042_RESET: u8 = 0xfe;

/// Interrupts of the I/O APIC that devices get, in their order. 0 to 4 and 8 are a PC's own.
const DEVICE_IRQS: [u32; 18] = [
    5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23,
];
/// Most devices of a VM: each has an interrupt of its own.
pub const DEVICES_MAX: usize = DEVICE_IRQS.len();

/// Interrupt of device `slot`.
pub(super) fn irq(slot: usize) -> u32 {
    DEVICE_IRQS[slot]
}

/// First address of the registers of device `slot`.
pub(super) fn registers(slot: usize) -> u64 {
    MMIO + slot as u64 * MMIO_SIZE
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What lies where before the kernel runs, with its size.
    const PLACES: [(u64, u64); 6] = [
        (GDT, super::super::boot::GDT_SIZE as u64),
        (ZERO_PAGE, 4096),
        (PAGE_TABLES[0], 3 * 4096),
        (CMDLINE, CMDLINE_MAX as u64),
        (MP_TABLE, 0x1_0000),
        (HIGH_START, 0),
    ];

    #[test]
    fn what_the_kernel_is_given_lies_one_after_the_other_and_below_it() {
        for pair in PLACES.windows(2) {
            let [(start, size), (next, _)] = pair else {
                panic!("{pair:?}");
            };
            assert!(start + size <= *next, "{start:#x} {next:#x}");
        }
        const { assert!(CMDLINE + CMDLINE_MAX as u64 <= LOW_END && LOW_END <= MP_TABLE) };
    }

    #[test]
    fn every_device_has_registers_in_the_hole_and_an_interrupt_of_its_own() {
        let mut irqs = Vec::new();
        for slot in 0..DEVICES_MAX {
            let registers = registers(slot);
            assert!(registers >= HOLE.start && registers + MMIO_SIZE <= IO_APIC.into());
            assert!(irq(slot) < 24 && irq(slot) != SERIAL_IRQ);
            irqs.push(irq(slot));
        }
        irqs.dedup();
        assert_eq!(irqs.len(), DEVICES_MAX);
    }
}
