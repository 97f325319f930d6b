//! The few socket calls that the standard library does not have: to and from guest memory without
//! a copy, without blocking, without signals. System calls only; no decisions.
#![expect(
    unsafe_code,
    reason = "sendmsg and recvmsg with guest memory as their buffers; connect that does not block"
)]

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::virtio::Buffers;

/// Longest path of a Unix socket, bytes (unix(7): `sun_path`, less its terminating zero).
pub(super) const MAX_PATH: usize = 107;

/// Sends guest memory. Returns how many bytes the socket took; `WouldBlock` when none.
pub(super) fn send(stream: &UnixStream, from: &Buffers<'_>) -> io::Result<usize> {
    let mut pieces = from.iovecs(0, from.len());
    let message = message(&mut pieces);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points to `pieces`, and these to memory that `from` keeps mapped for the
    // call; the kernel only reads it. That the guest may write it meanwhile changes what is sent.
    size(unsafe { libc::sendmsg(stream.as_raw_fd(), &message, flags) })
}

/// Receives up to `most` bytes into guest memory; 0 is the end of the stream.
pub(super) fn receive(stream: &UnixStream, to: &Buffers<'_>, most: usize) -> io::Result<usize> {
    let mut pieces = to.iovecs(0, most);
    let mut message = message(&mut pieces);
    // SAFETY: `message` points to `pieces`, and these to memory that `to` keeps mapped and writable
    // for the call and that no Rust reference points to (volatile slices).
    size(unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

/// Reads what is there without taking it; 0 is the end of the stream.
pub(super) fn peek(stream: &UnixStream, to: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: pointer and length are those of `to`.
    size(unsafe { libc::recv(stream.as_raw_fd(), to.as_mut_ptr().cast(), to.len(), flags) })
}

/// Sends ordinary bytes like [`send`].
pub(super) fn send_bytes(stream: &UnixStream, from: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are those of `from`.
    size(unsafe { libc::send(stream.as_raw_fd(), from.as_ptr().cast(), from.len(), flags) })
}

/// Connects to a listening Unix socket at once or not at all: a full backlog is `WouldBlock`.
pub(super) fn connect(path: &Path) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no pointers are passed.
    let fd = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and is owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero `sockaddr_un` is a valid one.
    let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = mem::size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: `address` is a `sockaddr_un` of `length` bytes with a terminated path.
    let done = unsafe { libc::connect(fd.as_raw_fd(), (&raw const address).cast(), length) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(UnixStream::from(fd))
}

/// A message header for these pieces, as long as they stay where they are.
fn message(pieces: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: an all-zero `msghdr` is a valid, empty one.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = pieces.as_mut_ptr();
    message.msg_iovlen = pieces.len();
    message
}

fn size(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn guest_memory_goes_through_a_socket_in_pieces() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut bytes = *b"hello, guest";
        let mut out = Buffers::default();
        for piece in bytes.chunks_mut(5) {
            out.push(vm_memory::VolatileSlice::from(piece)).unwrap();
        }
        assert_eq!(send(&a, &out).unwrap(), 12);
        let mut got = [0; 12];
        assert_eq!(peek(&b, &mut got[..5]).unwrap(), 5);
        assert_eq!(receive(&b, &Buffers::from(&mut got[..]), 7).unwrap(), 7);
        assert_eq!(&got, b"hello, \0\0\0\0\0");
        assert_eq!(receive(&b, &Buffers::from(&mut got[7..]), 5).unwrap(), 5);
        assert_eq!(&got, b"hello, guest");
        let error = receive(&b, &Buffers::from(&mut got[..]), 12).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(b);
        let error = send(&a, &Buffers::from(&mut got[..])).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn connecting_never_waits() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let error = connect(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let mut open = Vec::new();
        let full = loop {
            match connect(&path) {
                Ok(stream) if open.len() < 100_000 => open.push(stream),
                other => break other,
            }
        };
        assert_eq!(full.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(listener);
        let error = connect(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert!(connect(&dir.path().join("x".repeat(108))).is_err());
    }
}
