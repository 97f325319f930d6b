//! Lets go of disks that are about to be taken from the guest: a slot that is powered down is empty at
//! once, one that the host asks for gives people 5 s to press its button again (PCIe base
//! specification, 6.7.1.5). A virtio-mmio slot is let go of by its driver.

use std::fs;
use std::path::{Path, PathBuf};

use crate::log;

/// Powers down the slots of the disks with these serials. Best effort: what stays is taken by the host.
pub(super) async fn eject(serials: Vec<String>) {
    if serials.is_empty() {
        return;
    }
    // The kernel waits a second for the power to be gone.
    let done = tokio::task::spawn_blocking(move || {
        for serial in serials {
            let Some(place) = place(Path::new("/sys/block"), &serial) else {
                continue;
            };
            let done = if let Some(slot) = slot(Path::new("/sys/bus/pci/slots"), &place) {
                fs::write(slot.join("power"), "0")
            } else if let Some(slot) = mmio_slot(&place) {
                fs::write("/sys/bus/platform/drivers/virtio-mmio/unbind", slot)
            } else {
                Ok(())
            };
            if let Err(e) = done {
                log!("let go of {}: {e}", place.display());
            }
        }
    });
    if let Err(e) = done.await {
        log!("power down slots: {e}");
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

/// The hot-plug slot that holds the disk; none where it is not behind one.
fn slot(slots: &Path, place: &Path) -> Option<PathBuf> {
    fs::read_dir(slots).ok()?.flatten().find_map(|entry| {
        let address = fs::read_to_string(entry.path().join("address")).ok()?;
        let function = format!("{}.0", address.trim_end());
        let holds = place.iter().any(|part| part == function.as_str());
        holds.then(|| entry.path())
    })
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
    fn a_disk_is_in_the_slot_of_its_bus_address() {
        let dir = tempfile::tempdir().expect("folder");
        let (block, slots) = (dir.path().join("block"), dir.path().join("slots"));
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
        for (number, address) in [("1", "0000:01:00\n"), ("2", "0000:02:00\n")] {
            fs::create_dir_all(slots.join(number)).expect("folder");
            fs::write(slots.join(number).join("address"), address).expect("written");
        }
        let [data, fixed] = ["data-1", "fixed"].map(|s| place(&block, s).expect("there"));
        assert_eq!(slot(&slots, &data), Some(slots.join("1")));
        assert_eq!(slot(&slots, &fixed), None);
        assert_eq!(place(&block, "data"), None);
        assert_eq!(mmio_slot(&data), None);
        let mmio = Path::new("/sys/devices/virtio-mmio-cmdline/virtio-mmio.3/virtio3/block/vda");
        assert_eq!(mmio_slot(mmio), Some("virtio-mmio.3"));
    }
}
