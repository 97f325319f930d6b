//! The guest gate's bolt: a device filter on the folder of all containers' cgroups, out of every
//! container's reach. It lets through what a guest has of its own (memory devices, terminals, disks
//! that the shim attached as virtio) and nothing else, whatever a container's own rules say, privileged
//! or not: a device that was passed into the guest is opened by nobody before it has been admitted.
//!
//! ```text
//! closed ──admit(token checked)──▶ open for the devices in the token ──revoke, or the lease ends──▶ closed
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};

use super::device::Live;
use super::source::{TEE_DRIVERS, text};
use crate::cgroup::{self, DeviceFilter};

/// Character devices that every guest has: mem, tty, console and ptmx, misc, pts.
const OWN_CHAR: [u32; 4] = [1, 4, 5, 10];
const PTS: std::ops::RangeInclusive<u32> = 136..=143;
/// Block drivers of disks that are not passed through.
const OWN_BLOCK: [&str; 3] = ["virtblk", "loop", "device-mapper"];
/// Major number of misc devices.
const MISC: u32 = 10;

/// See the file's head.
#[derive(Debug)]
pub struct Gate {
    folder: OwnedFd,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    filter: DeviceFilter,
    admitted: Vec<Live>,
}

impl Gate {
    /// A closed gate, before any container is.
    ///
    /// # Errors
    /// When the kernel takes no filter: then no container may run.
    pub fn closed() -> nix::Result<Self> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let folder = open(cgroup::ROOT, flags, Mode::empty())?;
        let filter = DeviceFilter::attach_exactly(folder.as_fd(), &rules(&[])?, None)?;
        let state = State {
            filter,
            admitted: Vec::new(),
        };
        Ok(Self {
            folder,
            state: Mutex::new(state),
        })
    }

    /// Opens it for these devices and no others.
    ///
    /// # Errors
    /// What the kernel says; then nothing has changed.
    pub fn admit(&self, devices: Vec<Live>) -> nix::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let rules = rules(&devices)?;
        let before = Some(&state.filter);
        state.filter = DeviceFilter::attach_exactly(self.folder.as_fd(), &rules, before)?;
        state.admitted = devices;
        Ok(())
    }

    /// Closes it for the devices of these ids, for all where none is named; returns those of them that
    /// were admitted.
    ///
    /// # Errors
    /// What the kernel says; no new container gets one of them even so.
    pub fn close(&self, ids: &[String]) -> nix::Result<Vec<Live>> {
        let (closed, left): (Vec<_>, Vec<_>) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let all = std::mem::take(&mut state.admitted).into_iter();
            let (closed, left) = all.partition(|d| ids.is_empty() || ids.contains(&d.id));
            state.admitted.clone_from(&left);
            (closed, left)
        };
        self.admit(left)?;
        Ok(closed)
    }

    /// The admitted device of this id.
    #[must_use]
    pub fn admitted(&self, id: &str) -> Option<Live> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.admitted.iter().find(|d| d.id == id).cloned()
    }
}

fn rules(admitted: &[Live]) -> nix::Result<Vec<LinuxDeviceCgroup>> {
    list(
        &text(Path::new("/proc/devices")),
        &text(Path::new("/proc/misc")),
        admitted,
    )
}

/// The filter's rules; the last that matches decides, none denies.
fn list(devices: &str, misc: &str, admitted: &[Live]) -> nix::Result<Vec<LinuxDeviceCgroup>> {
    use LinuxDeviceType::{B, C};
    let rule = |allow, kind, major: Option<u32>, minor: Option<u32>, access: &str| {
        let mut rule = LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .access(access);
        if let Some(major) = major {
            rule = rule.major(major);
        }
        if let Some(minor) = minor {
            rule = rule.minor(minor);
        }
        rule.build().map_err(|_| nix::errno::Errno::EINVAL)
    };
    // A node can be made by anyone; opening it is what is filtered.
    let mut all = vec![
        rule(true, C, None, None, "m")?,
        rule(true, B, None, None, "m")?,
    ];
    for major in OWN_CHAR.into_iter().chain(PTS) {
        all.push(rule(true, C, Some(major), None, "rwm")?);
    }
    let block = devices.split_once("Block devices:").map_or("", |(_, b)| b);
    for (number, name) in block.lines().filter_map(|l| l.trim().split_once(' ')) {
        if let (Ok(major), true) = (number.parse(), OWN_BLOCK.contains(&name.trim())) {
            all.push(rule(true, B, Some(major), None, "rwm")?);
        }
    }
    for (number, name) in misc.lines().filter_map(|l| l.trim().split_once(' ')) {
        let name = name.trim();
        if let (Ok(minor), true) = (
            number.parse(),
            TEE_DRIVERS.contains(&name) || name.starts_with("vfio"),
        ) {
            all.push(rule(false, C, Some(MISC), Some(minor), "rw")?);
        }
    }
    for device in admitted {
        let (major, minor) = (Some(device.major), Some(device.minor));
        all.push(rule(true, B, major, minor, "rwm")?);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: &str = "Character devices:\n  1 mem\n 10 misc\n136 pts\n195 nvidia\n243 nvme\n\
        \nBlock devices:\n  7 loop\n254 virtblk\n259 blkext\n";
    const MISC_LIST: &str = "126 sev-guest\n200 tun\n229 fuse\n196 vfio\n";

    #[test]
    fn only_what_a_guest_has_of_its_own_is_let_through() {
        let rules = list(DEVICES, MISC_LIST, &[]).expect("rules");
        let open = |kind: LinuxDeviceType, major: i64, minor: i64| {
            let matches = |r: &&LinuxDeviceCgroup| {
                r.typ() == Some(kind)
                    && r.major().is_none_or(|m| m == major)
                    && r.minor().is_none_or(|m| m == minor)
                    && r.access().as_deref().is_some_and(|a| a.contains('r'))
            };
            rules.iter().rfind(matches).is_some_and(|r| r.allow())
        };
        use LinuxDeviceType::{B, C};
        for (kind, major, minor) in [
            (C, 1, 3),
            (C, 136, 5),
            (C, 10, 229),
            (B, 254, 16),
            (B, 7, 0),
        ] {
            assert!(open(kind, major, minor), "{kind:?} {major}:{minor}");
        }
        // NVMe, its controller, GPUs, VFIO, the TEE's own driver, and what nobody here knows.
        for (kind, major, minor) in [
            (B, 259, 0),
            (C, 243, 0),
            (C, 195, 0),
            (C, 10, 196),
            (C, 10, 126),
            (C, 226, 128),
            (B, 8, 0),
        ] {
            assert!(!open(kind, major, minor), "{kind:?} {major}:{minor}");
        }
    }
}
