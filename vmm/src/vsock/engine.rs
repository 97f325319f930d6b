//! The multiplexer: packets of one guest on one side, Unix sockets of the host on the other. Decides
//! what every packet means; does not know how packets travel (see `queues`, `vhost_user`).
//!
//! A guest that breaks a rule gets a RST and loses that connection. A guest that does not take what
//! it is sent is not sent more, and in the end its own packets are no longer taken.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

use tracing::{debug, warn};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Key, Origin, State, Violation};
use super::hybrid::{self, Event, Greeting, Hybrid};
use super::packet::{HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM};
use super::table::{Id, Table};
use super::{Error, Limits};
use crate::virtio::Buffers;

/// Resets that wait for the guest to take them; with so many, its packets are not taken either.
const MAX_RESETS: usize = 64;
/// Faults of the guest that are logged; later ones are only counted.
const MAX_COMPLAINTS: u32 = 16;

/// What an engine is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Socket for host clients; services for the guest listen on this path with `_<port>` added.
    pub uds: PathBuf,
    /// The guest's context id.
    pub guest_cid: u64,
    /// Caps.
    pub limits: Limits,
}

/// The vsock device of one guest, without its transport.
///
/// The transport calls [`Engine::handle_events`] when the engine's file descriptor (an epoll set) is
/// readable, hands it the guest's packets with [`Engine::receive`] and takes packets for the guest
/// with [`Engine::next_packet`]. Nothing blocks.
pub struct Engine {
    guest_cid: u64,
    table: Table,
    hybrid: Hybrid,
    /// Connections with something to say, each once, in turn.
    ready: VecDeque<Id>,
    resets: VecDeque<Header>,
    /// The guest has taken part in a connection of this engine. What it sends before that is of another
    /// engine's time and not answered: `docs/vsock.md` has the reason.
    known: bool,
    faults: u32,
}

impl Engine {
    /// Starts to listen for host clients.
    ///
    /// # Errors
    /// [`Error`]: limits, CID or path are unusable, or the kernel refuses.
    pub fn new(config: &Config) -> Result<Self, Error> {
        config.limits.check()?;
        if !(3..u64::from(u32::MAX)).contains(&config.guest_cid) {
            return Err(Error::GuestCid(config.guest_cid));
        }
        Ok(Self {
            guest_cid: config.guest_cid,
            table: Table::new(config.limits),
            hybrid: Hybrid::new(&config.uds)?,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            known: false,
            faults: 0,
        })
    }

    /// The guest's context id.
    #[must_use]
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Whether the guest's next packet may be handed in: not while it leaves answers lying.
    #[must_use]
    pub fn accepts_packets(&self) -> bool {
        self.resets.len() < MAX_RESETS
    }

    /// Whether [`Engine::next_packet`] may have one.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Takes one packet of the guest. `payload` is what of it was in the packet's buffers, at most
    /// `header.len` bytes.
    pub fn receive(&mut self, header: &Header, payload: &Buffers<'_>) {
        if header.src_cid != self.guest_cid {
            return self.complain(header, &"is from a CID that is not the guest's");
        }
        let addressed = header.dst_cid == HOST_CID && header.type_ == TYPE_STREAM;
        let key = Key {
            host_port: header.dst_port,
            guest_port: header.src_port,
        };
        let known = self.table.find(key).filter(|_| addressed);
        let op = Op::new(header.op);
        if op == Some(Op::Rst) {
            if let Some(id) = known {
                self.detach(id);
            }
            return;
        }
        self.known |= known.is_some() || op == Some(Op::Request);
        match (known, op) {
            (None, Some(Op::Request)) if addressed && header.len == 0 => self.open(key, header),
            (None, _) if self.known => self.resets.push_back(header.reset()),
            (None, _) => debug!(
                ?header,
                "A packet of a connection before this engine's time"
            ),
            (Some(id), op) => {
                if let Err(fault) = self.deliver(id, op, header, payload) {
                    self.complain(header, &fault);
                    self.resets.push_back(header.reset());
                    self.detach(id);
                }
            }
        }
    }

