//! A virtual processor before its first instruction: what it says of itself (CPUID), its
//! model-specific registers, and the state in which Linux' 64-bit boot protocol enters a kernel.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Kvm, VcpuFd};

use super::Error;
use super::boot::GDT_SIZE;
use super::layout::{GDT, PAGE_TABLES, ZERO_PAGE};

/// Leaf 1, ECX: the local APIC's timer takes a time stamp; nothing need be calibrated. KVM has it
/// and leaves it to the VMM to say so.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: there is a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, ECX: the local APIC can be reached by registers of the processor. Setting that up costs 200
/// exits, and makes interrupts for other processors cheaper; a single one has nobody to send any to, and
/// AMD's processors deliver to it without an exit only in the older mode.
const X2APIC: u32 = 1 << 21;
/// Leaf 1, EDX: memory type range registers. A guest of KVM without them has write-back memory, and
/// need not read 90 of them three times; its page attribute table says what is not.
const MTRR: u32 = 1 << 12;
/// First leaf of the hypervisor, and the one with the frequencies, kHz, of time stamp counter and
/// APIC bus (kernel: `Documentation/virt/kvm/x86/cpuid.rst`).
const KVM_LEAF: u32 = 0x4000_0000;
const FREQUENCY_LEAF: u32 = 0x4000_0010;
/// KVM's APIC timer counts nanoseconds.
const APIC_KHZ: u32 = 1_000_000;

/// `IA32_MISC_ENABLE` (Intel SDM 4, table 2-2) with fast string instructions.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const FAST_STRING: u64 = 1;
/// CR0: protection, bit 4 (always one), paging. CR4: physical addresses of more than 32 bits. EFER: long
/// mode, wanted and active (Intel SDM 3, 2.2.1 and 2.5).
const CR0_PROTECTED: u64 = 1 | 1 << 4 | 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG: u64 = 1 << 8 | 1 << 10;

/// What this host's KVM can show to a guest.
pub(super) fn supported(kvm: &Kvm) -> Result<CpuId, Error> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(Error::kvm("KVM_GET_SUPPORTED_CPUID"))
}

/// Sets up processor `id` of `count`.
pub(super) fn set_up(vcpu: &VcpuFd, supported: &CpuId, id: u32, count: u32) -> Result<(), Error> {
    let tsc_khz = vcpu.get_tsc_khz().unwrap_or(0);
    let cpuid = cpuid(supported, id, count, tsc_khz)?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(Error::kvm("KVM_SET_CPUID2"))?;
    let fast_string = kvm_msr_entry {
        index: MSR_MISC_ENABLE,
        data: FAST_STRING,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[fast_string]).map_err(|e| Error::Cpu(e.to_string()))?;
    match vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))? {
        1 => Ok(()),
        _ => Err(Error::Cpu(format!(
            "KVM refuses register {MSR_MISC_ENABLE:#x}"
        ))),
    }
}

/// The leaves for processor `id` of `count`: its number, how many there are, and the clocks' rates.
fn cpuid(supported: &CpuId, id: u32, count: u32, tsc_khz: u32) -> Result<CpuId, Error> {
    let mut entries = supported.as_slice().to_vec();
    // Bits of the APIC id that tell processors of one package apart.
    let bits = count.next_power_of_two().trailing_zeros();
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (1, _) => {
                entry.ebx = entry.ebx & 0xffff | count.min(255) << 16 | id << 24;
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.edx &= !MTRR;
                if count == 1 {
                    entry.ecx &= !X2APIC;
                }
            }
            // Extended topology: one thread for each core, all cores in one package.
            (0xb | 0x1f, level) => {
                entry.edx = id;
                (entry.eax, entry.ebx) = match level {
                    0 => (0, 1),
                    1 => (bits, count),
                    _ => (0, 0),
                };
                entry.ecx = level & 0xff | topology_level(level);
            }
            // AMD: number of cores, and this one's ids.
            (0x8000_0008, _) => entry.ecx = bits << 12 | (count - 1) & 0xff,
            (0x8000_001e, _) => (entry.eax, entry.ebx) = (id, id & 0xff),
            (KVM_LEAF, _) => entry.eax = FREQUENCY_LEAF,
            _ => {}
        }
    }
    entries.retain(|entry| entry.function != FREQUENCY_LEAF);
    entries.push(kvm_cpuid_entry2 {
        function: FREQUENCY_LEAF,
        eax: tsc_khz,
        ebx: APIC_KHZ,
        ..Default::default()
    });
    CpuId::from_entries(&entries).map_err(|e| Error::Cpu(e.to_string()))
}

/// Level type of extended topology, in place: threads, then cores, then nothing.
fn topology_level(level: u32) -> u32 {
    match level {
        0 => 1 << 8,
        1 => 2 << 8,
        _ => 0,
    }
}

/// The protocol's entry: long mode, flat segments, what is mapped is mapped to itself, RSI at the zero page.
pub(super) fn enter(vcpu: &VcpuFd, entry: u64) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x18,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 0x10,
        type_: 11,
        db: 0,
        l: 1,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 64-bit task state segment.
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x20,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, GDT_SIZE as u16 - 1);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    sregs.cr0 = CR0_PROTECTED;
    sregs.cr3 = PAGE_TABLES[0];
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LONG;
    vcpu.set_sregs(&sregs)
        .map_err(Error::kvm("KVM_SET_SREGS"))?;
    let regs = kvm_regs {
        rip: entry,
        rsi: ZERO_PAGE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(Error::kvm("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_processor_has_its_own_number_and_knows_how_many_there_are() {
        let leaf = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        let host = [leaf(1, 0), leaf(0xb, 0), leaf(0xb, 1), leaf(KVM_LEAF, 0)];
        let host = CpuId::from_entries(&host).unwrap();
        for id in 0..3 {
            let guest = cpuid(&host, id, 3, 2_500_000).unwrap();
            let [one, thread, core, kvm, clocks] = guest.as_slice() else {
                panic!("{guest:?}");
            };
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (id, 3));
            assert!(one.ecx & TSC_DEADLINE != 0);
            assert_eq!((thread.edx, core.edx), (id, id));
            assert_eq!((thread.eax, core.eax, core.ebx), (0, 2, 3));
            assert_eq!(kvm.eax, clocks.function);
            assert_eq!((clocks.eax, clocks.ebx), (2_500_000, APIC_KHZ));
        }
    }
}
