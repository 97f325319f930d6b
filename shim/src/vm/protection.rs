//! What QEMU is told of a confidential guest: the object that protects it, and what its machine has or has not
//! because of it. Pure, as `args`.

use sealpod_attestation::encoding::base64;
use sealpod_attestation::evidence::Tee;
use sealpod_attestation::init_data;

use super::args::Value;
use super::process::QUOTE_SOCKET;
use super::{Confidential, confidential};

/// What the machine of a confidential guest has besides: its protection, and nothing that the host would have
/// to emulate inside of it.
pub(super) const PROTECTED: &str = ",confidential-guest-support=tee,kernel-irqchip=split,smm=off";
/// Devices reach such a guest's memory by what it shares for the purpose only.
pub(super) const BOUNCE: &str = "virtio-device.iommu_platform=on";
/// POLICY of SNP guests (SEV-SNP ABI, table 10): the bit that must be set, and SMT. No debugging, no migration.
const SNP_POLICY: &str = "0x30000";

/// The object that protects a guest (QEMU, qapi/qom.json: SevSnpGuestProperties, TdxGuestProperties).
pub(super) fn object(guest: &Confidential, (bit, reduced): (u32, u32)) -> Value {
    let raw = &guest.init_data;
    let kind = confidential::object(guest.tee);
    match guest.tee {
        Tee::Snp => {
            let value = Value::new(kind)
                .with("id", "tee")
                .with("policy", SNP_POLICY)
                .with("cbitpos", &bit.to_string())
                .with("reduced-phys-bits", &reduced.to_string())
                .with("kernel-hashes", "on");
            value.with("host-data", &base64(&init_data::host_data(raw)))
        }
        Tee::Tdx => {
            let mut object = serde_json::json!({
                "qom-type": kind,
                "id": "tee",
                "sept-ve-disable": true,
                "mrconfigid": base64(&init_data::mr_config_id(raw)),
            });
            if guest.quote_socket.is_some() {
                let socket = serde_json::json!({"type": "unix", "path": QUOTE_SOCKET});
                object["quote-generation-socket"] = socket;
            }
            Value(object.to_string())
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::args::{Args, MACHINE};
    use super::super::find_program;
    use super::*;

    pub(in super::super) fn guest(tee: Tee) -> Confidential {
        Confidential {
            tee,
            firmware: "/ovmf".into(),
            init_data: b"version = \"0.1.0\"".to_vec(),
            cpu: "EPYC-Milan".into(),
            quote_socket: Some("/run/qgs".into()),
        }
    }

    /// QEMU's first complaint about a machine that is protected like this, on KVM.
    fn complaint(guest: &Confidential, more: &str) -> Option<String> {
        let mut args = Args(Vec::new());
        for flag in ["-nodefaults", "-no-user-config", "-S"] {
            args.flag(flag);
        }
        args.pair("-display", Value::new("none"));
        args.pair("-machine", Value::new(&format!("{MACHINE}{PROTECTED}")));
        args.pair("-accel", Value::new("kvm"));
        args.pair("-cpu", Value::new(&guest.cpu));
        args.pair("-m", Value::new("256M"));
        let backend = Value::new("memory-backend-memfd").with("id", "mem");
        let backend = backend.with("size", "256M").with("share", "on");
        args.pair("-object", backend);
        args.pair("-global", Value::new(BOUNCE));
        let mut protection = object(guest, (51, 1));
        protection.0.push_str(more);
        args.pair("-object", protection);
        let qemu = find_program("qemu-system-x86_64".as_ref()).ok()?;
        let out = std::process::Command::new(qemu)
            .args(args.0)
            .stdin(std::process::Stdio::null())
            .output()
            .ok()?;
        Some(String::from_utf8_lossy(&out.stderr).into_owned())
    }

    #[test]
    fn qemu_takes_every_word_of_a_protected_machine_and_misses_the_hardware_only() {
        // On a machine that has it QEMU would start, and wait for ever.
        if confidential::of_host("/sys".as_ref()).is_ok() {
            eprintln!("SKIPPED: this machine has confidential guests");
            return;
        }
        for tee in [Tee::Snp, Tee::Tdx] {
            let guest = guest(tee);
            let qemu = find_program("qemu-system-x86_64".as_ref());
            if !qemu.is_ok_and(|q| confidential::qemu_has(tee, &q).is_ok()) {
                eprintln!("SKIPPED: no QEMU with {}", confidential::object(tee));
                continue;
            }
            let said = complaint(&guest, "").expect("QEMU");
            let hardware = [
                "not supported by KVM",
                "KVM required",
                "KVM kernel module",
                "failed to initialize kvm",
                "/dev/sev",
            ];
            assert!(hardware.iter().any(|part| said.contains(part)), "{said}");
            if tee == Tee::Snp {
                let said = complaint(&guest, ",nonsense=1").expect("QEMU");
                assert!(said.contains("parameter 'nonsense'"), "{said}");
            }
        }
    }
}
