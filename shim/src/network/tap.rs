//! Tap devices in a pod's network namespace: the end of the wire that the VM holds.
//!
//! A tap is never persistent: it exists as long as a descriptor of it is open, so a killed shim and
//! VM leave none behind and no record of it is needed.
#![expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::OpenOptionsExt,
    },
};

/// Kernel device that makes taps.
pub(super) const TUN_DEVICE: &str = "/dev/net/tun";
/// `%d` is replaced by the kernel with the lowest number that is free in the namespace.
const NAME_TEMPLATE: &[u8] = b"sealtap%d";

mod ioctl {
    // linux/if_tun.h: _IOW('T', 202, int), although what it takes is a struct ifreq.
    nix::ioctl_readwrite_bad!(
        tunsetiff,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// A tap, not up yet.
#[derive(Debug)]
pub(super) struct Tap {
    /// For the VM: frames, each with a virtio-net header before it.
    pub(super) fd: OwnedFd,
    /// In its namespace.
    pub(super) index: u32,
}

impl Tap {
    /// Makes a tap in the calling thread's network namespace.
    pub(super) fn create() -> io::Result<Self> {
        let tun = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(TUN_DEVICE)?;
        // SAFETY: ifreq is plain old data for which all zeros is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(NAME_TEMPLATE) {
            *to = from.cast_signed();
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: the descriptor is open and `request` is a valid ifreq that outlives the call; the
        // kernel reads it and writes the final name back into it.
        unsafe { ioctl::tunsetiff(tun.as_raw_fd(), &raw mut request) }?;
        let name: Vec<u8> = request
            .ifr_name
            .iter()
            .map(|c| c.cast_unsigned())
            .take_while(|c| *c != 0)
            .collect();
        let name = String::from_utf8(name).map_err(io::Error::other)?;
        // The host's own stack has no business on this wire: no router solicitations, no
        // link-local address. Absent where the kernel has no IPv6.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), b"1");
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        Ok(Self {
            fd: tun.into(),
            index,
        })
    }
}
