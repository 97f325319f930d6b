//! Devices that a token can name, as they are in the guest: found by their id, with the number that
//! containers use them by, and the way to switch them off. Looks in sysfs.

use std::fs;
use std::path::{Path, PathBuf};

use super::source::text;
use crate::slot;

/// A device that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Live {
    /// Its id, as in a token: a disk's serial number.
    pub id: String,
    /// Number of its block device.
    pub major: u32,
    /// See above.
    pub minor: u32,
    /// Folder of its PCI function in sysfs.
    function: PathBuf,
}

/// The device with this id, below the root `sys` of sysfs.
///
/// Known today: NVMe disks by their serial number. A GPU's id is its PCI address; its driver is not in
/// this guest's kernel.
#[must_use]
pub fn find(sys: &Path, id: &str) -> Option<Live> {
    for entry in fs::read_dir(sys.join("block")).ok()?.flatten() {
        let folder = entry.path();
        // The controller is the disk's parent; its serial is padded with blanks.
        if !entry.file_name().to_string_lossy().starts_with("nvme")
            || text(&folder.join("device/serial")).trim() != id
        {
            continue;
        }
        let number = text(&folder.join("dev"));
        let (major, minor) = number.trim().split_once(':')?;
        return Some(Live {
            id: id.into(),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            function: folder.join("device/device"),
        });
    }
    None
}

impl Live {
    /// Takes the device out of the guest: its driver lets go of it, open files of it fail from now on,
    /// and its slot in `slots` is empty for the host. Takes a second; one that is in no slot stays for the
    /// host to take.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn remove(&self, slots: &Path) -> std::io::Result<()> {
        let place = fs::canonicalize(&self.function)?;
        match slot::holding(slots, &place) {
            Some(slot) => slot::power_down(&slot).await,
            None => fs::write(place.join("remove"), "1"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[tokio::test]
    async fn a_disk_is_found_by_its_whole_serial_and_switched_off_at_its_function() {
        let dir = tempfile::tempdir().expect("folder");
        let sys = dir.path();
        let function = sys.join("devices/pci0000:00/0000:02:00.0");
        let controller = function.join("nvme/nvme0");
        let disk = controller.join("nvme0n1");
        fs::create_dir_all(&disk).expect("folder");
        fs::create_dir_all(sys.join("block")).expect("folder");
        symlink(&disk, sys.join("block/nvme0n1")).expect("link");
        symlink(&controller, disk.join("device")).expect("link");
        symlink(&function, controller.join("device")).expect("link");
        fs::write(controller.join("serial"), "stand-in-0          \n").expect("file");
        fs::write(disk.join("dev"), "259:0\n").expect("file");
        let live = find(sys, "stand-in-0").expect("device");
        assert_eq!((live.major, live.minor), (259, 0));
        live.remove(&sys.join("slots")).await.expect("removed");
        assert_eq!(text(&function.join("remove")), "1");
        for other in ["stand-in", "stand-in-00", ""] {
            assert_eq!(find(sys, other), None, "{other}");
        }
    }
}
