//! The two things a pod leaves in a network namespace that is not its own: a link and an ingress
//! qdisc. Removing them takes one netlink request each, made here by hand so that cleaning needs no
//! runtime and shares no code with what may have crashed.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FsWord, fstatfs};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `NSFS_MAGIC` of linux/magic.h: what `statfs` says of a namespace's file.
const NSFS_MAGIC: FsWord = 0x6e73_6673;
/// `RTM_DELLINK`, `RTM_DELQDISC` of linux/rtnetlink.h.
const RTM_DELLINK: u16 = 17;
const RTM_DELQDISC: u16 = 37;
/// `NLM_F_REQUEST | NLM_F_ACK` of linux/netlink.h.
const REQUEST_ACK: u16 = 1 | 4;
/// `NLMSG_ERROR` of linux/netlink.h.
const NLMSG_ERROR: u16 = 2;
/// `TC_H_INGRESS` of linux/pkt_sched.h: parent of the ingress qdisc; its handle is `ffff:`.
const TC_H_INGRESS: u32 = 0xffff_fff1;
const INGRESS_HANDLE: u32 = 0xffff_0000;

/// Removes the link `name` in the namespace of `netns`. Gone already is success.
pub(super) fn delete_link(netns: &Path, name: &str) -> Result<(), String> {
    inside(netns, name, |index| {
        // struct ifinfomsg: family, pad, type, index, flags, change.
        let mut body = [0u8; 16];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        request(RTM_DELLINK, &body)
    })
}

/// Removes the ingress qdisc, and with it its filters, of the link `name` in the namespace of
/// `netns`. Gone already is success.
pub(super) fn delete_ingress(netns: &Path, name: &str) -> Result<(), String> {
    inside(netns, name, |index| {
        // struct tcmsg: family, pad[3], ifindex, handle, parent, info.
        let mut body = [0u8; 20];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..12].copy_from_slice(&INGRESS_HANDLE.to_ne_bytes());
        body[12..16].copy_from_slice(&TC_H_INGRESS.to_ne_bytes());
        request(RTM_DELQDISC, &body)
    })
}

/// Runs `f` with the index of link `name` on a thread of its own that has moved into `netns`.
fn inside(
    netns: &Path,
    name: &str,
    f: impl FnOnce(u32) -> io::Result<()> + Send,
) -> Result<(), String> {
    let file = match File::open(netns) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(format!("{}: {e}", netns.display())),
    };
    match fstatfs(&file) {
        Ok(s) if s.f_type == NSFS_MAGIC => {}
        // What held the namespace was unmounted; its links went with it.
        Ok(_) => return Ok(()),
        Err(e) => return Err(format!("{}: {e}", netns.display())),
    }
    std::thread::scope(|scope| {
        scope
            .spawn(move || {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                let Some(index) = link_index(name)? else {
                    return Ok(());
                };
                match f(index) {
                    Err(e) if gone(&e) => Ok(()),
                    other => other,
                }
            })
            .join()
            .unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
            .map_err(|e| e.to_string())
    })
}

fn gone(e: &io::Error) -> bool {
    matches!(
        e.raw_os_error(),
        Some(libc::ENODEV | libc::ENOENT | libc::EINVAL)
    )
}

fn link_index(name: &str) -> io::Result<Option<u32>> {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::DGRAM, None)?;
    match rustix::net::netdevice::name_to_index(&socket, name) {
        Ok(index) => Ok(Some(index)),
        Err(rustix::io::Errno::NODEV) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Sends one request and reads its acknowledgement.
fn request(kind: u16, body: &[u8]) -> io::Result<()> {
    let socket: OwnedFd = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        // Protocol 0 is NETLINK_ROUTE.
        None,
    )?;
    let length = u32::try_from(16 + body.len()).map_err(io::Error::other)?;
    let mut message = Vec::with_capacity(16 + body.len());
    // struct nlmsghdr: len, type, flags, seq, pid.
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&REQUEST_ACK.to_ne_bytes());
    message.extend_from_slice(&1u32.to_ne_bytes());
    message.extend_from_slice(&0u32.to_ne_bytes());
    message.extend_from_slice(body);
    rustix::net::send(&socket, &message, SendFlags::empty())?;
    let mut answer = [0u8; 512];
    let (n, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
    let kind = answer.get(4..6).map(|b| u16::from_ne_bytes([b[0], b[1]]));
    if n < 20 || kind != Some(NLMSG_ERROR) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}
