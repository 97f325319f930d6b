//! Capability names to sets of bits. Translation only.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};

use crate::sys::CapSets;

/// Number of a capability (linux/capability.h).
fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

fn bits(set: &Option<Capabilities>) -> u64 {
    set.iter()
        .flatten()
        .fold(0, |bits, capability| bits | 1 << number(*capability))
}

/// Bounding, ambient and the other sets of a process; all empty when it names none.
pub(super) fn sets(capabilities: Option<&LinuxCapabilities>) -> (u64, u64, CapSets) {
    let Some(c) = capabilities else {
        return (0, 0, CapSets::default());
    };
    let sets = CapSets {
        effective: bits(c.effective()),
        permitted: bits(c.permitted()),
        inheritable: bits(c.inheritable()),
    };
    (bits(c.bounding()), bits(c.ambient()), sets)
}
