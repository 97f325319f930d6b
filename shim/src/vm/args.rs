//! QEMU's command line, from typed pieces. Pure: no file is touched and no descriptor opened.

use std::ffi::OsString;
use std::os::fd::RawFd;

use sealpod_attestation::evidence::Tee;

use super::process::{GUEST_FIRMWARE, INITRAMFS, KERNEL, SMALL};
use super::protection::{self, BOUNCE, PROTECTED};
use super::{Accelerator, Confidential};

/// A firmware that does no more than start a kernel; it is part of QEMU.
pub(super) const FIRMWARE: &str = "qboot.rom";
/// Longest kernel command line, bytes (x86's `COMMAND_LINE_SIZE`, with the NUL).
pub(super) const CMDLINE_MAX: usize = 2047;
/// Translated code that TCG keeps, MiB. It is the host's memory; QEMU's own default is 1 GiB.
const TCG_CACHE_MIB: u32 = 64;
/// What QEMU's own seccomp filter takes away: old system calls, changes of user, further programs,
/// scheduling and limits.
const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
/// The machine: q35 (microvm hangs under TCG) without what no guest uses.
pub(super) const MACHINE: &str = "q35,memory-backend=mem,hpet=off,smbus=off,sata=off,usb=off,vmport=off,\
    graphics=off,dump-guest-core=off,mem-merge=off";
/// Hot-plug as PCIe has it, which the guest's kernel knows; ACPI's way would shut it out.
const HOTPLUG: &str = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off";

/// A network device that is there from the start.
#[derive(Debug, Clone, Copy)]
pub(super) struct NicArgs {
    pub(super) fd: RawFd,
    pub(super) mac: [u8; 6],
    pub(super) mtu: u32,
}

/// Everything that differs between two VMs. Descriptors are numbers in QEMU.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    pub(super) name: &'a str,
    pub(super) accelerator: Accelerator,
    pub(super) vcpus: u32,
    pub(super) memory_mib: u64,
    pub(super) cmdline: &'a str,
    pub(super) firmware: bool,
    pub(super) monitor: RawFd,
    pub(super) console: RawFd,
    pub(super) vsock: RawFd,
    pub(super) share: Option<RawFd>,
    pub(super) nics: &'a [NicArgs],
    pub(super) hotplug_ports: u32,
    /// Its vCPUs wait for the monitor's word.
    pub(super) stopped: bool,
    /// How its memory is kept from the host, and where this processor has the C-bit.
    pub(super) protected: Option<(&'a Confidential, (u32, u32))>,
}

/// The kernel's command line: what this machine needs, then what was asked for. `tsc_khz` is the rate
/// of the host's time stamp counter.
pub(super) fn cmdline(
    accelerator: Accelerator,
    vcpus: u32,
    tsc_khz: Option<u64>,
    hotplug: bool,
    params: &[String],
) -> String {
    // reboot=t: a triple fault ends QEMU at once, whatever devices there are.
    // noreplace-smp, tsc=reliable: no code is patched and no clock watched that cannot change.
    // dummy: compiled in, it would make an interface nobody asked for.
    let fixed = "console=ttyS0 quiet reboot=t noreplace-smp tsc=reliable dummy.numdummies=0";
    let mut words = vec![fixed.to_owned(), SMALL.to_owned()];
    if accelerator == Accelerator::Tcg {
        // A translator has none of the processor's leaks, and pays for every barrier. Tables that
        // say what is known, and timers that nobody needs, cost 200 ms.
        words.push("mitigations=off acpi=off no_timer_check".into());
        words.extend(tsc_khz.map(|khz| format!("tsc_early_khz={khz}")));
        if vcpus == 1 {
            words.push("noapictimer".into());
        } else {
            // Several need the local timers, else theirs tick every 4 ms; what a loop costs is told
            // instead of measured on each. 4: a tick in ms.
            words.extend(tsc_khz.map(|khz| format!("lpj={}", 4 * khz)));
        }
        // virtiofsd writes file pages into guest memory behind the translator's back: a page that held
        // code keeps its old translation when it is used again, and the program that is read into it
        // crashes. The kernel clearing each page it hands out is a write that the translator sees.
        words.push("init_on_alloc=1".into());
    }
    if hotplug {
        // ACPI hands hot-plug over to kernels with link power management only, which a guest has not.
        words.push("pcie_ports=native".into());
    }
    words.extend_from_slice(params);
    words.join(" ")
}

