//! What a machine has beside processors, memory and virtio devices: interrupt controllers, the clock
//! that guests of KVM read, and the console's UART.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialState as Uart;

use super::Error;

/// Interrupt controllers and clock.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct VmState {
    chips: Vec<kvm_irqchip>,
    clock: kvm_clock_data,
}

impl VmState {
    pub(crate) fn save(vm: &VmFd) -> Result<Self, Error> {
        let chips = [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ];
        let chip = |chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            vm.get_irqchip(&mut chip)
                .map_err(Error::kvm("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        Ok(Self {
            chips: chips.into_iter().map(chip).collect::<Result<_, Error>>()?,
            clock: vm.get_clock().map_err(Error::kvm("KVM_GET_CLOCK"))?,
        })
    }

    /// The guest's clock goes on from where it stood: time does not pass for a machine on disk.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        for chip in &self.chips {
            vm.set_irqchip(chip)
                .map_err(Error::kvm("KVM_SET_IRQCHIP"))?;
        }
        let mut clock = self.clock;
        clock.flags = 0; // else KVM adds the time that has passed, or refuses what it only reports
        vm.set_clock(&clock).map_err(Error::kvm("KVM_SET_CLOCK"))
    }
}

/// The console's UART; what was typed and not read is not kept.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
}

impl From<Uart> for SerialState {
    fn from(uart: Uart) -> Self {
        Self {
            divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
        }
    }
}

impl From<SerialState> for Uart {
    fn from(state: SerialState) -> Self {
        Self {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: Vec::new(),
        }
    }
}
