//! sealpod.toml: what a node's administrator may decide. Types, defaults and limits; reading and
//! merging files is [`load()`]. `configs/sealpod.toml` documents every key; a test keeps the two in step.

mod attestation;
mod load;

use std::{
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

pub use attestation::{
    Attestation, DEFAULT_POLICY, Device, OnLoss, Policy, device_id, is_pci_address,
};
pub use load::{ConfigError, DEFAULT_PATH, PATH_VARIABLE, load};

use crate::{
    annotations::Name,
    vm::{MEMORY_MAX_MIB, VCPUS_MAX},
};

/// The whole configuration, validated.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The shim process.
    pub runtime: Runtime,
    /// How VMs are started.
    pub hypervisor: Hypervisor,
    /// How large VMs are.
    pub sizing: Sizing,
    /// How long to wait.
    pub timeouts: Timeouts,
    /// What pods may decide.
    pub annotations: Annotations,
    /// Who appraises pods, and what is released to those that are affirmed.
    pub attestation: Attestation,
}

/// `[runtime]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Runtime {
    /// Folder of the pods' folders. Absolute; at most [`STATE_DIR_MAX`] bytes.
    pub state_dir: PathBuf,
    /// What the shim logs.
    pub log_level: LogLevel,
    /// A pod whose host cgroup cannot be made is refused instead of run without.
    pub strict_cgroup: bool,
}

/// `[hypervisor]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Hypervisor {
    /// Which program runs the VM.
    pub driver: Driver,
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// QEMU: an absolute path, or a name that is searched in PATH.
    pub qemu: PathBuf,
    /// sealpod-vmm. Absolute.
    pub vmm: PathBuf,
    /// Guest kernel: uncompressed, with a PVH entry. Absolute.
    pub kernel: PathBuf,
    /// The guest's root with the agent. Absolute.
    pub initramfs: PathBuf,
    /// virtiofsd. Absolute.
    pub virtiofsd: PathBuf,
    /// Appended to the guest kernel's command line.
    pub kernel_params: Vec<String>,
    /// User and group id that VM processes run with; not 0.
    pub user: NonZeroU32,
    /// Devices that can be added to a running VM.
    pub hotplug_ports: u32,
    /// Whether guests' memory is kept from this host, and by what.
    pub confidential: Confidential,
    /// Kernel of such guests: a bzImage with an EFI entry. Absolute.
    pub confidential_kernel: PathBuf,
    /// Firmware of such guests; empty: none, and no such guests.
    pub firmware: PathBuf,
    /// QEMU's model of SNP guests' processors.
    pub snp_cpu: String,
    /// Socket of the service that makes quotes of TDs; empty: none.
    pub quote_socket: PathBuf,
    /// VMs of sealpod-vmm go on from a template instead of booting.
    pub template: bool,
}

impl Hypervisor {
    /// Whether sealpod-vmm runs a pod, and not QEMU: on request, or where it can and is there. `kvm`: the
    /// pod runs on a real one. `needs_pci`: it wants devices that are passed through.
    #[must_use]
    pub fn uses_vmm(&self, kvm: bool, needs_pci: bool) -> bool {
        match self.driver {
            Driver::Qemu => false,
            Driver::Vmm => true,
            Driver::Auto => kvm && !needs_pci && self.vmm.exists(),
        }
    }
}

/// `[sizing]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Sizing {
    /// vCPUs of a pod without a CPU limit.
    pub default_vcpus: u32,
    /// Most vCPUs of a pod; 0: as many as the host has.
    pub max_vcpus: u32,
    /// Memory for the workload of a pod without a memory limit, MiB.
    pub default_memory_mib: u64,
    /// Most memory for the workload of a pod, MiB; 0: as much as the host has.
    pub max_memory_mib: u64,
    /// Added to the workload's memory for the guest's kernel and agent, MiB.
    pub overhead_memory_mib: u64,
}

/// `[timeouts]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Timeouts {
    /// From the start of the VM to the agent's first answer, seconds.
    pub boot_seconds: u32,
    /// For a guest to power off by itself before it is killed, seconds.
    pub shutdown_seconds: u32,
    /// For an agent request that should take no time, seconds.
    pub request_seconds: u32,
}

/// `[annotations]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Annotations {
    /// The annotations that pods may use.
    pub allow: Vec<Name>,
}