/// Name of hot-plug port `index`.
pub(super) fn port(index: usize) -> String {
    format!("port{index}")
}

pub(super) fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// QEMU's arguments.
pub(super) fn build(vm: &Layout<'_>) -> Vec<OsString> {
    let mut args = Args(Vec::new());
    let memory = vm.memory_mib;
    let cpus = vm.vcpus;
    args.flag("-nodefaults");
    args.flag("-no-user-config");
    // A guest that resets or panics is gone.
    args.flag("-no-reboot");
    if vm.stopped {
        args.flag("-S");
    }
    args.pair("-name", Value::new(&format!("sealpod-{}", vm.name)));
    args.pair("-display", Value::new("none"));
    args.pair("-sandbox", Value::new(SANDBOX));
    let protected = if vm.protected.is_some() {
        PROTECTED
    } else {
        ""
    };
    args.pair("-machine", Value::new(&format!("{MACHINE}{protected}")));
    args.pair("-global", Value::new(HOTPLUG));
    if let Some((guest, bit)) = vm.protected {
        args.pair("-global", Value::new(BOUNCE));
        args.pair("-object", protection::object(guest, bit));
    }
    match vm.accelerator {
        Accelerator::Kvm if vm.protected.is_some_and(|(c, _)| c.tee == Tee::Snp) => {
            args.pair("-accel", Value::new("kvm"));
            // The measurement has the model in it.
            let cpu = vm.protected.map_or("", |(c, _)| c.cpu.as_str());
            args.pair("-cpu", Value::new(cpu));
        }
        Accelerator::Kvm => {
            args.pair("-accel", Value::new("kvm"));
            args.pair("-cpu", Value::new("host"));
        }
        Accelerator::Tcg => {
            let tcg = Value::new("tcg").with("thread", "multi");
            args.pair("-accel", tcg.with("tb-size", &TCG_CACHE_MIB.to_string()));
            // String instructions by bytes are slow when translated.
            args.pair("-cpu", Value::new("max,-erms,-fsrm"));
        }
    }
    args.pair("-smp", Value::new(&cpus.to_string()));
    args.pair("-m", Value::new(&format!("{memory}M")));
    let backend = Value::new("memory-backend-memfd").with("id", "mem");
    let backend = backend.with("size", &format!("{memory}M"));
    args.pair("-object", backend.with("share", "on"));
    if vm.protected.is_some() {
        args.pair("-bios", Value::new(GUEST_FIRMWARE));
    } else if vm.firmware {
        args.pair("-bios", Value::new(FIRMWARE));
    }
    args.pair("-kernel", Value::new(KERNEL));
    args.pair("-initrd", Value::new(INITRAMFS));
    args.flag("-append");
    // Not a list of options: a comma is a comma.
    args.flag(vm.cmdline);

    args.socket("monitor", vm.monitor);
    args.pair(
        "-mon",
        Value::new("chardev=monitor").with("mode", "control"),
    );
    args.socket("console", vm.console);
    args.pair("-serial", Value::new("chardev:console"));
    args.socket("vsock", vm.vsock);
    args.device("vhost-user-vsock-pci", "vsock0", &[("chardev", "vsock")]);
    if let Some(share) = vm.share {
        args.socket("share", share);
        let device = Value::new("vhost-user-fs-pci").with("id", "share0");
        let tag = ("tag", sealpod_protocol::SHARE_TAG);
        // It has no legacy interface to disable.
        args.pair("-device", device.with_all(&[("chardev", "share"), tag]));
    }
    for (index, nic) in vm.nics.iter().enumerate() {
        let net = format!("net{index}");
        let tap = Value::new("tap").with("id", &net);
        args.pair("-netdev", tap.with("fd", &nic.fd.to_string()));
        let (mac, mtu) = (mac_text(nic.mac), nic.mtu.to_string());
        // The guest boots from no network: no ROM for it.
        let properties = [
            ("netdev", net.as_str()),
            ("mac", &mac),
            ("host_mtu", &mtu),
            ("romfile", ""),
        ];
        args.device("virtio-net-pci", &format!("nic{index}"), &properties);
    }
    for index in 0..vm.hotplug_ports {
        let number = (index + 1).to_string();
        let id = port(usize::try_from(index).unwrap_or(usize::MAX));
        // Chassis and slot name the port to the guest and must differ between ports.
        let properties = [("chassis", number.as_str()), ("slot", &number)];
        args.pair(
            "-device",
            Value::new("pcie-root-port")
                .with("id", &id)
                .with_all(&properties),
        );
    }
    args.0
}

