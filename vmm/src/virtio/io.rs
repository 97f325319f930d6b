//! Reading and writing files straight from and to guest memory. System calls only; no decisions.
#![expect(
    unsafe_code,
    reason = "readv, writev, preadv and pwritev with guest memory as their buffers"
)]

use std::io;
use std::os::fd::AsRawFd;

use super::buffers::Buffers;

/// Reads once; 0 is the end. Returns how many bytes.
pub(super) fn read(from: &impl AsRawFd, to: &Buffers<'_>) -> io::Result<usize> {
    let pieces = to.iovecs(0, to.len());
    let count = pieces.len() as libc::c_int; // at most MAX_PIECES
    // SAFETY: `pieces` points to memory that `to` keeps mapped and writable for the call and that no
    // Rust reference points to (volatile slices).
    size(unsafe { libc::readv(from.as_raw_fd(), pieces.as_ptr(), count) })
}

/// Writes once. Returns how many bytes were taken.
pub(super) fn write(to: &impl AsRawFd, from: &Buffers<'_>) -> io::Result<usize> {
    let pieces = from.iovecs(0, from.len());
    let count = pieces.len() as libc::c_int; // at most MAX_PIECES
    // SAFETY: `pieces` points to memory that `from` keeps mapped for the call; the kernel only reads
    // it. That the guest may write it meanwhile changes what is written.
    size(unsafe { libc::writev(to.as_raw_fd(), pieces.as_ptr(), count) })
}

/// Fills `to` from byte `offset` of the file on.
///
/// # Errors
/// The kernel's; `UnexpectedEof` when the file ends before.
pub(super) fn read_at(from: &impl AsRawFd, to: &Buffers<'_>, offset: u64) -> io::Result<()> {
    all(to, offset, |pieces, count, offset| {
        // SAFETY: as in `read`.
        size(unsafe { libc::preadv(from.as_raw_fd(), pieces, count, offset) })
    })
}

/// Writes all of `from` to the file from byte `offset` on.
///
/// # Errors
/// The kernel's; `UnexpectedEof` when a device takes no more.
pub(super) fn write_at(to: &impl AsRawFd, from: &Buffers<'_>, offset: u64) -> io::Result<()> {
    all(from, offset, |pieces, count, offset| {
        // SAFETY: as in `write`.
        size(unsafe { libc::pwritev(to.as_raw_fd(), pieces, count, offset) })
    })
}

/// Calls `once` until all bytes of `buffers` are moved.
fn all(
    buffers: &Buffers<'_>,
    offset: u64,
    once: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < buffers.len() {
        let position = (offset.checked_add(done as u64)).and_then(|at| at.try_into().ok());
        let position = position.ok_or(io::ErrorKind::InvalidInput)?;
        let pieces = buffers.iovecs(done, usize::MAX);
        match once(pieces.as_ptr(), pieces.len() as libc::c_int, position) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn size(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
