//! The process's terminal: made from the container's own devpts, its master handed to the agent. Runs
//! in the child, inside the container's root.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, open as open_at};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{Uid, fchown};

use super::mounts::{self, Kind};
use super::{LaunchError, Step};
use crate::sys;

/// Makes a terminal, makes it the controlling one and the standard streams; returns its master.
pub(super) fn open(size: (u16, u16), uid: u32) -> Result<OwnedFd, LaunchError> {
    let what = || "failed to make a terminal from the container's /dev/ptmx".to_owned();
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = open_file("/dev/ptmx", flags).step(what)?;
    // Not a file that someone in the container has put there.
    if fstat(&master).step(what)?.st_rdev != libc::makedev(5, 2) {
        return Err(nix::errno::Errno::ENODEV).step(what);
    }
    sys::unlock_pty(master.as_fd()).step(what)?;
    let slave = sys::open_pty_slave(master.as_fd()).step(what)?;
    fchown(&slave, Some(Uid::from_raw(uid)), None).step(what)?;
    if size != (0, 0) {
        sys::set_window_size(slave.as_fd(), size.0, size.1).step(what)?;
    }
    sys::take_terminal(slave.as_fd()).step(what)?;
    for number in 0..3 {
        sys::make_standard(slave.as_fd(), number).step(what)?;
    }
    Ok(master)
}

fn open_file(path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    open_at(path, flags, Mode::empty())
}

/// Shows the terminal, which is standard input by now, as `/dev/console`.
pub(super) fn mount_console() -> Result<(), LaunchError> {
    let what = || "failed to make /dev/console".to_owned();
    let folder = OFlag::O_DIRECTORY | OFlag::O_PATH | OFlag::O_CLOEXEC;
    let root = open_file("/", folder).step(what)?;
    let target = mounts::ensure(root.as_fd(), Path::new("/dev/console"), Kind::File).step(what)?;
    let stdin = std::io::stdin();
    let copy = sys::open_tree(stdin.as_fd(), c"", false).step(what)?;
    sys::move_mount(copy.as_fd(), target.as_fd()).step(what)
}
