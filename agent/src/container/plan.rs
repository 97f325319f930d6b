//! What a container's processes are to be, checked and in the form that the launcher needs. Made from
//! the OCI specification by [`super::spec`]; nothing here touches the system.

use std::ffi::CString;
use std::path::PathBuf;

use nix::sys::resource::Resource;
use oci_spec::runtime::{LinuxResources, LinuxSeccomp};

use crate::sys::{CapSets, SchedAttr};

/// A container.
#[derive(Debug)]
pub struct ContainerPlan {
    /// Root file system, an absolute path in the guest.
    pub rootfs: PathBuf,
    /// Whether the root is read-only for the container.
    pub root_readonly: bool,
    /// Propagation of the root's mounts: `MS_SLAVE`, `MS_PRIVATE`, `MS_SHARED` or `MS_UNBINDABLE`.
    pub propagation: libc::c_ulong,
    /// New namespaces: `CLONE_NEWIPC`, `CLONE_NEWUTS`, `CLONE_NEWUSER` (mount and cgroup
    /// namespaces are always new, the network is always the pod's).
    pub namespaces: libc::c_int,
    /// Content of `uid_map` and `gid_map`, for a new user namespace.
    pub id_maps: Option<(String, String)>,
    /// Offsets of a new time namespace: content of `timens_offsets`.
    pub hostname: Option<String>,
    /// NIS domain.
    pub domainname: Option<String>,
    /// In the order in which they are made.
    pub mounts: Vec<MountPlan>,
    /// Nodes to make in `/dev`; empty where `/dev` comes from outside.
    pub devices: Vec<DevicePlan>,
    /// Whether `/dev` belongs to this container (symbolic links and nodes are made there).
    pub own_dev: bool,
    /// Paths that the container may not see into.
    pub masked_paths: Vec<PathBuf>,
    /// Paths that the container may not write.
    pub readonly_paths: Vec<PathBuf>,
    /// Files below `/proc/sys`, and their values.
    pub sysctls: Vec<(PathBuf, String)>,
    /// Seccomp profile, of init and of every exec.
    pub seccomp: Option<LinuxSeccomp>,
    /// cgroup limits.
    pub resources: LinuxResources,
    /// `startContainer` hooks.
    pub start_hooks: Vec<HookPlan>,
    /// What hooks read on their standard input, but for the pid.
    pub hook_state: serde_json::Map<String, serde_json::Value>,
    /// The first process.
    pub process: ProcessPlan,
}

/// A process: a container's init or an exec.
#[derive(Debug, Clone)]
pub struct ProcessPlan {
    /// Program and arguments; at least one.
    pub args: Vec<CString>,
    /// `NAME=value`.
    pub env: Vec<CString>,
    /// Working directory in the container, absolute.
    pub cwd: PathBuf,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Umask; 0o022 where the specification has none.
    pub umask: u32,
    /// Capabilities that it may ever have.
    pub bounding: u64,
    /// Capabilities that survive execve of an ordinary program.
    pub ambient: u64,
    /// The other sets.
    pub caps: CapSets,
    /// Resource, soft and hard limit.
    pub rlimits: Vec<(Resource, u64, u64)>,
    /// No privilege by execve.
    pub no_new_privileges: bool,
    /// OOM killer's preference.
    pub oom_score_adj: Option<i32>,
    /// Argument of ioprio_set(2).
    pub ioprio: Option<i32>,
    /// Scheduling policy.
    pub scheduler: Option<SchedAttr>,
    /// Execution domain.
    pub personality: Option<u64>,
    /// CPUs that an exec runs on, list format.
    pub cpus: Option<String>,
    /// Columns and rows, where it has a terminal; 0 leaves the kernel's default.
    pub terminal: Option<(u16, u16)>,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPlan {
    /// In the container, absolute and normalized.
    pub destination: PathBuf,
    /// What is mounted.
    pub kind: MountKind,
    /// `MOUNT_ATTR_*` to set and to clear on the mount itself.
    pub set: u64,
    /// See above.
    pub clear: u64,
    /// The same, for the mount and all below it.
    pub set_recursive: u64,
    /// See above.
    pub clear_recursive: u64,
    /// `MS_*` propagation, and whether it is recursive.
    pub propagation: Vec<(u64, bool)>,
}

/// What a mount shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// Part of the guest's tree.
    Bind {
        /// In the guest, absolute.
        source: PathBuf,
        /// With the mounts below it.
        recursive: bool,
    },
    /// A new file system.
    New {
        /// File system type.
        fs: CString,
        /// Its source, where it has one.
        source: Option<CString>,
        /// Its options: key, and value unless it is a flag.
        options: Vec<(CString, Option<CString>)>,
    },
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePlan {
    /// In the container, absolute and normalized.
    pub path: PathBuf,
    /// `S_IFCHR`, `S_IFBLK` or `S_IFIFO`.
    pub kind: libc::mode_t,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
}

/// A program that runs in the container just before its init.
#[derive(Debug, Clone)]
pub struct HookPlan {
    /// In the container.
    pub path: PathBuf,
    /// Arguments, the first being the program's name.
    pub args: Vec<String>,
    /// Its whole environment.
    pub env: Vec<(String, String)>,
    /// Seconds that it may take; none: no limit.
    pub timeout: Option<u64>,
}
