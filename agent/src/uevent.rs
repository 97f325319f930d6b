//! Waiting for a device: the kernel's event socket tells when to look again.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use crate::sys;

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
