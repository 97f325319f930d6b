//! The host's side of the engine: the listening Unix socket, the `CONNECT` line, the sockets that
//! guests are connected to, and the epoll set of all of them. No packets here.
//!
//! Everything is edge-triggered: a socket that the guest does not drain wakes nobody.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Error;
use super::socket;
use super::table::Id;

/// Longest `CONNECT <port>\n`, bytes.
const LINE_MAX: usize = 32;
/// Event data of the listening socket; no [`Id`] has this value.
const LISTENER: u64 = u64::MAX;
/// Of unread input of a socket that is closed, at most so much is thrown away first, bytes.
const DISCARD_MAX: usize = 1 << 20;

/// What a client has said so far.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// `CONNECT` with this port; the line has been taken, nothing after it.
    Connect(u32),
    /// Not a whole line yet.
    Incomplete,
    /// Not a `CONNECT` line, or the client is gone.
    Bad,
}

/// Something that happened on the host's side.
pub(super) enum Event {
    /// Clients wait at the listening socket.
    Clients,
    /// One connection's socket is ready for something.
    Stream(Id, EventSet),
}

/// Listening socket and epoll set.
pub(super) struct Hybrid {
    epoll: Epoll,
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl Hybrid {
    /// Starts to listen on `path`.
    pub(super) fn new(path: &Path) -> Result<Self, Error> {
        let max = socket::MAX_PATH - "_4294967295".len();
        let len = path.as_os_str().as_bytes().len();
        if len > max {
            let path = path.to_owned();
            return Err(Error::PathTooLong { path, len, max });
        }
        let resource = |source| Error::Resource {
            what: "an epoll set",
            source,
        };
        let epoll = Epoll::new().map_err(resource)?;
        let failed = |source| Error::Listen {
            path: path.to_owned(),
            source,
        };
        let listener = UnixListener::bind(path).map_err(failed)?;
        // From here on a failure removes the socket again.
        let hybrid = Self {
            epoll,
            listener: Some(listener),
            path: path.to_owned(),
        };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        if let Some(listener) = &hybrid.listener {
            listener.set_nonblocking(true).map_err(failed)?;
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            let event = EpollEvent::new(events, LISTENER);
            (hybrid.epoll)
                .ctl(ControlOperation::Add, listener.as_raw_fd(), event)
                .map_err(resource)?;
        }
        Ok(hybrid)
    }

    /// The next client, if one waits.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        let listener = self.listener.as_ref()?;
        loop {
            match listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => return Some(stream),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => {}
                Err(_) => return None,
            }
        }
    }

    /// Connects to the host service that stands for `port`.
    pub(super) fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let mut path = OsString::from(&self.path);
        path.push(format!("_{port}"));
        socket::connect(Path::new(&path))
    }

    /// Has events of `stream` reported as those of `id`.
    pub(super) fn watch(&self, stream: &UnixStream, id: Id) -> io::Result<()> {
        self.control(ControlOperation::Add, stream, id, EventSet::empty())
    }

    /// Has it reported, or no longer, when `stream` can be written to.
    pub(super) fn watch_writable(
        &self,
        stream: &UnixStream,
        id: Id,
        wanted: bool,
    ) -> io::Result<()> {
        let more = if wanted {
            EventSet::OUT
        } else {
            EventSet::empty()
        };
        self.control(ControlOperation::Modify, stream, id, more)
    }

    fn control(
        &self,
        operation: ControlOperation,
        stream: &UnixStream,
        id: Id,
        more: EventSet,
    ) -> io::Result<()> {
        let always = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let event = EpollEvent::new(always | more, id.0);
        self.epoll.ctl(operation, stream.as_raw_fd(), event)
    }

    /// Hands what has happened to `handle`; returns whether there may be more.
    pub(super) fn events(&self, mut handle: impl FnMut(Event)) -> bool {
        let mut events = [EpollEvent::default(); 32];
        let count = self.epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..count] {
            handle(match event.data() {
                LISTENER => Event::Clients,
                id => Event::Stream(Id(id), EventSet::from_bits_truncate(event.events())),
            });
        }
        count == events.len()
    }

    /// Stops listening and removes the socket. Idempotent.
    pub(super) fn close(&mut self) {
        if self.listener.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Hybrid {
    fn drop(&mut self) {
        self.close();
    }
}

impl AsRawFd for Hybrid {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// Reads a client's first line, and not one byte more.
pub(super) fn read_greeting(stream: &UnixStream) -> Greeting {
    let mut line = [0; LINE_MAX];
    let count = match socket::peek(stream, &mut line) {
        Ok(0) => return Greeting::Bad,
        Ok(count) => count,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Greeting::Incomplete,
        Err(_) => return Greeting::Bad,
    };
    let Some(end) = line[..count].iter().position(|&byte| byte == b'\n') else {
        let started = b"CONNECT ".iter().zip(&line[..count]).all(|(a, b)| a == b);
        return match started && count < LINE_MAX {
            true => Greeting::Incomplete,
            false => Greeting::Bad,
        };
    };
    let taken = io::Read::read(&mut &*stream, &mut line[..=end]);
    match (taken, parse_connect(&line[..end])) {
        (Ok(taken), Some(port)) if taken == end + 1 => Greeting::Connect(port),
        _ => Greeting::Bad,
    }
}

/// The port of a `CONNECT` line without its newline.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let port = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (port != u32::MAX).then_some(port) // VMADDR_PORT_ANY is no port to connect to
}

/// Closes a socket so that its client reads everything that was sent and then the end: closing with
/// input unread would give it `ECONNRESET` instead (unix(7)).
pub(super) fn close(stream: UnixStream) {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut scratch = [0; 4096];
    let mut left = DISCARD_MAX;
    while left > 0 {
        match io::Read::read(&mut &stream, &mut scratch) {
            Ok(0) | Err(_) => return,
            Ok(count) => left = left.saturating_sub(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn greeting(text: &[u8]) -> Greeting {
        let (mut client, engine) = UnixStream::pair().unwrap();
        client.write_all(text).unwrap();
        read_greeting(&engine)
    }

    #[test]
    fn only_connect_lines_are_understood() {
        assert_eq!(greeting(b"CONNECT 1025\n"), Greeting::Connect(1025));
        assert_eq!(greeting(b"CONNECT 0\n"), Greeting::Connect(0));
        assert_eq!(
            greeting(b"CONNECT 4294967294\nx"),
            Greeting::Connect(u32::MAX - 1)
        );
        for partial in [&b"C"[..], b"CONNECT ", b"CONNECT 12"] {
            assert_eq!(greeting(partial), Greeting::Incomplete, "{partial:?}");
        }
        for bad in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT 4294967295\n",
            b"CONNECT 4294967296\n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 1 \n",
            b"CONNECT  1\n",
            b"connect 1\n",
            b"GET / HTTP/1.0",
            b"CONNECT 1\r\n",
            b"CONNECT 00000000000000000000000000000001\n",
            b"CONNECT 000000000000000000000001",
            b"CONNECT \xff\n",
        ] {
            assert_eq!(greeting(bad), Greeting::Bad, "{bad:?}");
        }
    }

    #[test]
    fn bytes_after_the_line_stay_in_the_socket() {
        let (mut client, engine) = UnixStream::pair().unwrap();
        client.write_all(b"CONNECT 7\nfirst bytes").unwrap();
        assert_eq!(read_greeting(&engine), Greeting::Connect(7));
        let mut rest = [0; 11];
        (&engine).read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"first bytes");
    }

    #[test]
    fn a_closed_socket_gives_its_last_bytes_and_then_the_end() {
        let (mut client, engine) = UnixStream::pair().unwrap();
        engine.set_nonblocking(true).unwrap();
        client.write_all(b"never read").unwrap();
        (&engine).write_all(b"last words").unwrap();
        close(engine);
        let mut got = String::new();
        client.read_to_string(&mut got).unwrap();
        assert_eq!(got, "last words");
    }

    #[test]
    fn a_path_that_leaves_no_room_for_a_port_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x".repeat(100));
        assert!(matches!(Hybrid::new(&path), Err(Error::PathTooLong { .. })));
        let path = dir.path().join("s");
        let hybrid = Hybrid::new(&path).unwrap();
        assert!(matches!(Hybrid::new(&path), Err(Error::Listen { .. })));
        assert!(
            path.exists(),
            "a failed second start leaves the first alone"
        );
        drop(hybrid);
        assert!(!path.exists());
    }
}
