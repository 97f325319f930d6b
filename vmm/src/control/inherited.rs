//! Descriptors that the process began with: known by number only, and each handed out once.
#![expect(
    unsafe_code,
    reason = "an inherited descriptor is known by its number only"
)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use super::{Failure, lock};

/// First descriptor that is not one of the standard three.
const FIRST_FD: RawFd = 3;

/// See the file's head. Holds those that were handed out.
#[derive(Default)]
pub(super) struct Inherited(Mutex<Vec<RawFd>>);

impl Inherited {
    /// # Errors
    /// A standard descriptor, one that is not open, or one that was taken before.
    pub(super) fn take(&self, fd: RawFd) -> Result<OwnedFd, Failure> {
        let mut taken = lock(&self.0);
        // SAFETY: asks for the descriptor's flags; no pointer is passed.
        let open = unsafe { libc::fcntl(fd, libc::F_GETFD) } >= 0;
        if fd < FIRST_FD || !open || taken.contains(&fd) {
            return Err(format!("Descriptor {fd} is no inherited one, or is in use").into());
        }
        taken.push(fd);
        // SAFETY: it is open, and was taken by nobody else: descriptors are taken before this process
        // opens files of its own, or have numbers that the shim has given out before.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sets a flag of a descriptor that is open.
        unsafe { libc::fcntl(owned.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        Ok(owned)
    }

    pub(super) fn number(&self, fd: u32) -> Result<OwnedFd, Failure> {
        self.take(RawFd::try_from(fd)?)
    }
}
