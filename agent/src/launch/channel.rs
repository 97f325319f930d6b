//! The channel between the agent and a process that it is making: one socket pair, short messages
//! (see the drawing in the parent module). Encoding and passing of descriptors only.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv,
    recvmsg, send, sendmsg, socketpair,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sys;

/// Longest message; a longer error text is cut.
const MESSAGE_MAX: usize = 4096;

/// What a child says.
#[derive(Debug)]
pub enum Report {
    /// Master of the terminal it has made.
    Terminal(OwnedFd),
    /// A file with the seccomp program that it has compiled.
    Seccomp(OwnedFd),
    /// Prepared; it waits for [`Agent::go`].
    Ready,
    /// It failed, with this text.
    Failed(String),
    /// The channel has closed: execve has happened, or the process is gone.
    Closed,
}

/// The agent's end.
#[derive(Debug)]
pub struct Agent(AsyncFd<OwnedFd>);

/// The child's end.
#[derive(Debug)]
pub(super) struct Child(OwnedFd);

/// A new channel.
pub(super) fn pair() -> nix::Result<(Agent, Child)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    nix::fcntl::fcntl(
        &ours,
        nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
    )?;
    let ours = sys::register(ours, Interest::READABLE).map_err(|_| Errno::ENOMEM)?;
    Ok((Agent(ours), Child(theirs)))
}

impl Agent {
    /// The child's next message. Anything unknown counts as a failure of the child.
    pub async fn next(&self) -> Report {
        loop {
            let Ok(mut ready) = self.0.readable().await else {
                return Report::Closed;
            };
            let read = ready.try_io(|fd| receive(fd.as_fd()).map_err(Into::into));
            match read {
                Ok(Ok((0, _, _))) | Ok(Err(_)) => return Report::Closed,
                Ok(Ok((length, message, fd))) => return decode(&message[..length], fd),
                Err(_would_block) => {}
            }
        }
    }

    /// Lets a prepared child execute its program.
    pub fn go(&self) -> nix::Result<()> {
        self.send(b"G")
    }

    /// Tells a child in a user namespace that its maps are written.
    pub(super) fn mapped(&self) -> nix::Result<()> {
        self.send(b"M")
    }

    fn send(&self, message: &[u8]) -> nix::Result<()> {
        send(self.0.as_raw_fd(), message, MsgFlags::MSG_NOSIGNAL).map(drop)
    }
}

fn decode(message: &[u8], fd: Option<OwnedFd>) -> Report {
    match (message, fd) {
        (b"P", Some(fd)) => Report::Terminal(fd),
        (b"S", Some(fd)) => Report::Seccomp(fd),
        (b"R", _) => Report::Ready,
        ([b'E', text @ ..], _) => Report::Failed(String::from_utf8_lossy(text).into_owned()),
        _ => Report::Failed("The process sent an unknown report".into()),
    }
}

type Received = (usize, [u8; MESSAGE_MAX], Option<OwnedFd>);

fn receive(fd: BorrowedFd<'_>) -> nix::Result<Received> {
    let mut message = [0; MESSAGE_MAX];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut parts = [IoSliceMut::new(&mut message)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let got = recvmsg::<()>(fd.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut passed = None;
    for control in got.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // Every one is adopted, so that none stays open unseen.
            for fd in fds.into_iter().map(sys::adopt) {
                passed = Some(fd);
            }
        }
    }
    Ok((got.bytes, message, passed))
}

impl Child {
    /// Waits for the maps of the user namespace.
    pub(super) fn wait_mapped(&self) -> nix::Result<()> {
        self.expect(b'M')
    }

    /// Waits for the start.
    pub(super) fn wait_go(&self) -> nix::Result<()> {
        self.expect(b'G')
    }

    fn expect(&self, what: u8) -> nix::Result<()> {
        let mut byte = [0];
        match recv(self.0.as_raw_fd(), &mut byte, MsgFlags::empty())? {
            1 if byte[0] == what => Ok(()),
            _ => Err(Errno::EPIPE),
        }
    }

    pub(super) fn terminal(&self, master: BorrowedFd<'_>) -> nix::Result<()> {
        self.pass(b"P", master)
    }

    pub(super) fn seccomp(&self, program: BorrowedFd<'_>) -> nix::Result<()> {
        self.pass(b"S", program)
    }

    pub(super) fn ready(&self) -> nix::Result<()> {
        send(self.0.as_raw_fd(), b"R", MsgFlags::MSG_NOSIGNAL).map(drop)
    }

    /// Best effort: the process ends either way.
    pub(super) fn failed(&self, text: &str) {
        let mut message = Vec::with_capacity(1 + text.len());
        message.push(b'E');
        message.extend_from_slice(text.as_bytes());
        message.truncate(MESSAGE_MAX);
        let _ = send(self.0.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL);
    }

    fn pass(&self, message: &[u8], fd: BorrowedFd<'_>) -> nix::Result<()> {
        let fds = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(message)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(self.0.as_raw_fd(), &parts, &control, flags, None).map(drop)
    }
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
