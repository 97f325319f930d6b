//! From the kernel's first step in user space to a guest in which containers can be: the agent's root,
//! its mounts, its limits. Nothing of the pod is known yet.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sys::resource::{Resource, setrlimit};
use nix::unistd::{chdir, chroot};

use crate::cgroup::{self, CgroupError};
use crate::launch;

/// Open files: the soft limit is what programs that close "all" descriptors walk through, the hard one
/// what servers raise theirs to.
const OPEN_FILES: (u64, u64) = (1 << 16, 1 << 20);

/// A guest that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A step failed.
    #[error("{what}: {source}")]
    Step {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The cgroup hierarchy.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
}

/// A mount of the guest: source, target, type, flags, options.
type Mount = (
    &'static str,
    &'static str,
    &'static str,
    MsFlags,
    &'static str,
);

const NOTHING: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

/// Below the new root. `/dev` and `/run` come with what they need inside.
const MOUNTS: [Mount; 7] = [
    ("proc", "/proc", "proc", NOTHING, ""),
    ("sysfs", "/sys", "sysfs", NOTHING, ""),
    (
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MsFlags::MS_NOSUID,
        "mode=0755",
    ),
    (
        "devpts",
        "/dev/pts",
        "devpts",
        MsFlags::MS_NOSUID,
        "ptmxmode=0666,mode=0620,gid=5",
    ),
    (
        "tmpfs",
        "/run",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=0755",
    ),
    (
        "tmpfs",
        "/tmp",
        "tmpfs",
        MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        "mode=1777",
    ),
    ("cgroup2", cgroup::MOUNT, "cgroup2", NOTHING, "nsdelegate"),
];

const LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

fn step<T>(
    what: impl Into<String>,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, BootError> {
    result.map_err(|e| BootError::Step {
        what: what.into(),
        source: e.into(),
    })
}

/// Makes the guest usable.
///
/// # Errors
/// [`BootError`]; nothing can run then.
pub fn set_up() -> Result<(), BootError> {
    leave_initramfs()?;
    for (source, target, kind, flags, options) in MOUNTS {
        step(format!("Make {target}"), fs::create_dir_all(target))?;
        step(
            format!("Mount {target}"),
            mount(Some(source), target, Some(kind), flags, Some(options)),
        )?;
    }
    for (target, link) in LINKS {
        step(format!("Make {link}"), symlink(target, link))?;
    }
    // Containers get copies of these mounts; what appears later must reach those that ask for it.
    let shared = MsFlags::MS_SHARED | MsFlags::MS_REC;
    step(
        "Share mounts",
        mount(None::<&str>, "/", None::<&str>, shared, None::<&str>),
    )?;
    let stage = Path::new(launch::STAGE);
    step("Make the stage", fs::create_dir_all(stage))?;
    let (soft, hard) = OPEN_FILES;
    step("Set limits", setrlimit(Resource::RLIMIT_NOFILE, soft, hard))?;
    cgroup::prepare()?;
    Ok(())
}

/// Moves to a root of its own. pivot_root, which every container needs, does not work while the root is
/// the initramfs (pivot_root(2)); and nothing of the initramfs is needed any more.
fn leave_initramfs() -> Result<(), BootError> {
    let new = "/run";
    let what = "Leave the initramfs";
    step(what, fs::create_dir_all(new))?;
    let options = Some("mode=0755,size=1m");
    step(
        what,
        mount(Some("root"), new, Some("tmpfs"), MsFlags::empty(), options),
    )?;
    step(what, chdir(new))?;
    step(
        what,
        mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>),
    )?;
    step(what, chroot("."))?;
    step(what, chdir("/"))
}
