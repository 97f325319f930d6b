//! Devices of the guest that a container's specification names, or that were attached to the guest for
//! it. Looks in sysfs; a disk that is being attached is waited for by its kernel event.

use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType};
use sealpod_protocol::agent::BlockDevice;

use super::ContainerError;
use super::mount_options::normalize;
use super::plan::{ContainerPlan, DevicePlan};
use crate::attest::device::Live;
use crate::uevent;

/// Most disks of one container.
const DISKS_MAX: usize = 256;
/// virtio-blk's serial number (virtio specification 1.2, 5.2.6.1).
const SERIAL_MAX: usize = 20;
/// Permissions where the request names none.
const MODE: u32 = 0o660;

/// Leaves out devices that the guest does not have, or refuses them.
///
/// # Errors
/// The first device that is missing, unless `skip`.
pub fn check(plan: &mut ContainerPlan, skip: bool) -> Result<(), ContainerError> {
    let missing = |device: &DevicePlan| {
        let class = match device.kind {
            libc::S_IFBLK => "block",
            libc::S_IFCHR => "char",
            _ => return false,
        };
        let at = format!("/sys/dev/{class}/{}:{}", device.major, device.minor);
        !Path::new(&at).exists()
    };
    if skip {
        plan.devices.retain(|device| !missing(device));
        return Ok(());
    }
    match plan.devices.iter().find(|device| missing(device)) {
        None => Ok(()),
        Some(device) => Err(ContainerError::Device(format!(
            "The guest has no device {}:{} for {}",
            device.major,
            device.minor,
            device.path.display()
        ))),
    }
}

/// Finds the disks that were attached for a container and adds them to its plan.
///
/// # Errors
/// A disk that does not appear in time; a path or serial that is none.
pub async fn add_block_devices(
    plan: &mut ContainerPlan,
    disks: &[BlockDevice],
) -> Result<(), ContainerError> {
    if disks.is_empty() {
        return Ok(());
    }
    if disks.len() > DISKS_MAX {
        return Err(ContainerError::Device(format!(
            "More than {DISKS_MAX} block devices"
        )));
    }
    for disk in disks {
        let path = normalize("device path", Path::new(&disk.path))?;
        if disk.serial.is_empty() || disk.serial.len() > SERIAL_MAX {
            return Err(ContainerError::Device(format!(
                "Block device {path:?}: serial {:?} does not have 1 to {SERIAL_MAX} bytes",
                disk.serial
            )));
        }
        let found = uevent::until_found(|| find(Path::new("/sys/block"), &disk.serial)).await;
        let found = found.map_err(|e| ContainerError::Device(format!("Kernel events: {e}")))?;
        let Some((major, minor)) = found else {
            return Err(ContainerError::Device(format!(
                "Block device {path:?}: no disk with serial {:?} appeared within {} s",
                disk.serial,
                uevent::TIMEOUT.as_secs()
            )));
        };
        let mode = if disk.mode == 0 {
            MODE
        } else {
            disk.mode & 0o7777
        };
        let (uid, gid) = (disk.uid, disk.gid);
        let device = DevicePlan {
            path,
            kind: libc::S_IFBLK,
            major,
            minor,
            mode,
            uid,
            gid,
        };
        add(plan, device, disk.readonly)?;
    }
    Ok(())
}

/// Adds devices that the guest gate has admitted, each at its path in the container.
///
/// # Errors
/// A path that is none.
pub fn add_admitted(
    plan: &mut ContainerPlan,
    admitted: &[(String, Live)],
) -> Result<(), ContainerError> {
    for (path, live) in admitted {
        let device = DevicePlan {
            path: normalize("device path", Path::new(path))?,
            kind: libc::S_IFBLK,
            major: live.major,
            minor: live.minor,
            mode: MODE,
            uid: 0,
            gid: 0,
        };
        add(plan, device, false)?;
    }
    Ok(())
}

/// Adds a node, and the right to use it.
fn add(plan: &mut ContainerPlan, device: DevicePlan, readonly: bool) -> Result<(), ContainerError> {
    if let Some(mut rules) = plan.resources.devices().clone() {
        rules.push(rule(device.major, device.minor, readonly)?);
        plan.resources.set_devices(Some(rules));
    }
    plan.devices.retain(|other| other.path != device.path);
    plan.devices.push(device);
    Ok(())
}

fn rule(major: u32, minor: u32, readonly: bool) -> Result<LinuxDeviceCgroup, ContainerError> {
    LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(major)
        .minor(minor)
        .access(if readonly { "rm" } else { "rwm" })
        .build()
        .map_err(|e| ContainerError::Device(e.to_string()))
}

/// Number of the disk with this serial, below `/sys/block`.
fn find(block: &Path, serial: &str) -> Option<(u32, u32)> {
    let read = |path: PathBuf| fs::read_to_string(path).ok();
    fs::read_dir(block).ok()?.flatten().find_map(|entry| {
        let found = read(entry.path().join("serial"))?;
        if found.trim_end() != serial {
            return None;
        }
        let number = read(entry.path().join("dev"))?;
        let (major, minor) = number.trim_end().split_once(':')?;
        Some((major.parse().ok()?, minor.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_found_by_its_serial_and_not_by_a_prefix_of_it() {
        let dir = tempfile::tempdir().expect("folder");
        for (name, serial, dev) in [("vda", "root", "254:0\n"), ("vdb", "data-1\n", "254:16\n")] {
            let disk = dir.path().join(name);
            fs::create_dir(&disk).expect("folder");
            fs::write(disk.join("serial"), serial).expect("written");
            fs::write(disk.join("dev"), dev).expect("written");
        }
        fs::create_dir(dir.path().join("loop0")).expect("folder");
        assert_eq!(find(dir.path(), "data-1"), Some((254, 16)));
        assert_eq!(find(dir.path(), "data"), None);
    }
}
