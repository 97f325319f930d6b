//! A virtual processor's state, read from KVM and given back to it. Both need the processor to be out
//! of the guest, with what the guest last read already in its registers.
#![expect(unsafe_code, reason = "KVM_SET_XSAVE believes what it is given")]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use super::Error;

/// `IA32_TSC_DEADLINE` (Intel SDM 4): arms the local APIC's timer, and so comes after its clock.
const TSC_DEADLINE: u32 = 0x6e0;

/// A processor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug: kvm_debugregs,
    lapic: kvm_lapic_state,
    /// Number and value.
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
}

/// The model-specific registers that this host's KVM saves.
pub(crate) fn registers(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list();
    let list = list.map_err(Error::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}

impl VcpuState {
    /// Reads a processor. Reading some of it changes other parts, hence the order: whether it runs
    /// first, what is pending last.
    pub(crate) fn save(vcpu: &VcpuFd, registers: &[u32]) -> Result<Self, Error> {
        let mp_state = vcpu.get_mp_state();
        let mp_state = mp_state.map_err(Error::kvm("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
        let sregs = vcpu.get_sregs().map_err(Error::kvm("KVM_GET_SREGS"))?;
        let xsave = vcpu.get_xsave().map_err(Error::kvm("KVM_GET_XSAVE"))?;
        let xcrs = vcpu.get_xcrs().map_err(Error::kvm("KVM_GET_XCRS"))?;
        let debug = vcpu.get_debug_regs();
        let debug = debug.map_err(Error::kvm("KVM_GET_DEBUGREGS"))?;
        let lapic = vcpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
        let tsc_khz = vcpu.get_tsc_khz();
        let tsc_khz = tsc_khz.map_err(Error::kvm("KVM_GET_TSC_KHZ"))?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(Error::kvm("KVM_GET_CPUID2"))?;
        let msrs = read_registers(vcpu, registers)?;
        let events = vcpu.get_vcpu_events();
        let events = events.map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self {
            cpuid: cpuid.as_slice().to_vec(),
            tsc_khz,
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug,
            lapic,
            msrs,
            events,
        })
    }

    /// Makes a new processor this one.
    pub(crate) fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let cpuid = CpuId::from_entries(&self.cpuid);
        let cpuid = cpuid.map_err(|_| Error::TooMany("CPUID leaves"))?;
        vcpu.set_cpuid2(&cpuid)
            .map_err(Error::kvm("KVM_SET_CPUID2"))?;
        if vcpu.get_tsc_khz().ok() != Some(self.tsc_khz) {
            vcpu.set_tsc_khz(self.tsc_khz)
                .map_err(Error::kvm("KVM_SET_TSC_KHZ"))?;
        }
        vcpu.set_mp_state(self.mp_state)
            .map_err(Error::kvm("KVM_SET_MP_STATE"))?;
        vcpu.set_regs(&self.regs)
            .map_err(Error::kvm("KVM_SET_REGS"))?;
        vcpu.set_sregs(&self.sregs)
            .map_err(Error::kvm("KVM_SET_SREGS"))?;
        // SAFETY: the structure has the size that KVM reads: this process enables no feature of the
        // processor whose state would be larger (arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM).
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(Error::kvm("KVM_SET_XSAVE"))?;
        vcpu.set_xcrs(&self.xcrs)
            .map_err(Error::kvm("KVM_SET_XCRS"))?;
        vcpu.set_debug_regs(&self.debug)
            .map_err(Error::kvm("KVM_SET_DEBUGREGS"))?;
        vcpu.set_lapic(&self.lapic)
            .map_err(Error::kvm("KVM_SET_LAPIC"))?;
        let (last, first): (Vec<_>, Vec<_>) =
            (self.msrs.iter()).partition(|(index, _)| *index == TSC_DEADLINE);
        write_registers(vcpu, &first)?;
        write_registers(vcpu, &last)?;
        vcpu.set_vcpu_events(&self.events)
            .map_err(Error::kvm("KVM_SET_VCPU_EVENTS"))
    }
}

/// Reads those of the registers that this processor has.
fn read_registers(vcpu: &VcpuFd, registers: &[u32]) -> Result<Vec<(u32, u64)>, Error> {
    let mut found = Vec::new();
    let mut rest = registers;
    while !rest.is_empty() {
        let entries: Vec<_> = rest.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = entries_of(&entries)?;
        let count = (vcpu.get_msrs(&mut msrs)).map_err(Error::kvm("KVM_GET_MSRS"))?;
        let read = msrs.as_slice().iter().take(count);
        found.extend(read.map(|entry| (entry.index, entry.data)));
        // KVM stops at the first one it does not have.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(found)
}

fn write_registers(vcpu: &VcpuFd, registers: &[&(u32, u64)]) -> Result<(), Error> {
    let entries: Vec<_> = (registers.iter())
        .map(|(index, data)| entry(*index, *data))
        .collect();
    if entries.is_empty() {
        return Ok(());
    }
    let msrs = entries_of(&entries)?;
    let count = vcpu.set_msrs(&msrs).map_err(Error::kvm("KVM_SET_MSRS"))?;
    match registers.get(count) {
        None => Ok(()),
        Some((index, _)) => Err(Error::Register(*index)),
    }
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn entries_of(entries: &[kvm_msr_entry]) -> Result<Msrs, Error> {
    Msrs::from_entries(entries).map_err(|_| Error::TooMany("registers"))
}
