//! The kernel and the programs of this node: KVM, QEMU, virtiofsd, cgroups, and the network, which is
//! tried for real in a namespace of its own.

use std::path::Path;

use super::{Finding, chain, version};
use crate::{
    config::{Accelerator, Config, Hypervisor},
    network::{self, portforward::PortForward},
    pod::protect,
    vm::{self, check_initramfs, check_kernel, find_program, probe},
};

/// QEMU's oldest major version that is known to work.
const QEMU_LEAST: u32 = 7;
const CGROUP_ROOT: &str = "/sys/fs/cgroup";
/// Controllers that hold a pod's VM to its limits.
const CONTROLLERS: [&str; 4] = ["cpu", "cpuset", "memory", "pids"];

pub(super) fn kvm(config: &Config) -> Finding {
    let name = "KVM";
    let found = probe::probe();
    if found.is_real() {
        return Finding::ok(name, found.to_string());
    }
    match config.hypervisor.accelerator {
        Accelerator::Kvm => Finding::missing(
            name,
            found.to_string(),
            "set hypervisor.accelerator to auto, or use a machine with hardware KVM",
        ),
        Accelerator::Auto | Accelerator::Tcg => Finding::warn(
            name,
            found.to_string(),
            "pods run under TCG, slower; for KVM, switch virtualisation on in the firmware or use bare metal",
        ),
    }
}

pub(super) fn qemu(config: &Hypervisor) -> Finding {
    let name = "QEMU";
    let fix = "install it (Debian: apt install -t bookworm-backports qemu-system-x86), or set hypervisor.qemu";
    let Ok(path) = find_program(&config.qemu) else {
        return Finding::missing(name, format!("{} not found", config.qemu.display()), fix);
    };
    let Some(text) = version(&path) else {
        return Finding::missing(name, format!("{} does not run", path.display()), fix);
    };
    // "QEMU emulator version 10.0.2 (Debian …)"
    let number = text.split("version ").nth(1).unwrap_or_default();
    let major = number.split('.').next().and_then(|m| m.parse::<u32>().ok());
    let number = number.split(' ').next().unwrap_or_default();
    let found = format!("{number}, {}", path.display());
    match major {
        Some(major) if major < QEMU_LEAST => Finding::missing(
            name,
            found,
            format!("version {QEMU_LEAST} or later is needed: {fix}"),
        ),
        _ => Finding::ok(name, found),
    }
}

pub(super) fn kernel(path: &Path) -> Finding {
    image("guest kernel", path, "hypervisor.kernel", check_kernel)
}

pub(super) fn initramfs(path: &Path) -> Finding {
    image("initramfs", path, "hypervisor.initramfs", check_initramfs)
}

fn image<E: std::error::Error>(
    name: &'static str,
    path: &Path,
    key: &str,
    check: fn(&Path) -> Result<(), E>,
) -> Finding {
    match check(path) {
        Ok(()) => Finding::ok(name, path.display().to_string()),
        Err(e) => {
            let fix =
                format!("`make build` makes it, `make install` puts it in place; or set {key}");
            Finding::missing(name, chain(&e), fix)
        }
    }
}

/// Confidential guests: missing only where the node is to have them.
pub(super) fn confidential(config: &Config) -> Finding {
    let name = "confidential guests";
    let accelerator = match probe::probe().is_real() {
        true => vm::Accelerator::Kvm,
        false => vm::Accelerator::Tcg,
    };
    match protect::decide(config, None, accelerator) {
        Ok(Some(guest)) => Finding::ok(name, vm::confidential::name(guest.tee)),
        Ok(None) => match vm::confidential::of_host(Path::new("/sys")) {
            Ok(tee) => {
                let tee = vm::confidential::name(tee);
                Finding::ok(
                    name,
                    format!("{tee} is there; hypervisor.confidential is none"),
                )
            }
            Err(_) => Finding::ok(name, "none here, none configured"),
        },
        Err(e) => Finding::missing(
            name,
            e.message,
            "docs/vm.md says what SEV-SNP and TDX need; or set hypervisor.confidential to none",
        ),
    }
}

pub(super) fn virtiofsd(path: &Path) -> Finding {
    let name = "virtiofsd";
    match find_program(path).map(|p| version(&p)) {
        Ok(Some(version)) => Finding::ok(name, format!("{version}, {}", path.display())),
        Ok(None) => Finding::missing(
            name,
            format!("{} does not run", path.display()),
            "build it again: shim/get-virtiofsd.sh",
        ),
        Err(_) => Finding::missing(
            name,
            format!("{} not found", path.display()),
            "`make install` puts it in place, or set hypervisor.virtiofsd",
        ),
    }
}

pub(super) fn vsock() -> Finding {
    let host = if Path::new("/dev/vhost-vsock").exists() {
        "there, not used"
    } else {
        "not there"
    };
    Finding::ok(
        "vsock",
        format!("in user space; needs no /dev/vhost-vsock ({host})"),
    )
}

pub(super) fn cgroups() -> Finding {
    let name = "cgroups";
    let root = Path::new(CGROUP_ROOT);
    if let Ok(text) = std::fs::read_to_string(root.join("cgroup.controllers")) {
        let has = |c: &str| text.split_ascii_whitespace().any(|x| x == c);
        return judge(name, "v2", has);
    }
    // v1: a controller may share its folder with another (`cpu,cpuacct`), with a link for each name.
    if CONTROLLERS.iter().any(|c| root.join(c).is_dir()) {
        return judge(name, "v1", |c| root.join(c).is_dir());
    }
    Finding::warn(
        name,
        format!("none mounted on {CGROUP_ROOT}"),
        "mount cgroup2 there; without it nothing holds a VM to its limits",
    )
}

fn judge(name: &'static str, version: &str, has: impl Fn(&str) -> bool) -> Finding {
    let missing: Vec<_> = CONTROLLERS.into_iter().filter(|c| !has(c)).collect();
    if missing.is_empty() {
        return Finding::ok(name, version);
    }
    Finding::warn(
        name,
        format!("{version}, without {}", missing.join(", ")),
        "limits of these controllers will not hold VMs; enable them in the kernel or in the parent's cgroup.subtree_control",
    )
}

/// Makes a namespace, two taps joined by the mirror, and a port forward, and lets them go again.
pub(super) async fn network() -> Vec<Finding> {
    let (name, forward) = ("pod network", "port-forward");
    let fix = "needs root, /dev/net/tun (modprobe tun), and the ingress qdisc, u32 and mirred of the kernel (modprobe sch_ingress cls_u32 act_mirred)";
    let netns = match network::try_mirror().await {
        Ok(netns) => netns,
        Err(e) => return vec![Finding::missing(name, chain(&e), fix)],
    };
    let mirror = Finding::ok(name, "tap and traffic mirror work");
    let refuse = |_| std::future::ready(Err(std::io::ErrorKind::ConnectionRefused.into()));
    let forward = match PortForward::start(&netns, refuse).await {
        Ok(_) => Finding::ok(forward, "BPF sk_lookup works"),
        Err(e) => Finding::warn(
            forward,
            chain(&e),
            "everything else works; `kubectl port-forward` needs kernel 5.9 or later with CONFIG_BPF_SYSCALL",
        ),
    };
    vec![mirror, forward]
}