/// The options of one device, socket or object: `first,key=value,…`.
pub(super) struct Value(pub(super) String);

impl Value {
    /// `first` is written as it is.
    pub(super) fn new(first: &str) -> Self {
        Self(first.into())
    }

    /// Adds `key=value`. A comma in the value is doubled, so that it does not start a key.
    pub(super) fn with(mut self, key: &str, value: &str) -> Self {
        self.0
            .push_str(&format!(",{key}={}", value.replace(',', ",,")));
        self
    }

    fn with_all(self, pairs: &[(&str, &str)]) -> Self {
        pairs
            .iter()
            .fold(self, |v, (key, value)| v.with(key, value))
    }
}

pub(super) struct Args(pub(super) Vec<OsString>);

impl Args {
    pub(super) fn flag(&mut self, text: &str) {
        self.0.push(text.into());
    }

    pub(super) fn pair(&mut self, flag: &str, value: Value) {
        self.flag(flag);
        self.flag(&value.0);
    }

    /// A connected socket that QEMU was given.
    fn socket(&mut self, id: &str, fd: RawFd) {
        let socket = Value::new("socket").with("id", id);
        self.pair("-chardev", socket.with("fd", &fd.to_string()));
    }

    /// A virtio device without the legacy interface, which would cost I/O ports.
    fn device(&mut self, driver: &str, id: &str, properties: &[(&str, &str)]) {
        let device = Value::new(driver).with("id", id).with_all(properties);
        self.pair("-device", device.with("disable-legacy", "on"));
    }
}

#[cfg(test)]
mod tests {
    use sealpod_attestation::encoding::base64;
    use sealpod_attestation::init_data;

    use super::super::process::QUOTE_SOCKET;
    use super::super::protection::tests::guest;
    use super::*;

