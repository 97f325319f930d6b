//! One connection: its two ends, its credit both ways, what it has to say to the guest. Talks to
//! its own socket and to nothing else; which packets reach it is decided in `engine`.
//!
//! ```text
//!             CONNECT            REQUEST sent, RESPONSE
//!  Greeting ───────────▶ Requested ─────────────▶ Established ──host end gone, guest told──▶ Lingering
//!     (host's client)        guest's REQUEST ───────▶  │   (waits for the guest's RST)
//!                                                      └─guest's RST or SHUTDOWN of both──▶ Draining
//!                                                          (backlog goes to the host, then closed)
//! ```

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::credit::Credit;
use super::packet::{
    Header, MAX_PAYLOAD, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::{hybrid, socket};
use crate::virtio::Buffers;

/// Who asked for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    Host,
    Guest,
}

/// Where a connection is in its life; see the drawing above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Greeting,
    Requested,
    Established,
    Lingering,
    Draining,
}

/// The ports that name a connection: there is one guest and one host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// What a guest did that costs it the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("sent more than its credit")]
    Credit,
    #[error("acknowledged bytes that it was not sent")]
    Acknowledged,
    #[error("sent an operation that does not fit the connection's state")]
    Order,
    #[error("sent a length that is not its packet's")]
    Length,
    #[error("sent data after its SHUTDOWN")]
    AfterShutdown,
}

pub(super) struct Connection {
    pub(super) state: State,
    pub(super) origin: Origin,
    pub(super) key: Key,
    /// Grows with every connection of the engine: the smaller, the older.
    pub(super) serial: u64,
    /// In the engine's list of connections with something to say.
    pub(super) queued: bool,
    /// The epoll set was asked to tell when the socket can be written to.
    pub(super) watches_writable: bool,
    stream: Option<UnixStream>,
    /// The packet that opens the connection, until it is sent.
    opening: Option<Op>,

    credit: Credit,

    // Guest to host.
    /// Received, not yet taken by the socket. At most the window's bytes.
    backlog: Vec<u8>,
    /// Directions that the guest has ended.
    guest_ended: u32,

    // Host to guest.
    /// The socket may have something to read.
    readable: bool,
    /// The client has closed its socket, not only one direction of it.
    hung_up: bool,
    /// Directions that have ended on the host, and which of them the guest was told.
    host_ended: u32,
    host_ended_told: u32,
}

impl Connection {
    /// A client that has not said yet what it wants.
    pub(super) fn greeting(stream: UnixStream, serial: u64) -> Self {
        Self {
            state: State::Greeting,
            origin: Origin::Host,
            key: Key::default(),
            serial,
            queued: false,
            watches_writable: false,
            stream: Some(stream),
            opening: None,
            credit: Credit::default(),
            backlog: Vec::new(),
            guest_ended: 0,
            readable: true,
            hung_up: false,
            host_ended: 0,
            host_ended_told: 0,
        }
    }

    /// A connection that the guest asked for with `request`, to a host service that took it.
    pub(super) fn accepted(
        stream: UnixStream,
        serial: u64,
        window: u32,
        key: Key,
        request: &Header,
    ) -> Self {
        Self {
            state: State::Established,
            origin: Origin::Guest,
            key,
            opening: Some(Op::Response),
            credit: Credit::new(window, request.buf_alloc),
            ..Self::greeting(stream, serial)
        }
    }

    /// The client has asked for a port of the guest.
    pub(super) fn request(&mut self, key: Key, window: u32) {
        self.state = State::Requested;
        self.key = key;
        self.credit = Credit::new(window, 0);
        self.opening = Some(Op::Request);
        self.readable = true;
    }

    pub(super) fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// Bytes that are promised to this connection.
    pub(super) fn window(&self) -> u32 {
        self.credit.window()
    }

    pub(super) fn backlog(&self) -> usize {
        self.backlog.len()
    }

    /// Whether the guest has heard of this connection.
    pub(super) fn guest_knows(&self) -> bool {
        !matches!(self.state, State::Greeting | State::Draining)
            && self.opening != Some(Op::Request)
    }

