//! A pod's virtual machine: what the pod asks of it ([`Vm`], [`Driver`]) and, one room each, how a
//! driver provides it. No VMM's words belong in this file: a second driver comes behind the same
//! traits.
//!
//! ```text
//!            start                 guest powers off, resets or panics;
//!  VmConfig ───────▶ running ────▶ VMM dies; stop()          ─────────▶ VmExit (kept for good)
//!                    │     ▲
//!              pause └paused┘ resume
//! ```

mod args;
mod builtin;
mod cache;
mod check;
pub mod confidential;
mod console;
mod hotplug;
mod image;
mod passed;
pub mod probe;
mod process;
mod protection;
mod qemu;
mod qmp;
mod silent;
pub mod template;
mod tsc;

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use crate::child::{ChildError, Exit};
use crate::host_cgroup::Entrance;
use crate::ledger::{Ledger, LedgerError};

pub use builtin::Builtin;
pub use check::find_program;
pub use confidential::{Confidential, ConfidentialError};
pub use image::{ImageError, check_bzimage, check_initramfs, check_kernel};
pub use qemu::Qemu;
pub(crate) use silent::log_where_it_stands;

/// Least memory of a guest, MiB: below it the kernel, its root and the agent do not come up.
pub const MEMORY_MIN_MIB: u64 = 64;
/// Most memory of a guest, MiB: 4 TiB, what a 42-bit guest address reaches.
pub const MEMORY_MAX_MIB: u64 = 4 << 20;
/// Most virtual CPUs (ACPI processor ids of 8 bits).
pub const VCPUS_MAX: u32 = 255;
/// Longest serial of a disk, bytes (virtio 1.2, section 5.2.6.1: `VIRTIO_BLK_ID_BYTES`).
pub const SERIAL_MAX: usize = 20;
/// Socket, in the pod's folder, of the vsock engine: hosts connect to it; what the guest connects to
/// on host port `<p>` is the socket with `_<p>` added.
pub const VSOCK_FILE: &str = "vsock.sock";

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor, by KVM.
    Kvm,
    /// A translator: everywhere, slower.
    Tcg,
}

impl Accelerator {
    /// As people and QEMU spell it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// A VM to be. Descriptors in it go to the VMM.
#[derive(Debug)]
pub struct VmConfig {
    /// The pod's folder, which exists and is the shim's alone.
    pub dir: PathBuf,
    /// VMM program, absolute.
    pub program: PathBuf,
    /// Guest kernel: ELF with a PVH entry.
    pub kernel: PathBuf,
    /// The guest's root, a cpio archive.
    pub initramfs: PathBuf,
    /// Added to the kernel's command line.
    pub kernel_params: Vec<String>,
    /// Virtual CPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u32,
    /// Guest memory, [`MEMORY_MIN_MIB`] to [`MEMORY_MAX_MIB`].
    pub memory_mib: u64,
    /// Connection to the virtiofs daemon that serves the pod's share, if there is one.
    pub share: Option<OwnedFd>,
    /// Network devices, in the order in which the guest counts them.
    pub nics: Vec<Nic>,
    /// Devices that are passed in before the guest runs, each on a port.
    pub passed: Vec<Passed>,
    /// The VMM's cgroup.
    pub cgroup: Entrance,
    /// Devices that can be added while it runs; each costs boot time.
    pub hotplug_ports: u32,
    /// What executes the guest's instructions.
    pub accelerator: Accelerator,
    /// How its memory is kept from the host, if it is. The kernel is a bzImage then.
    pub confidential: Option<Confidential>,
    /// User and group id of the VMM process, not 0.
    pub user: u32,
}

/// A network device.
#[derive(Debug)]
pub struct Nic {
    /// An open tap that carries a virtio-net header (`IFF_VNET_HDR`).
    pub tap: OwnedFd,
    /// Its address in the guest.
    pub mac: [u8; 6],
    /// Largest packet, bytes.
    pub mtu: u32,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Raw file or block device of the host.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub readonly: bool,
    /// By which the guest finds it: 1 to [`SERIAL_MAX`] of `[A-Za-z0-9_-]`.
    pub serial: String,
}

/// A device of the host that a running VM gets as its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Passed {
    /// A PCI function that is bound to VFIO.
    Vfio {
        /// 1 to [`SERIAL_MAX`] of `[A-Za-z0-9_-]`.
        id: String,
        /// Its character device, `/dev/vfio/devices/vfio<n>`.
        cdev: PathBuf,
    },
    /// An NVMe disk that the VMM emulates, read-only, in place of a function that this host lacks.
    StandIn {
        /// Its serial number, as above.
        id: String,
        /// File with its content.
        path: PathBuf,
    },
}

impl Passed {
    /// Its name, and in the guest its serial number.
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Vfio { id, .. } | Self::StandIn { id, .. } => id,
        }
    }
}

/// Why a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered off or reset, as it does when asked to end.
    Guest,
    /// The guest's kernel panicked, with this message.
    Panic(String),
    /// [`Vm::stop`] was called.
    Stopped,
    /// The VMM ended by itself or was killed.
    Vmm(Exit),
}

/// How a VM ended, with what it said last.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExit {
    /// Why.
    pub reason: ExitReason,
    /// Last lines of the guest's console.
    pub console: Vec<String>,
    /// Last lines that the VMM wrote.
    pub output: Vec<String>,
}

