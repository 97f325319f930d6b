//! Slots of the guest's devices: a hot-plug slot that is powered down is empty at once, one that the host
//! asks for gives people 5 s to press its button again (PCIe base specification, 6.7.1.5). Writes to
//! sysfs from a process of its own: the kernel answers after a second, and the agent has one thread that
//! must stay the only one ([`crate::sys::fork`]).

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use crate::sys;

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
    let (answer, answers) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    if let sys::Fork::Child = sys::fork(0, None)? {
        // Streams whose end somebody waits for are not to be held open here.
        let _ = sys::close_all_but(&mut [answers.as_raw_fd()]);
        let errno = fs::write(path, text).map_or_else(|e| e.raw_os_error().unwrap_or(0xff), |()| 0);
        let _ = nix::unistd::write(&answers, &[u8::try_from(errno).unwrap_or(0xff)]);
        sys::exit_now(0);
    }
    drop(answers);
    // One that was killed has said nothing: the end of the file is an error.
    match pipe::Receiver::from_owned_fd(answer)?.read_u8().await? {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno.into())),
    }
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