/// Which program runs the VM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The best that the node has.
    #[default]
    Auto,
    /// QEMU.
    Qemu,
    /// sealpod-vmm.
    Vmm,
}

/// Whether guests' memory is kept from this host, and by what.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidential {
    /// Plain guests.
    #[default]
    None,
    /// What this host has; none is an error.
    Auto,
    /// AMD SEV-SNP.
    Snp,
    /// Intel TDX.
    Tdx,
}

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// KVM where a probe shows that it is real, else TCG.
    #[default]
    Auto,
    /// KVM, whatever the probe says.
    Kvm,
    /// QEMU's translator: everywhere, slower.
    Tcg,
}

/// What the shim logs: this and all that is more serious.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// Failures.
    Error,
    /// And what is degraded.
    Warn,
    /// And the milestones of each pod.
    #[default]
    Info,
    /// And each request.
    Debug,
    /// And each message.
    Trace,
}

impl LogLevel {
    /// As tracing's filters spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// Longest `runtime.state_dir`, bytes: a pod's sockets (`<state_dir>/<16 hex>/vsock.sock_<port>`)
/// must fit into the 107 bytes of `sockaddr_un`.
pub const STATE_DIR_MAX: usize = 60;
/// User and group of VM processes where none is configured. Outside of the ranges that
/// distributions give to people, services and containers.
const DEFAULT_USER: NonZeroU32 = NonZeroU32::new(64_777).expect("not 0");
/// Most hot-plug ports; each costs boot time.
const HOTPLUG_PORTS_MAX: u32 = 16;
/// Least memory for a workload that may be configured, MiB.
const MEMORY_MIN_MIB: u64 = 16;

impl Default for Runtime {
    fn default() -> Self {
        Self {
            state_dir: "/run/sealpod".into(),
            log_level: LogLevel::default(),
            strict_cgroup: false,
        }
    }
}

impl Default for Hypervisor {
    fn default() -> Self {
        let prefix = prefix();
        let share = prefix.join("share/sealpod");
        Self {
            driver: Driver::default(),
            accelerator: Accelerator::default(),
            qemu: "qemu-system-x86_64".into(),
            vmm: prefix.join("libexec/sealpod/sealpod-vmm"),
            kernel: share.join("vmlinux"),
            initramfs: share.join("initramfs.cpio"),
            virtiofsd: prefix.join("libexec/sealpod/virtiofsd"),
            kernel_params: Vec::new(),
            user: DEFAULT_USER,
            hotplug_ports: 2,
            confidential: Confidential::default(),
            confidential_kernel: share.join("bzImage-confidential"),
            firmware: PathBuf::new(),
            snp_cpu: "EPYC-Milan".into(),
            quote_socket: PathBuf::new(),
            template: false,
        }
    }
}

impl Default for Sizing {
    fn default() -> Self {
        Self {
            default_vcpus: 1,
            max_vcpus: 0,
            default_memory_mib: 512,
            max_memory_mib: 0,
            overhead_memory_mib: 64,
        }
    }
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            boot_seconds: 30,
            shutdown_seconds: 5,
            request_seconds: 30,
        }
    }
}

impl Default for Annotations {
    fn default() -> Self {
        Self {
            allow: vec![
                Name::Vcpus,
                Name::MemoryMib,
                Name::AttestationPolicy,
                Name::AttestationDevices,
                Name::InitData,
                Name::Confidential,
            ],
        }
    }
}

/// Where sealpod is installed: the folder above the `bin` that the running program is in.
fn prefix() -> PathBuf {
    let exe = std::env::current_exe().ok();
    let bin = exe.as_deref().and_then(Path::parent);
    match bin.filter(|b| b.ends_with("bin")).and_then(Path::parent) {
        Some(prefix) => prefix.into(),
        None => "/usr/local".into(),
    }
}