    /// Whether [`Connection::next_packet`] would try to make one.
    pub(super) fn has_output(&self) -> bool {
        match self.state {
            State::Requested => self.opening.is_some(),
            State::Established => {
                self.opening.is_some()
                    || self.credit.is_due()
                    || self.host_ended & !self.host_ended_told != 0
                    || (self.may_read() && self.credit.room() > 0)
            }
            State::Greeting | State::Lingering | State::Draining => false,
        }
    }

    /// Takes note of the credit that a packet of the guest grants.
    pub(super) fn note_credit(&mut self, header: &Header) -> Result<(), Violation> {
        self.credit.note(header)
    }

    /// The guest has granted the connection: the client is told.
    pub(super) fn respond(&mut self) -> Result<(), Violation> {
        if self.state != State::Requested || self.opening.is_some() {
            return Err(Violation::Order);
        }
        self.state = State::Established;
        let line = format!("OK {}\n", self.key.host_port);
        let told = (self.stream.as_ref())
            .and_then(|stream| socket::send_bytes(stream, line.as_bytes()).ok());
        if told != Some(line.len()) {
            self.hang_up();
        }
        Ok(())
    }

    /// Payload from the guest: to the socket as far as it takes it, the rest to the backlog.
    pub(super) fn receive(&mut self, payload: &Buffers<'_>) -> Result<(), Violation> {
        if self.state == State::Lingering {
            return Ok(()); // crossed our SHUTDOWN on its way
        }
        if self.state != State::Established || self.opening == Some(Op::Response) {
            return Err(Violation::Order);
        }
        if self.guest_ended & SHUTDOWN_SEND != 0 {
            return Err(Violation::AfterShutdown);
        }
        self.credit.receive(payload.len())?;
        let mut done = 0;
        if self.host_ended & SHUTDOWN_RECEIVE == 0 && self.backlog.is_empty() {
            match self
                .stream
                .as_ref()
                .map(|stream| socket::send(stream, payload))
            {
                Some(Ok(count)) => done = count,
                Some(Err(e)) if e.kind() == io::ErrorKind::WouldBlock => {}
                _ => self.hang_up(),
            }
        }
        if self.host_ended & SHUTDOWN_RECEIVE != 0 {
            done = payload.len(); // nobody will read it
        }
        self.make_room(payload.len() - done);
        payload.append_to(done, &mut self.backlog);
        self.credit.forward(done);
        Ok(())
    }

