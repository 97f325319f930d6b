//! The thread's io_uring: reads with guest memory as their buffers, many at once. It can do nothing else,
//! whoever comes to hold it: it is made so before its thread is confined, and cannot be changed afterwards.
//!
//! Source: io_uring(7), io_uring_register(2).
#![expect(
    unsafe_code,
    reason = "the kernel writes memory by address after the call"
)]

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, types};

/// Most operations at a time.
pub(super) const DEPTH: usize = 64;

thread_local! {
    static OWN: RefCell<Option<Uring>> = const { RefCell::new(None) };
}

/// Has the disks that this thread serves do several reads at once, from now on.
///
/// # Errors
/// The kernel has no io_uring (5.10 or later), or the host forbids it (`kernel.io_uring_disabled`). Disks then do one request after
/// the other.
pub fn prepare_thread() -> io::Result<()> {
    let own = Uring::new()?;
    OWN.with(|slot| slot.borrow_mut().replace(own));
    Ok(())
}

/// Calls `work` with the thread's ring, if it has one.
pub(super) fn with_own<T>(work: impl FnOnce(Option<&mut Uring>) -> T) -> T {
    OWN.with(|slot| work(slot.borrow_mut().as_mut()))
}

/// See the file's head.
pub(super) struct Uring(IoUring);

impl Uring {
    fn new() -> io::Result<Self> {
        let uring = (IoUring::builder().setup_r_disabled()).build(DEPTH as u32)?;
        let mut allowed = [Restriction::sqe_op(opcode::Readv::CODE)];
        uring.submitter().register_restrictions(&mut allowed)?;
        uring.submitter().register_enable_rings()?;
        Ok(Self(uring))
    }

    /// Adds a read of the file at an offset; `number` comes back with its end. It begins with
    /// [`Uring::wait`]. Returns whether there was room.
    ///
    /// # Safety
    /// The pieces and the memory that they name stay where they are until `number` has come back, and nothing but
    /// volatile accesses are made to that memory.
    pub(super) unsafe fn add(
        &mut self,
        file: BorrowedFd<'_>,
        pieces: &[libc::iovec],
        offset: u64,
        number: usize,
    ) -> bool {
        let file = types::Fd(file.as_raw_fd());
        let (first, count) = (pieces.as_ptr(), pieces.len() as u32); // at most MAX_PIECES
        let entry = opcode::Readv::new(file, first, count).offset(offset);
        let entry = entry.build().user_data(number as u64);
        // SAFETY: forwarded from the caller.
        unsafe { self.0.submission().push(&entry) }.is_ok()
    }

    /// Begins what was added, and waits until at least one has ended. Each is its number, and how many bytes were moved.
    ///
    /// # Errors
    /// The kernel's; nothing has ended then.
    pub(super) fn wait(&mut self) -> io::Result<Vec<(usize, io::Result<usize>)>> {
        loop {
            match self.0.submit_and_wait(1) {
                Ok(_) => {}
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
                    ) => {}
                Err(e) => return Err(e),
            }
            let ended: Vec<_> = (self.0.completion())
                .map(|entry| {
                    let moved = usize::try_from(entry.result());
                    let moved = moved.map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                    (entry.user_data() as usize, moved)
                })
                .collect();
            if !ended.is_empty() {
                return Ok(ended);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn it_reads_and_can_do_nothing_else() {
        let Ok(mut uring) = Uring::new() else {
            eprintln!("SKIPPED: this kernel has no io_uring, or forbids it");
            return;
        };
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"a few bytes", 4096).unwrap();
        let mut text = [0; 11];
        let piece = libc::iovec {
            iov_base: text.as_mut_ptr().cast(),
            iov_len: text.len(),
        };
        // SAFETY: the text outlives the wait, and nobody looks at it meanwhile.
        assert!(unsafe { uring.add(file.as_fd(), &[piece], 4096, 8) });
        let ended = uring.wait().unwrap();
        assert!(matches!(ended[..], [(8, Ok(11))]), "{ended:?}");
        assert_eq!(&text, b"a few bytes");

        let (here, first) = (types::Fd(file.as_raw_fd()), std::ptr::from_ref(&piece));
        let path = c"/";
        let root = types::Fd(libc::AT_FDCWD);
        for other in [
            opcode::Writev::new(here, first, 1).build(),
            opcode::OpenAt::new(root, path.as_ptr()).build(),
        ] {
            // SAFETY: the path is a constant, the piece and its text outlive the wait.
            unsafe { uring.0.submission().push(&other).unwrap() };
            let ended = uring.wait().unwrap();
            let refused = ended[0].1.as_ref().unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
        }
        assert!(uring.0.submitter().register_files(&[0]).is_err());
    }
}
