//! Memory that this process and one daemon share in place of the guest's, and what they wake each other
//! with. Made before the process gives up making such things; nobody else ever sees it.

use std::fs::File;

use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use crate::memfd::memfd;

/// Bytes; only what is used takes memory.
const SIZE: u64 = 6 << 20;
/// Most queues that a daemon serves.
pub(super) const QUEUES: usize = 2;

/// See the file's head.
pub struct Window {
    /// Its addresses begin at 0.
    pub(super) memory: GuestMemoryMmap,
    /// By queue: signalled for the daemon, and by it.
    pub(super) kicks: [EventFd; QUEUES],
    pub(super) calls: [EventFd; QUEUES],
}

impl Window {
    /// One that nobody uses yet.
    ///
    /// # Errors
    /// The kernel has no memory or no descriptors for it.
    pub fn new() -> Result<Self, Error> {
        let resource = |what| move |source| Error::Resource { what, source };
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let pair = || Ok([eventfd()?, eventfd()?]);
        let file: File = memfd(c"window", SIZE).map_err(resource("make shared memory"))?;
        let range = (
            GuestAddress(0),
            SIZE as usize,
            Some(FileOffset::new(file, 0)),
        );
        let memory = GuestMemoryMmap::from_ranges_with_files([range])
            .map_err(|e| Error::Configuration(format!("its memory cannot be mapped: {e}")))?;
        Ok(Self {
            memory,
            kicks: pair().map_err(resource("make an eventfd"))?,
            calls: pair().map_err(resource("make an eventfd"))?,
        })
    }
}
