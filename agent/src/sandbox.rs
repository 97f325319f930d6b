//! What is set up once for the whole pod, and its end: clock, entropy, host name, sysctls, shared
//! folder, shared memory; power-off.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::sethostname;
use sealpod_protocol::agent::SetupSandboxRequest;
use sealpod_protocol::{SANDBOX_SHM_DIR, SHARE_DIR};

use crate::container::spec::{SpecError, sysctl_path};
use crate::{share, sys};

/// Most entropy that is taken, bytes (agent.proto).
const ENTROPY_MAX: usize = 512;
/// Longest host name, bytes (HOST_NAME_MAX).
const HOSTNAME_MAX: usize = 64;
/// Most sysctls of a pod.
const SYSCTLS_MAX: usize = 1024;

/// A set-up that was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A second set-up of one guest.
    #[error("The sandbox is set up already")]
    Twice,
    /// A value out of its range.
    #[error("{0}")]
    Value(String),
    /// A sysctl's name.
    #[error(transparent)]
    Sysctl(#[from] SpecError),
    /// The kernel refused a step.
    #[error("{what}: {source}")]
    Step {
        /// Which.
        what: String,
        /// Why.
        source: io::Error,
    },
}

fn step<T>(
    what: impl Into<String>,
    result: Result<T, impl Into<io::Error>>,
) -> Result<T, SandboxError> {
    result.map_err(|e| SandboxError::Step {
        what: what.into(),
        source: e.into(),
    })
}

/// The pod's part of the guest.
#[derive(Debug, Default)]
pub struct Sandbox {
    done: AtomicBool,
}

impl Sandbox {
    /// Whether a set-up was begun.
    #[must_use]
    pub fn is_set_up(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }

    /// Sets the pod up, all but its network. Once for each boot.
    ///
    /// # Errors
    /// [`SandboxError`], naming the step.
    pub fn set_up(&self, request: &SetupSandboxRequest) -> Result<(), SandboxError> {
        let sysctls: Vec<_> = request
            .sysctls
            .iter()
            .map(|(name, value)| Ok((sysctl_path(name)?, value)))
            .collect::<Result<_, SpecError>>()?;
        for (what, got, max) in [
            ("Entropy", request.entropy.len(), ENTROPY_MAX),
            ("Host name", request.hostname.len(), HOSTNAME_MAX),
            ("Number of sysctls", sysctls.len(), SYSCTLS_MAX),
        ] {
            if got > max {
                return Err(SandboxError::Value(format!(
                    "{what}: {got} is more than {max}"
                )));
            }
        }
        if self.done.swap(true, Ordering::Relaxed) {
            return Err(SandboxError::Twice);
        }
        let ns = request.time_unix_ns;
        if ns > 0 {
            let time = TimeSpec::new(ns / 1_000_000_000, ns % 1_000_000_000);
            step(
                "Set the clock",
                clock_settime(ClockId::CLOCK_REALTIME, time),
            )?;
        }
        if !request.entropy.is_empty() {
            let random = step("Open /dev/urandom", fs::File::open("/dev/urandom"))?;
            step(
                "Add entropy",
                sys::add_entropy(random.as_fd(), &request.entropy),
            )?;
            // The kernel would go on for a minute with a key that all guests from one template share.
            step("Renew the random generator", sys::reseed(random.as_fd()))?;
        }
        if !request.hostname.is_empty() {
            let what = format!("Set host name {:?}", request.hostname);
            step(what, sethostname(&request.hostname))?;
        }
        if request.share {
            step("Mount the pod's shared folder", share::attach())?;
        }
        step(
            "Mount the pod's shared memory",
            shared_memory(request.shm_bytes),
        )?;
        for (path, value) in sysctls {
            let what = format!("Set sysctl {}={value:?}", path.display());
            step(what, fs::write(Path::new("/proc/sys").join(&path), value))?;
        }
        Ok(())
    }
}

/// The tmpfs that containers get as `/dev/shm`.
fn shared_memory(bytes: u64) -> io::Result<()> {
    fs::create_dir_all(SANDBOX_SHM_DIR)?;
    let mut options = "mode=1777".to_owned();
    if bytes > 0 {
        options.push_str(&format!(",size={bytes}"));
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("shm"),
        SANDBOX_SHM_DIR,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )?;
    Ok(())
}

/// Writes everything to its disks and lets go of the share.
pub fn sync() {
    nix::unistd::sync();
    // Lazily: a dying container may still be in it.
    let _ = umount2(SHARE_DIR, MntFlags::MNT_DETACH);
}

/// Ends the guest. A restart, which the VMM is told to take for the end: it needs no ACPI.
pub fn power_off() -> ! {
    let Err(errno) = reboot(RebootMode::RB_AUTOBOOT);
    // Only PID 1 of a guest gets here in earnest; a test's agent just ends.
    crate::log::always(&format_args!("power off: {errno}"));
    std::process::exit(1)
}
