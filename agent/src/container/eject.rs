//! Lets go of disks that are about to be taken from the guest: their slots are powered down; one in a
//! virtio-mmio slot is let go of by its driver.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{log, slot};

/// Takes a virtio-mmio slot from its driver.
const UNBIND: &str = "/sys/bus/platform/drivers/virtio-mmio/unbind";

/// Powers down the slots of the disks with these serials. Best effort: what stays is taken by the host.
pub(super) async fn eject(serials: Vec<String>) {
    for serial in serials {
        let Some(place) = place(Path::new("/sys/block"), &serial) else {
            continue;
        };
        let done = if let Some(slot) = slot::holding(Path::new(slot::SLOTS), &place) {
            slot::power_down(&slot).await
        } else if let Some(slot) = mmio_slot(&place) {
            slot::write(Path::new(UNBIND), slot).await
        } else {
            Ok(())
        };
        if let Err(e) = done {
            log!("let go of {}: {e}", place.display());
        }
    }
}

/// Where the disk is among the devices.
fn place(block: &Path, serial: &str) -> Option<PathBuf> {
    let disk = fs::read_dir(block).ok()?.flatten().find(|entry| {
        let found = fs::read_to_string(entry.path().join("serial"));
        found.is_ok_and(|found| found.trim_end() == serial)
    })?;
    fs::canonicalize(disk.path()).ok()
}

/// The virtio-mmio slot that holds the disk.
fn mmio_slot(place: &Path) -> Option<&str> {
    let mut parts = place.iter().filter_map(|part| part.to_str());
    parts.find(|part| part.starts_with("virtio-mmio."))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_disk_is_found_by_its_serial() {
        let dir = tempfile::tempdir().expect("folder");
        let block = dir.path().join("block");
        fs::create_dir(&block).expect("folder");
        for (name, place, serial) in [
            ("vda", "0000:00:03.0/virtio1/block/vda", "fixed"),
            (
                "vdb",
                "0000:00:05.0/0000:01:00.0/virtio4/block/vdb",
                "data-1",
            ),
        ] {
            let device = dir.path().join("devices/pci0000:00").join(place);
            fs::create_dir_all(&device).expect("folder");
            fs::write(device.join("serial"), format!("{serial}\n")).expect("written");
            symlink(&device, block.join(name)).expect("link");
        }
        let [data, fixed] = ["data-1", "fixed"].map(|s| place(&block, s).expect("there"));
        assert!(data.ends_with("0000:01:00.0/virtio4/block/vdb"));
        assert!(fixed.ends_with("0000:00:03.0/virtio1/block/vda"));
        assert_eq!(place(&block, "data"), None);
        assert_eq!(mmio_slot(&data), None);
        let mmio = Path::new("/sys/devices/virtio-mmio-cmdline/virtio-mmio.3/virtio3/block/vda");
        assert_eq!(mmio_slot(mmio), Some("virtio-mmio.3"));
    }
}