/// What is wrong with a value: its key, and what is allowed.
type Complaint = (&'static str, String);

impl Config {
    /// Checks the values of keys that do not depend on one another.
    fn check_values(&self) -> Result<(), Complaint> {
        let (r, h, s, t) = (
            &self.runtime,
            &self.hypervisor,
            &self.sizing,
            &self.timeouts,
        );
        for (key, path) in [
            ("runtime.state_dir", &r.state_dir),
            ("hypervisor.vmm", &h.vmm),
            ("hypervisor.kernel", &h.kernel),
            ("hypervisor.initramfs", &h.initramfs),
            ("hypervisor.confidential_kernel", &h.confidential_kernel),
            ("hypervisor.virtiofsd", &h.virtiofsd),
        ] {
            let plain = path
                .components()
                .all(|c| !matches!(c, std::path::Component::ParentDir));
            if !path.is_absolute() || !plain {
                return Err((key, "an absolute path without `..`".into()));
            }
        }
        if r.state_dir.as_os_str().len() > STATE_DIR_MAX {
            let allowed = format!("at most {STATE_DIR_MAX} bytes, so that socket paths fit");
            return Err(("runtime.state_dir", allowed));
        }
        let name_only = h.qemu.components().count() == 1 && !h.qemu.has_root();
        if !h.qemu.is_absolute() && !name_only {
            let allowed = "an absolute path, or a name to search in PATH".into();
            return Err(("hypervisor.qemu", allowed));
        }
        for (key, path) in [
            ("hypervisor.firmware", &h.firmware),
            ("hypervisor.quote_socket", &h.quote_socket),
        ] {
            attestation::optional(key, path)?;
        }
        if let Err(e) = h.snp_cpu.parse::<sealpod_attestation::measure::CpuType>() {
            return Err(("hypervisor.snp_cpu", e.to_string()));
        }
        for param in &h.kernel_params {
            if let Err(allowed) = check_kernel_param(param) {
                return Err(("hypervisor.kernel_params", allowed));
            }
        }
        let range = |key, value: u64, least: u64, most: u64| {
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err((key, format!("{least} to {most}")))
            }
        };
        let cpus = u64::from(VCPUS_MAX);
        range(
            "hypervisor.hotplug_ports",
            h.hotplug_ports.into(),
            0,
            HOTPLUG_PORTS_MAX.into(),
        )?;
        range("sizing.default_vcpus", s.default_vcpus.into(), 1, cpus)?;
        range("sizing.max_vcpus", s.max_vcpus.into(), 0, cpus)?;
        range(
            "sizing.default_memory_mib",
            s.default_memory_mib,
            MEMORY_MIN_MIB,
            MEMORY_MAX_MIB,
        )?;
        range("sizing.max_memory_mib", s.max_memory_mib, 0, MEMORY_MAX_MIB)?;
        range(
            "sizing.overhead_memory_mib",
            s.overhead_memory_mib,
            32,
            4096,
        )?;
        range("timeouts.boot_seconds", t.boot_seconds.into(), 1, 3600)?;
        range(
            "timeouts.shutdown_seconds",
            t.shutdown_seconds.into(),
            0,
            3600,
        )?;
        range(
            "timeouts.request_seconds",
            t.request_seconds.into(),
            1,
            3600,
        )?;
        self.attestation.check_values()
    }

    /// Checks the values of keys against one another.
    fn check_together(&self) -> Result<(), Complaint> {
        let s = &self.sizing;
        if s.max_vcpus != 0 && s.default_vcpus > s.max_vcpus {
            let allowed = format!("at most sizing.max_vcpus, which is {}", s.max_vcpus);
            return Err(("sizing.default_vcpus", allowed));
        }
        if s.max_memory_mib != 0 && s.default_memory_mib > s.max_memory_mib {
            let allowed = format!(
                "at most sizing.max_memory_mib, which is {}",
                s.max_memory_mib
            );
            return Err(("sizing.default_memory_mib", allowed));
        }
        self.attestation.check_together()
    }
}

/// Whether `param` may be one word of the guest kernel's command line; else what is allowed.
///
/// # Errors
/// What is allowed, in words.
pub(crate) fn check_kernel_param(param: &str) -> Result<(), String> {
    // What would replace the agent, or take its side of the command line.
    const OURS: [&str; 6] = ["sealpod.", "init=", "rdinit=", "root=", "console=", "--"];
    if param.is_empty() || param.len() > 512 || !param.bytes().all(|b| b.is_ascii_graphic()) {
        return Err("single words of 1 to 512 printable ASCII characters".into());
    }
    if let Some(ours) = OURS.iter().find(|o| param.starts_with(**o)) {
        return Err(format!("kernel parameters that do not begin with `{ours}`"));
    }
    Ok(())
}
