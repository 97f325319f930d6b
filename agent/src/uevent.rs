//! Waiting for a device: the kernel's event socket tells when to look again.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::sys;

/// The platform bus in sysfs, which virtio-mmio slots are on.
pub const PLATFORM: &str = "/sys/bus/platform";
/// How long a device that is being attached may take to appear.
pub const TIMEOUT: Duration = Duration::from_secs(5);

/// Returns what `look` finds, now or after a later event of the kernel; `None` when [`TIMEOUT`] has
/// passed.
///
/// # Errors
/// When there is no event socket.
pub async fn until_found<T>(mut look: impl FnMut() -> Option<T>) -> io::Result<Option<T>> {
    if let Some(found) = look() {
        return Ok(Some(found));
    }
    // Listening before the next look: what appears after it is heard.
    let events = listen()?;
    probe_slots(Path::new(PLATFORM));
    let wait = async {
        loop {
            if let Some(found) = look() {
                return Ok(found);
            }
            // Any event will do: looking is cheap, and an overrun of the socket is an event too.
            let mut ready = events.readable().await?;
            let _ = ready.try_io(|fd| {
                let mut event = [0; 4096];
                recv(fd.as_raw_fd(), &mut event, MsgFlags::empty()).map_err(Into::into)
            });
        }
    };
    timeout(TIMEOUT, wait).await.ok().transpose()
}

/// Has the kernel look again for devices in virtio-mmio slots that were empty: nothing tells it when one
/// is plugged in. `bus` is the platform bus in sysfs; on a machine with PCI there are no slots. When it
/// returns, the devices are there.
pub fn probe_slots(bus: &Path) {
    let driver = bus.join("drivers/virtio-mmio");
    for device in fs::read_dir(bus.join("devices"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = device.file_name();
        let slot = name.as_encoded_bytes().starts_with(b"virtio-mmio.");
        if slot && !device.path().join("driver").exists() {
            // ENODEV: it is still empty.
            let _ = fs::write(driver.join("bind"), name.as_encoded_bytes());
        }
    }
}

/// The kernel's events (netlink(7), NETLINK_KOBJECT_UEVENT, group 1).
fn listen() -> io::Result<AsyncFd<OwnedFd>> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
    sys::register(socket, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_slots_without_a_driver_are_looked_at() {
        let bus = tempfile::tempdir().expect("folder");
        let devices = bus.path().join("devices");
        let driver = bus.path().join("drivers/virtio-mmio");
        fs::create_dir_all(&driver).expect("folder");
        for name in ["virtio-mmio.0", "virtio-mmio.1", "serial8250"] {
            fs::create_dir_all(devices.join(name)).expect("folder");
        }
        symlink(&driver, devices.join("virtio-mmio.0/driver")).expect("link");
        probe_slots(bus.path());
        let bound = fs::read_to_string(driver.join("bind")).expect("written");
        assert_eq!(bound, "virtio-mmio.1");
    }
}
