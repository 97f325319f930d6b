//! The host's end of a network device: one queue of a tap. System calls only.
#![expect(unsafe_code, reason = "a tap is set up with ioctls")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::virtio::{Buffers, Error, io as guest_io};

/// Bytes of `struct virtio_net_hdr_v1` before each frame.
pub(super) const HEADER: usize = 12;

// linux/if_tun.h, as _IOW('T', number, int) of x86-64.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;

/// What the guest takes without its being finished: parts of `TUNSETOFFLOAD`.
pub(super) const OFFLOAD_CSUM: u32 = libc::TUN_F_CSUM;
pub(super) const OFFLOAD_TSO4: u32 = libc::TUN_F_TSO4;
pub(super) const OFFLOAD_TSO6: u32 = libc::TUN_F_TSO6;
pub(super) const OFFLOAD_TSO_ECN: u32 = libc::TUN_F_TSO_ECN;

/// Opens the tap of this name, which somebody has made with `vnet_hdr` (ip-tuntap(8)).
///
/// # Errors
/// [`Error`]: no such tap, it is in use, or the name is longer than 15 bytes.
pub fn open_tap(name: &str) -> Result<OwnedFd, Error> {
    let resource = |what| move |source| Error::Resource { what, source };
    if !(1..libc::IFNAMSIZ).contains(&name.len()) {
        let why = format!("{name:?} is not the name of an interface");
        return Err(Error::Configuration(why));
    }
    let tap = (File::options().read(true).write(true).open("/dev/net/tun"))
        .map_err(resource("open /dev/net/tun"))?;
    // SAFETY: an all-zero `ifreq` is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: `request` is an `ifreq` that outlives the call.
    done(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) })
        .map_err(resource("open the tap"))?;
    Ok(tap.into())
}

/// A queue of a tap.
pub(super) struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Prepares a tap that was made with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
    pub(super) fn new(fd: OwnedFd) -> Result<Self, Error> {
        let resource = |what| move |source| Error::Resource { what, source };
        let tap = Self { fd };
        tap.set_nonblocking()
            .map_err(resource("make the tap non-blocking"))?;
        tap.set_header_size()
            .map_err(resource("set the size of the tap's packet headers"))?;
        Ok(tap)
    }

    /// Sets what the kernel may leave to the guest in frames for it.
    pub(super) fn set_offload(&self, offload: u32) -> io::Result<()> {
        // SAFETY: the argument of this call is a number, not a pointer.
        done(unsafe {
            libc::ioctl(
                self.as_raw_fd(),
                TUNSETOFFLOAD,
                libc::c_ulong::from(offload),
            )
        })
    }

    /// Has this queue of a multi-queue tap take part, or not.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        // SAFETY: an all-zero `ifreq` is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = match attached {
            true => libc::IFF_ATTACH_QUEUE as libc::c_short,
            false => libc::IFF_DETACH_QUEUE as libc::c_short,
        };
        // SAFETY: `request` is an `ifreq` that outlives the call.
        done(unsafe { libc::ioctl(self.as_raw_fd(), TUNSETQUEUE, &raw const request) })
    }

    /// Reads one frame with its header; `WouldBlock` when there is none.
    pub(super) fn read(&self, to: &Buffers<'_>) -> io::Result<usize> {
        guest_io::read(self, to)
    }

    /// Writes one frame with its header.
    pub(super) fn write(&self, from: &Buffers<'_>) -> io::Result<usize> {
        guest_io::write(self, from)
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        // SAFETY: no pointers are passed.
        let flags = unsafe { libc::fcntl(self.as_raw_fd(), libc::F_GETFL) };
        done(flags)?;
        // SAFETY: as above.
        done(unsafe { libc::fcntl(self.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
    }

    fn set_header_size(&self) -> io::Result<()> {
        let size = HEADER as libc::c_int;
        // SAFETY: `size` is an int that outlives the call; the kernel only reads it.
        done(unsafe { libc::ioctl(self.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) })
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