    /// Gives the backlog to the socket. Returns whether it is empty now.
    pub(super) fn flush(&mut self) -> bool {
        let mut done = 0;
        while done < self.backlog.len() {
            let sent = match &self.stream {
                Some(stream) => socket::send_bytes(stream, &self.backlog[done..]),
                None => Err(io::ErrorKind::BrokenPipe.into()),
            };
            match sent {
                Ok(count) => done += count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.hang_up();
                    return true;
                }
            }
        }
        self.credit.forward(done);
        if done < self.backlog.len() {
            self.backlog.drain(..done);
            return false;
        }
        self.backlog = Vec::new(); // an idle connection holds no memory
        if self.guest_ended & SHUTDOWN_SEND != 0 {
            self.shut(Shutdown::Write);
        }
        true
    }

    /// The guest has ended these directions. Returns whether both are over.
    pub(super) fn end_by_guest(&mut self, flags: u32) -> Result<bool, Violation> {
        match self.state {
            State::Established | State::Lingering => {}
            _ => return Err(Violation::Order),
        }
        let new = flags & SHUTDOWN_BOTH & !self.guest_ended;
        self.guest_ended |= new;
        if self.guest_ended == SHUTDOWN_BOTH {
            return Ok(true);
        }
        if new & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            self.shut(Shutdown::Write);
        }
        if new & SHUTDOWN_RECEIVE != 0 {
            self.shut(Shutdown::Read);
            if self.hung_up {
                self.host_ended |= SHUTDOWN_SEND; // what the client left behind has no reader
            }
        }
        Ok(false)
    }

    /// The guest has no more to do with this connection. Returns whether it can go now, or has
    /// bytes for its client first.
    pub(super) fn detach(&mut self) -> bool {
        self.state = State::Draining;
        self.opening = None;
        self.guest_ended = SHUTDOWN_BOTH;
        self.flush()
    }

    /// The socket may have something to read.
    pub(super) fn mark_readable(&mut self) {
        self.readable = true;
    }

    /// The client is gone: nothing can be delivered to it. What it sent before is still read.
    pub(super) fn hang_up(&mut self) {
        self.hung_up = true;
        self.readable = true;
        self.host_ended |= SHUTDOWN_RECEIVE;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            self.host_ended |= SHUTDOWN_SEND;
        }
        let lost = self.backlog.len();
        self.backlog = Vec::new();
        self.credit.forward(lost);
    }

    /// Asks for a packet that tells the guest where its credit stands.
    pub(super) fn owe_credit(&mut self) {
        self.credit.owe();
    }

    /// Makes the next packet for the guest, with its payload in `space`. CIDs are left to the
    /// caller.
    pub(super) fn next_packet(&mut self, space: &Buffers<'_>) -> Option<Header> {
        if let Some(op) = self.opening.take() {
            return Some(self.header(op));
        }
        if self.state != State::Established {
            return None;
        }
        if let Some(header) = self.next_shutdown() {
            return Some(header);
        }
        if let Some(length) = self.read_into(space) {
            self.credit.send(length);
            let header = self.header(Op::Rw);
            return Some(Header {
                len: length,
                ..header
            });
        }
        if let Some(header) = self.next_shutdown() {
            return Some(header);
        }
        (self.credit.is_due()).then(|| self.header(Op::CreditUpdate))
    }

    /// Closes the socket, if it is still open, so that its client gets everything that was sent.
    pub(super) fn close(&mut self) {
        if let Some(stream) = self.stream.take() {
            hybrid::close(stream);
        }
    }

    fn next_shutdown(&mut self) -> Option<Header> {
        if self.host_ended & !self.host_ended_told == 0 {
            return None;
        }
        self.host_ended_told = self.host_ended;
        if self.host_ended == SHUTDOWN_BOTH {
            self.state = State::Lingering;
        }
        let header = self.header(Op::Shutdown);
        Some(Header {
            flags: self.host_ended,
            ..header
        })
    }

    /// Reads from the socket into `space` within the guest's credit. `None`: nothing to be had.
    fn read_into(&mut self, space: &Buffers<'_>) -> Option<u32> {
        let room = (self.credit.room())
            .min(MAX_PAYLOAD)
            .min(space.len() as u32);
        if !self.may_read() || room == 0 {
            return None;
        }
        let stream = self.stream.as_ref()?;
        match socket::receive(stream, space, room as usize) {
            Ok(count) if count > 0 => return Some(count as u32),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            Ok(_) => self.host_ended |= SHUTDOWN_SEND,
            Err(_) => self.host_ended |= SHUTDOWN_BOTH,
        }
        self.readable = false;
        None
    }

    fn may_read(&self) -> bool {
        self.readable
            && self.host_ended & SHUTDOWN_SEND == 0
            && self.guest_ended & SHUTDOWN_RECEIVE == 0
    }

    /// Doubles the backlog's memory, but never beyond the window.
    fn make_room(&mut self, more: usize) {
        let need = self.backlog.len() + more;
        if need > self.backlog.capacity() {
            let double = (2 * self.backlog.capacity()).min(self.window() as usize);
            (self.backlog).reserve_exact(need.max(double) - self.backlog.len());
        }
    }

    fn shut(&self, direction: Shutdown) {
        if let Some(stream) = &self.stream {
            let _ = stream.shutdown(direction); // fails only when it is already so
        }
    }

    fn header(&mut self, op: Op) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.tell();
        Header {
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            type_: TYPE_STREAM,
            op: op as u16,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }
}
