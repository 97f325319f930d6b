//! The number by which the host knows a container of a pod: containerd names a container by its task's
//! pid where another one is to join it, so each needs one of its own. It is that of a thread which only
//! waits; with the container it ends.

use std::{io, sync::mpsc, thread};

use nix::unistd::gettid;

/// Bytes; it calls nothing.
const STACK: usize = 16 << 10;

/// See the file's head.
#[derive(Debug)]
pub(super) struct StandIn {
    pub(super) pid: u32,
    /// Dropped, the thread ends.
    _alive: mpsc::Sender<()>,
}

impl StandIn {
    pub(super) fn new() -> io::Result<Self> {
        let (alive, ended) = mpsc::channel::<()>();
        let (tell, told) = mpsc::sync_channel(1);
        let run = move || {
            let _ = tell.send(gettid().as_raw().unsigned_abs());
            let _ = ended.recv();
        };
        thread::Builder::new().stack_size(STACK).spawn(run)?;
        let pid = told.recv().map_err(io::Error::other)?;
        Ok(Self { pid, _alive: alive })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_number_of_its_own_as_long_as_it_lives() {
        let (a, b) = (
            StandIn::new().expect("thread"),
            StandIn::new().expect("thread"),
        );
        assert_ne!(a.pid, b.pid);
        assert_ne!(a.pid, std::process::id());
        assert!(std::path::Path::new(&format!("/proc/{}/ns/pid", a.pid)).exists());
    }
}