impl std::fmt::Display for VmExit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.reason {
            ExitReason::Guest => write!(f, "The guest powered off")?,
            ExitReason::Panic(message) => write!(f, "The guest's kernel panicked: {message}")?,
            ExitReason::Stopped => write!(f, "The VM was stopped")?,
            ExitReason::Vmm(exit) => write!(f, "The VMM ended with {exit}")?,
        }
        let quote = |lines: &[String]| lines.join(" | ");
        if !self.output.is_empty() {
            write!(f, "; it wrote: {}", quote(&self.output))?;
        }
        if !self.console.is_empty() {
            write!(f, "; the guest's last lines: {}", quote(&self.console))?;
        }
        Ok(())
    }
}

/// What can go wrong with a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// A value that no VM can have.
    #[error("{what} {value} is refused: {allowed}")]
    Config {
        /// Which value.
        what: &'static str,
        /// The value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// The kernel or the initramfs cannot be booted.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The host has no such guests.
    #[error(transparent)]
    Confidential(#[from] ConfidentialError),
    /// A file or socket of the host could not be had.
    #[error("Cannot {action} {path}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The VMM's process did not start.
    #[error("The VMM did not start")]
    Spawn(#[from] ChildError),
    /// The vsock engine did not start.
    #[error("The vsock engine did not start")]
    Vsock(#[from] sealpod_vmm::vsock::Error),
    /// The VMM started and gave up before the guest ran.
    #[error("The VMM gave up before the guest ran. {0}")]
    GaveUp(VmExit),
    /// The VMM does not answer on its control connection.
    #[error("The VMM did not answer {command:?} within {seconds} s")]
    Silent {
        /// What was asked.
        command: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The VMM refused a request.
    #[error("The VMM refused {command:?}: {reason}")]
    Refused {
        /// What was asked.
        command: String,
        /// What it said.
        reason: String,
    },
    /// The VM has ended.
    #[error("The VM has ended")]
    Ended,
    /// All places for devices that come later are taken.
    #[error(
        "All {ports} hot-plug ports of the VM are taken; hypervisor.hotplug_ports sets how many there are"
    )]
    NoPort {
        /// How many there are.
        ports: usize,
    },
    /// No device has this name.
    #[error("The VM has no hot-plugged device {0:?}")]
    NoDevice(String),
    /// The ledger could not be written; then nothing is taken.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
}

/// A moment of a VM's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// What had just happened.
    pub what: &'static str,
    /// When, by [`clock::boot_ns`](crate::clock::boot_ns).
    pub at_ns: u64,
}

/// Starts VMs.
#[async_trait]
pub trait Driver: Send + Sync {
    /// Starts a VM; returns when its virtual CPUs run. Everything taken is in `ledger`.
    ///
    /// # Errors
    /// [`VmError`]; then nothing of the VM is left.
    async fn start(&self, config: VmConfig, ledger: &Ledger) -> Result<Arc<dyn Vm>, VmError>;
    /// The kernel's command line of such a VM: a part of what is measured.
    async fn cmdline(&self, config: &VmConfig) -> String;
}

/// A VM that was started. Dropping the last reference kills it.
#[async_trait]
pub trait Vm: Send + Sync {
    /// Process id of the VMM.
    fn pid(&self) -> u32;
    /// A descriptor of its process.
    fn pidfd(&self) -> io::Result<OwnedFd>;
    /// What executes the guest's instructions.
    fn accelerator(&self) -> Accelerator;
    /// The moments of its start, in order.
    fn marks(&self) -> Vec<Mark>;
    /// Last lines of the guest's console.
    fn console_tail(&self) -> Vec<String>;

    /// Where processors and devices stand, in words: for the log, when the guest does not go on.
    async fn describe(&self) -> Result<Vec<String>, VmError>;
    /// Stops the virtual CPUs until [`Vm::resume`]. Idempotent.
    async fn pause(&self) -> Result<(), VmError>;
    /// Lets the virtual CPUs run. Idempotent.
    async fn resume(&self) -> Result<(), VmError>;
    /// Adds a disk. Returns when the VMM has it; the guest sees it a moment later.
    async fn add_disk(&self, disk: Disk) -> Result<(), VmError>;
    /// Removes the disk with this serial. Returns when the guest has let go of it.
    async fn remove_disk(&self, serial: &str) -> Result<(), VmError>;
    /// Adds a network device.
    async fn add_nic(&self, nic: Nic) -> Result<(), VmError>;

    /// Passes a device into the VM. Returns when the VMM has it; the guest sees it a moment later.
    async fn pass(&self, device: Passed) -> Result<(), VmError>;
    /// Takes the device of this id away. Returns when the guest has let go of it.
    async fn take_back(&self, id: &str) -> Result<(), VmError>;

    /// Waits for the end. Any number of callers, any number of times.
    async fn wait(&self) -> VmExit;
    /// Ends the VM, now and without asking the guest. Idempotent: returns when it is gone.
    async fn stop(&self);
}

/// Which accelerator a pod gets: the one that is `wanted`, or, where none is, KVM if it is real.
/// `state_dir` holds the remembered answer of the probe. Blocks for at most 0.2 s.
#[must_use]
pub fn choose_accelerator(wanted: Option<Accelerator>, state_dir: &std::path::Path) -> Accelerator {
    let found = match wanted {
        Some(accelerator) => return accelerator,
        None => probe::cached(state_dir),
    };
    if found.is_real() {
        return Accelerator::Kvm;
    }
    tracing::warn!("The VM runs without hardware support (TCG), slower: {found}");
    Accelerator::Tcg
}
