//! Slots of the guest's devices: a hot-plug slot that is powered down is empty at once, one that the host
//! asks for gives people 5 s to press its button again (PCIe base specification, 6.7.1.5). Writes to
//! sysfs from a process of its own: the kernel answers after a second, and the agent has one thread that
//! must stay the only one ([`apart`]).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::apart;

/// How long the kernel may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// Where the kernel has its slots.
pub const SLOTS: &str = "/sys/bus/pci/slots";

/// The slot in `slots` that holds the device at `place`, its folder among `/sys/devices`; none where it is
/// not behind one.
#[must_use]
pub fn holding(slots: &Path, place: &Path) -> Option<PathBuf> {
    fs::read_dir(slots).ok()?.flatten().find_map(|entry| {
        let address = fs::read_to_string(entry.path().join("address")).ok()?;
        let function = format!("{}.0", address.trim_end());
        let holds = place.iter().any(|part| part == function.as_str());
        holds.then(|| entry.path())
    })
}

/// Powers a slot down. Returns when its device is gone.
///
/// # Errors
/// What the kernel says.
pub async fn power_down(slot: &Path) -> io::Result<()> {
    write(&slot.join("power"), "0").await
}

/// Writes to a file of the kernel's that may take its time.
///
/// # Errors
/// What the kernel says; `EDEADLK` where the agent has a second thread.
pub async fn write(path: &Path, text: &str) -> io::Result<()> {
    let work = || match fs::write(path, text) {
        Ok(()) => Ok(Vec::new()),
        Err(e) => Err(e.to_string()),
    };
    let written = apart::run(0, PATIENCE, work).await;
    written.map(drop).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_in_the_slot_of_its_bus_address() {
        let dir = tempfile::tempdir().expect("folder");
        let slots = dir.path();
        for (number, address) in [("1", "0000:01:00\n"), ("2", "0000:02:00\n")] {
            fs::create_dir_all(slots.join(number)).expect("folder");
            fs::write(slots.join(number).join("address"), address).expect("written");
        }
        let bus = Path::new("/sys/devices/pci0000:00");
        let plugged = bus.join("0000:00:05.0/0000:02:00.0/nvme/nvme0/nvme0n1");
        assert_eq!(holding(slots, &plugged), Some(slots.join("2")));
        let fixed = bus.join("0000:00:03.0/virtio1/block/vda");
        assert_eq!(holding(slots, &fixed), None);
    }
}