    /// Fills `space` with the payload of the next packet for the guest and returns its header.
    /// `space` must not be empty.
    pub fn next_packet(&mut self, space: &Buffers<'_>) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.table.get(id) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(space);
            if connection.state == State::Lingering {
                connection.close();
            }
            if packet.is_some() {
                self.queue(id);
                return packet.map(|header| Header {
                    src_cid: HOST_CID,
                    dst_cid: self.guest_cid,
                    ..header
                });
            }
        }
        None
    }

    /// Looks at what happened on the host's sockets.
    pub fn handle_events(&mut self) {
        let mut events = Vec::new();
        loop {
            let more = self.hybrid.events(|event| events.push(event));
            for event in events.drain(..) {
                match event {
                    Event::Clients => self.accept_clients(),
                    Event::Stream(id, ready) => self.handle_stream(id, ready),
                }
            }
            if !more {
                return;
            }
        }
    }

    /// The guest has started anew: it knows no connections. What it had sent still goes to its
    /// clients, then they are closed; clients it never heard of keep waiting.
    pub fn reset(&mut self) {
        self.known = false;
        self.resets.clear();
        for id in self.table.ids() {
            if self.table.get(id).is_some_and(|c| c.guest_knows()) {
                self.detach(id);
            }
        }
    }

    /// The guest will not come back: like [`Engine::reset`], and there will be no new clients.
    pub fn close(&mut self) {
        self.hybrid.close();
        self.reset();
        for id in self.table.ids() {
            if self
                .table
                .get(id)
                .is_some_and(|c| c.state != State::Draining)
            {
                self.remove(id);
            }
        }
    }

    /// Connections, greetings and those that only drain: what the engine holds, for tests.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.table.connections().count()
    }

    /// Panics when the engine's accounting does not add up. For tests and fuzzing.
    pub fn check(&self) {
        self.table.check();
        assert!(self.resets.len() <= MAX_RESETS + self.connections() + 1);
    }

    fn open(&mut self, key: Key, request: &Header) {
        if !self.make_room(Origin::Guest) {
            self.complain(request, &"is for one connection more than are allowed");
            return self.resets.push_back(request.reset());
        }
        let stream = match self.hybrid.dial(key.host_port) {
            Ok(stream) => stream,
            Err(e) => {
                debug!(port = key.host_port, "No host service for the guest: {e}");
                return self.resets.push_back(request.reset());
            }
        };
        let added = self.table.add_accepted(key, |serial, window| {
            Connection::accepted(stream, serial, window, key, request)
        });
        match added {
            Some(id) if self.watch(id) => self.queue(id),
            Some(id) => {
                self.remove(id);
                self.resets.push_back(request.reset());
            }
            None => self.resets.push_back(request.reset()),
        }
    }

    fn deliver(
        &mut self,
        id: Id,
        op: Option<Op>,
        header: &Header,
        payload: &Buffers<'_>,
    ) -> Result<(), Violation> {
        let Some(connection) = self.table.get(id) else {
            return Ok(());
        };
        if header.len > MAX_PAYLOAD || header.len as usize != payload.len() {
            return Err(Violation::Length);
        }
        if header.len != 0 && op != Some(Op::Rw) {
            return Err(Violation::Length);
        }
        connection.note_credit(header)?;
        let mut over = false;
        match op {
            Some(Op::Response) => connection.respond()?,
            Some(Op::Rw) => connection.receive(payload)?,
            Some(Op::CreditUpdate) => {}
            Some(Op::CreditRequest) => connection.owe_credit(),
            Some(Op::Shutdown) => over = connection.end_by_guest(header.flags)?,
            Some(Op::Request | Op::Rst) | None => return Err(Violation::Order),
        }
        if over {
            self.resets.push_back(header.reset());
            self.detach(id);
            return Ok(());
        }
        self.watch_backlog(id);
        self.queue(id);
        Ok(())
    }

    fn accept_clients(&mut self) {
        while let Some(stream) = self.hybrid.accept() {
            if let Some(oldest) = self.table.greeting_to_evict() {
                self.remove(oldest);
            }
            let id = self.table.add_greeting(stream);
            if self.watch(id) {
                self.greet(id); // most clients have already said it
            } else {
                self.remove(id);
            }
        }
    }

    fn handle_stream(&mut self, id: Id, ready: EventSet) {
        let Some(connection) = self.table.get(id) else {
            return; // closed by an earlier event of the same batch
        };
        let gone = ready.intersects(EventSet::HANG_UP | EventSet::ERROR);
        if gone {
            connection.hang_up();
        }
        if ready.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            connection.mark_readable();
        }
        match connection.state {
            State::Greeting if gone => self.remove(id),
            State::Greeting => self.greet(id),
            State::Requested if gone => self.abandon(id),
            State::Draining => {
                if gone || connection.flush() {
                    self.remove(id);
                }
            }
            State::Requested | State::Established | State::Lingering => {
                if ready.contains(EventSet::OUT) {
                    connection.flush();
                }
                self.watch_backlog(id);
                self.queue(id);
            }
        }
    }

    /// Reads a client's line, if it is all there.
    fn greet(&mut self, id: Id) {
        let Some(stream) = self.table.get(id).and_then(|c| c.stream()) else {
            return;
        };
        match hybrid::read_greeting(stream) {
            Greeting::Incomplete => {}
            Greeting::Connect(port)
                if self.make_room(Origin::Host) && self.table.start_request(id, port) =>
            {
                self.queue(id);
            }
            Greeting::Connect(_) | Greeting::Bad => self.remove(id),
        }
    }

    /// The client has left before the guest answered.
    fn abandon(&mut self, id: Id) {
        if let Some(connection) = self.table.get(id)
            && connection.guest_knows()
        {
            let key = connection.key;
            self.resets.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: key.host_port,
                dst_port: key.guest_port,
                type_: TYPE_STREAM,
                op: Op::Rst as u16,
                ..Header::default()
            });
        }
        self.remove(id);
    }

    /// Room for one more, if need be in place of one that only waits for the guest's RST.
    fn make_room(&mut self, origin: Origin) -> bool {
        if self.table.has_room(origin) {
            return true;
        }
        let Some(id) = self.table.lingering(origin) else {
            return false;
        };
        self.abandon(id);
        true
    }

    /// The guest's end is no more; what it sent is delivered first.
    fn detach(&mut self, id: Id) {
        self.table.forget_key(id);
        let Some(connection) = self.table.get(id) else {
            return;
        };
        if connection.detach() {
            self.remove(id);
        } else {
            self.watch_backlog(id);
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some(mut connection) = self.table.remove(id) {
            connection.close();
        }
    }

    fn queue(&mut self, id: Id) {
        if let Some(connection) = self.table.get(id)
            && !connection.queued
            && connection.has_output()
        {
            connection.queued = true;
            self.ready.push_back(id);
        }
    }

    fn watch(&mut self, id: Id) -> bool {
        let stream = self.table.get(id).and_then(|c| c.stream());
        stream.is_some_and(|stream| self.hybrid.watch(stream, id).is_ok())
    }

    /// Asks to be told when a socket with a backlog takes more, and only then.
    fn watch_backlog(&mut self, id: Id) {
        let Some(connection) = self.table.get(id) else {
            return;
        };
        let wanted = connection.backlog() > 0;
        if wanted == connection.watches_writable {
            return;
        }
        let Some(stream) = connection.stream() else {
            return;
        };
        if self.hybrid.watch_writable(stream, id, wanted).is_ok() {
            connection.watches_writable = wanted;
        } else {
            connection.hang_up();
        }
    }

    fn complain(&mut self, header: &Header, fault: &dyn std::fmt::Display) {
        self.faults = self.faults.saturating_add(1);
        if self.faults <= MAX_COMPLAINTS {
            warn!(
                src_port = header.src_port,
                dst_port = header.dst_port,
                op = header.op,
                "A vsock packet of the guest {fault}"
            );
        }
        if self.faults == MAX_COMPLAINTS {
            warn!("Further faults of this guest on vsock are not logged");
        }
    }
}

impl Drop for Engine {
    /// Clients get an end, not an error, as far as they were served.
    fn drop(&mut self) {
        for id in self.table.ids() {
            self.remove(id);
        }
    }
}

impl AsRawFd for Engine {
    /// Readable when [`Engine::handle_events`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.hybrid.as_raw_fd()
    }
}
