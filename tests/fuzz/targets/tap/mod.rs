//! A tap for the network device, in a network namespace of the fuzzing process's own, and a socket on the
//! host's side of it. There is none where the process may not make one.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `TUNSETIFF` (linux/if_tun.h), as _IOW('T', 202, int) of x86-64.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

pub struct Wire {
    tap: File,
    host: File,
}

fn done(result: libc::c_int) -> io::Result<libc::c_int> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        other => Ok(other),
    }
}

fn request(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zeros are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

impl Wire {
    pub fn new() -> io::Result<Self> {
        // SAFETY: no pointers are passed.
        done(unsafe { libc::unshare(libc::CLONE_NEWNET) })?;
        let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
        let kind = request(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
        // SAFETY: `kind` is an ifreq that outlives the call.
        done(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw const kind) })?;
        // SAFETY: no pointers are passed; the descriptor is new.
        let host = unsafe {
            File::from_raw_fd(done(libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0))?)
        };
        let up = request(libc::IFF_UP);
        // SAFETY: `up` is an ifreq that outlives the call.
        done(unsafe { libc::ioctl(host.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const up) })?;
        let mut index = request(0);
        // SAFETY: as above; the kernel writes the index into it, which is read as such.
        let index = unsafe {
            done(libc::ioctl(host.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut index))?;
            index.ifr_ifru.ifru_ifindex
        };
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: 0, // it only sends
            sll_ifindex: index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let size = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: pointer and length are those of `address`.
        done(unsafe { libc::bind(host.as_raw_fd(), (&raw const address).cast(), size) })?;
        Ok(Self { tap, host })
    }

    pub fn tap(&self) -> OwnedFd {
        self.tap.try_clone().expect("a descriptor").into()
    }

    /// A frame for the guest; lost when too many wait.
    pub fn send(&self) {
        let frame = [[2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 0x88, 0xb5]; 8].concat();
        let _ = (&self.host).write(&frame);
    }
}
