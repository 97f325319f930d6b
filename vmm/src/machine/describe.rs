//! A machine in words: where its processors, interrupts and devices stand. For whoever looks for the
//! reason why a guest does not go on; nothing is decided by it.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, Msrs, kvm_lapic_state, kvm_msr_entry,
};
use kvm_ioctls::VcpuFd;

use super::bus::lock;
use super::{Error, Machine, ioapic, layout};

/// `IA32_TIME_STAMP_COUNTER` and `IA32_TSC_DEADLINE` (Intel SDM 4).
const TSC: [u32; 2] = [0x10, 0x6e0];
/// Offsets of a local APIC's registers (Intel SDM 3, table 11-1).
const TASK_PRIORITY: usize = 0x80;
const IN_SERVICE: usize = 0x100;
const REQUESTED: usize = 0x200;
const TIMER: usize = 0x320;
/// Eight registers of 32 vectors each, 16 bytes apart.
const VECTOR_REGISTERS: usize = 8;
const REGISTER_STRIDE: usize = 0x10;

impl Machine {
    /// A line for each processor and each slot. Takes a running machine out of the guest for that
    /// moment.
    ///
    /// # Errors
    /// [`Error::NotPaused`]: it has ended. [`Error::Kvm`].
    pub fn describe(&self) -> Result<Vec<String>, Error> {
        let runs = self.vcpus.are_to_run();
        self.pause();
        let lines = self.lines();
        if runs {
            self.resume();
        }
        lines
    }

    fn lines(&self) -> Result<Vec<String>, Error> {
        let processors = self.vcpus.each(processor).ok_or(Error::NotPaused)?;
        let processors = (processors.into_iter().enumerate())
            .map(|(id, line)| Ok(format!("Processor {id}: {}", line?)));
        let mut lines = processors.collect::<Result<Vec<_>, Error>>()?;
        let pins = ioapic::Pins::read(&self.vm)?;
        for (index, slot) in self.bus.slots.iter().enumerate() {
            if let Some(device) = lock(slot).describe() {
                let pin = pins.describe(layout::irq(index));
                lines.push(format!("Slot {index}: {device}; {pin}"));
            }
        }
        Ok(lines)
    }
}

fn processor(cpu: &VcpuFd) -> Result<String, Error> {
    // What is pending last, as a snapshot does it.
    let state = (cpu.get_mp_state()).map_err(Error::kvm("KVM_GET_MP_STATE"))?;
    let regs = cpu.get_regs().map_err(Error::kvm("KVM_GET_REGS"))?;
    let apic = cpu.get_lapic().map_err(Error::kvm("KVM_GET_LAPIC"))?;
    let tsc = tsc(cpu)?;
    let events = cpu.get_vcpu_events();
    let events = events.map_err(Error::kvm("KVM_GET_VCPU_EVENTS"))?;
    let state = match state.mp_state {
        KVM_MP_STATE_RUNNABLE => "runs".to_owned(),
        KVM_MP_STATE_HALTED => "halted".to_owned(),
        other => format!("in state {other}"),
    };
    let injected = match events.interrupt.injected {
        0 => "none".to_owned(),
        _ => format!("{:#x}", events.interrupt.nr),
    };
    Ok(format!(
        "{state} at {:#x}, stack {:#x}, flags {:#x}; interrupts: priority {:#x}, in service {:x?}, \
         requested {:x?}, injected {injected}; timer {:#x}, due at {:#x}, now {:#x}",
        regs.rip,
        regs.rsp,
        regs.rflags,
        register(&apic, TASK_PRIORITY),
        vectors(&apic, IN_SERVICE),
        vectors(&apic, REQUESTED),
        register(&apic, TIMER),
        tsc[1],
        tsc[0],
    ))
}

/// The clock and when it is to interrupt, 0 for not at all.
fn tsc(cpu: &VcpuFd) -> Result<[u64; 2], Error> {
    let entries = TSC.map(|index| kvm_msr_entry {
        index,
        ..Default::default()
    });
    let refused = |_| Error::Cpu("two registers are too many".into());
    let mut msrs = Msrs::from_entries(&entries).map_err(refused)?;
    cpu.get_msrs(&mut msrs)
        .map_err(Error::kvm("KVM_GET_MSRS"))?;
    let data = |at: usize| msrs.as_slice().get(at).map_or(0, |entry| entry.data);
    Ok([data(0), data(1)])
}

fn register(apic: &kvm_lapic_state, offset: usize) -> u32 {
    let bytes: [u8; 4] = std::array::from_fn(|i| apic.regs[offset + i].cast_unsigned());
    u32::from_le_bytes(bytes)
}

/// Interrupt vectors whose bit is set in the eight registers from `offset` on.
fn vectors(apic: &kvm_lapic_state, offset: usize) -> Vec<usize> {
    let is_set = |vector: &usize| {
        let at = offset + vector / 32 * REGISTER_STRIDE;
        register(apic, at) & 1 << (vector % 32) != 0
    };
    (0..VECTOR_REGISTERS * 32).filter(is_set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_of_an_apic_are_those_whose_bits_are_set() {
        let mut apic = kvm_lapic_state::default();
        // 0x22 is bit 2 of the second register, 0xff bit 31 of the eighth.
        apic.regs[REQUESTED + 0x10] = 4;
        apic.regs[REQUESTED + 0x73] = i8::MIN;
        assert_eq!(vectors(&apic, REQUESTED), [0x22, 0xff]);
        assert_eq!(vectors(&apic, IN_SERVICE), [0_usize; 0]);
        assert_eq!(register(&apic, REQUESTED + 0x70), 0x8000_0000);
    }
}