    fn layout(nics: &[NicArgs]) -> Layout<'_> {
        Layout {
            name: "0123456789abcdef",
            accelerator: Accelerator::Tcg,
            vcpus: 2,
            memory_mib: 512,
            cmdline: "console=ttyS0 a=b,c",
            firmware: true,
            monitor: 3,
            console: 4,
            vsock: 5,
            share: None,
            nics,
            hotplug_ports: 0,
            stopped: false,
            protected: None,
        }
    }

    fn text(vm: &Layout<'_>) -> String {
        let words: Vec<String> = build(vm)
            .into_iter()
            .map(|w| w.into_string().unwrap())
            .collect();
        words.join(" ")
    }

    #[test]
    fn the_smallest_vm_has_no_device_that_was_not_asked_for() {
        let all = text(&layout(&[]));
        assert!(all.contains("-chardev socket,id=vsock,fd=5 -device vhost-user-vsock-pci"));
        assert!(all.contains("-append console=ttyS0 a=b,c"));
        assert!(all.contains("size=512M,share=on"));
        for absent in [
            "virtio-net",
            "vhost-user-fs",
            "root-port",
            "kvm",
            "virtio-blk",
        ] {
            assert!(!all.contains(absent), "{absent} in {all}");
        }
    }

    #[test]
    fn each_device_gets_its_own_descriptor_and_number() {
        let nic = |fd, last| NicArgs {
            fd,
            mac: [2, 0, 0, 0, 0xab, last],
            mtu: 1450,
        };
        let nics = [nic(7, 1), nic(8, 2)];
        let vm = Layout {
            accelerator: Accelerator::Kvm,
            share: Some(6),
            hotplug_ports: 2,
            ..layout(&nics)
        };
        let all = text(&vm);
        for part in [
            "-accel kvm -cpu host",
            "socket,id=share,fd=6 -device vhost-user-fs-pci,id=share0,chardev=share,tag=sealpod",
            "tap,id=net0,fd=7",
            "id=nic1,netdev=net1,mac=02:00:00:00:ab:02,host_mtu=1450",
            "pcie-root-port,id=port0,chassis=1,slot=1",
            "pcie-root-port,id=port1,chassis=2,slot=2",
        ] {
            assert!(all.contains(part), "{part} not in {all}");
        }
        assert!(!all.contains("tcg"));
    }

    #[test]
    fn a_confidential_guest_is_measured_bound_to_its_init_data_and_shares_what_devices_need() {
        let snp = guest(Tee::Snp);
        let vm = Layout {
            accelerator: Accelerator::Kvm,
            protected: Some((&snp, (51, 1))),
            ..layout(&[])
        };
        let all = text(&vm);
        let host_data = base64(&init_data::host_data(&snp.init_data));
        for part in [
            "confidential-guest-support=tee,kernel-irqchip=split,smm=off",
            "-global virtio-device.iommu_platform=on",
            "-object sev-snp-guest,id=tee,policy=0x30000,cbitpos=51,reduced-phys-bits=1,kernel-hashes=on",
            &format!("host-data={host_data}"),
            "-accel kvm -cpu EPYC-Milan",
            "-bios /boot/firmware -kernel /boot/vmlinux -initrd /boot/initramfs",
        ] {
            assert!(all.contains(part), "{part} not in {all}");
        }
        assert!(!all.contains(FIRMWARE) && !all.contains("tdx"));

        let td = guest(Tee::Tdx);
        let vm = Layout {
            protected: Some((&td, (0, 0))),
            ..vm
        };
        let all = text(&vm);
        let object = all.split("-object ").find(|o| o.starts_with('{'));
        let object = object.and_then(|o| o.split(" -").next()).expect("object");
        let object: serde_json::Value = serde_json::from_str(object).expect("JSON");
        assert_eq!(object["qom-type"], "tdx-guest");
        let bound = base64(&init_data::mr_config_id(&td.init_data));
        assert_eq!(object["mrconfigid"], bound);
        assert_eq!(object["quote-generation-socket"]["path"], QUOTE_SOCKET);
        assert!(all.contains("-accel kvm -cpu host") && !all.contains("sev"));
        // No plain guest has any of it.
        let plain = text(&layout(&[]));
        assert!(!plain.contains("iommu_platform") && !plain.contains("confidential"));
    }

    #[test]
    fn a_comma_in_a_value_does_not_start_a_key() {
        let value = Value::new("x").with("id", "a,readonly=off");
        assert_eq!(value.0, "x,id=a,,readonly=off");
    }

    #[test]
    fn what_a_translator_needs_is_told_to_its_guest_only() {
        let params = ["sealpod.x=1".to_owned()];
        let tcg = cmdline(Accelerator::Tcg, 1, Some(2_000_000), false, &params);
        assert!(
            tcg.ends_with("tsc_early_khz=2000000 noapictimer init_on_alloc=1 sealpod.x=1"),
            "{tcg}"
        );
        assert!(tcg.contains("mitigations=off") && !tcg.contains("pcie"));
        let several = cmdline(Accelerator::Tcg, 2, Some(2_000_000), false, &params);
        assert!(
            several.contains(" lpj=8000000 ") && !several.contains("noapictimer"),
            "{several}"
        );
        let kvm = cmdline(Accelerator::Kvm, 1, Some(2_000_000), true, &params);
        for absent in ["mitigations", "acpi", "tsc_early", "init_on_alloc"] {
            assert!(!kvm.contains(absent), "{kvm}");
        }
        assert!(kvm.contains("pcie_ports=native"));
    }
}
