//! The MP table: which processors there are and how interrupts are wired (MultiProcessor
//! Specification 1.4, chapter 4). It stands for ACPI, which would need an interpreter. Bytes only.

use super::layout::{IO_APIC, LOCAL_APIC, MP_TABLE};

/// Local APIC version of a processor with an integrated one.
const APIC_VERSION: u8 = 0x14;
/// Version of the I/O APIC that KVM has.
const IO_APIC_VERSION: u8 = 0x11;
const IO_APIC_PINS: u8 = 24;
/// Family 6, with an APIC; the kernel asks the processor itself.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
/// Most processors: APIC ids of 8 bits, one of which is the I/O APIC's and one of which means all.
pub(super) const CPUS_MAX: u32 = 254;

/// Pointer and table for `cpus` processors, to lie at [`MP_TABLE`].
pub(super) fn build(cpus: u32) -> Vec<u8> {
    let cpus = cpus.clamp(1, CPUS_MAX) as u8;
    let io_apic_id = cpus;
    let mut entries = Vec::new();
    let mut count: u16 = 0;
    let mut entry = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..cpus {
        // Enabled; the first one boots.
        let flags = 1 | u8::from(id == 0) << 1;
        let mut cpu = vec![0, id, APIC_VERSION, flags];
        cpu.extend(CPU_SIGNATURE.to_le_bytes());
        cpu.extend(CPU_FEATURES.to_le_bytes());
        cpu.extend([0; 8]);
        entry(&cpu);
    }
    entry(&[1, 0, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut io_apic = vec![2, io_apic_id, IO_APIC_VERSION, 1];
    io_apic.extend(IO_APIC.to_le_bytes());
    entry(&io_apic);
    // Interrupt n of the ISA bus is pin n; edges, active high, as the bus has it.
    for pin in 0..IO_APIC_PINS {
        entry(&[3, 0, 0, 0, 0, pin, io_apic_id, pin]);
    }
    // The old controller's output and the non-maskable interrupt.
    entry(&[4, 3, 0, 0, 0, 0, 0, 0]);
    entry(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    let mut table = Vec::from(*b"PCMP");
    table.extend((44 + entries.len() as u16).to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"SEALPOD MICROVM     ");
    table.extend([0; 6]);
    table.extend(count.to_le_bytes());
    table.extend(LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(&entries);
    table[7] = checksum(&table);

    let mut all = Vec::from(*b"_MP_");
    all.extend((MP_TABLE as u32 + 16).to_le_bytes());
    all.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    all[10] = checksum(&all);
    all.extend(table);
    all
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0_u8, |sum, b| sum.wrapping_add(*b))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointer_and_table_add_up_to_zero_and_name_their_sizes() {
        for cpus in [1, 2, CPUS_MAX] {
            let bytes = build(cpus);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            let length = u16::from_le_bytes([table[4], table[5]]);
            assert_eq!(usize::from(length), table.len());
            let count = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(u32::from(count), cpus + 1 + 1 + 24 + 2);
            assert_eq!(table.len() as u32, 44 + cpus * 20 + (1 + 1 + 24 + 2) * 8);
        }
    }
}
