//! A model of the guest's socket layer: stream sockets with credit both ways, as a well-behaved
//! guest has them. Packets in, packets out; no rings.

use std::collections::{HashMap, HashSet, VecDeque};

use sealpod_vmm::vsock::{
    HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// The guest's CID in all tests.
pub(crate) const CID: u64 = 3;

/// Guest port, host port.
pub(crate) type Name = (u32, u32);

/// One socket of the guest.
#[derive(Debug, Default)]
pub(crate) struct Socket {
    pub(crate) connected: bool,
    /// The connection is reset, by either side, or was refused.
    pub(crate) reset: bool,
    reset_by_host: bool,
    /// Directions that the host has ended.
    pub(crate) host_ended: u32,
    ended: u32,
    /// Received and not yet read.
    pub(crate) inbox: VecDeque<u8>,
    window: u32,
    received: u32,
    read: u32,
    sent: u32,
    host_window: u32,
    host_read: u32,
}

impl Socket {
    /// Whether the guest has said that it will send no more.
    pub(crate) fn ended_sending(&self) -> bool {
        self.ended & SHUTDOWN_SEND != 0
    }

    /// What may be sent now, bytes.
    pub(crate) fn credit(&self) -> u32 {
        self.host_window - self.sent.wrapping_sub(self.host_read)
    }
}

/// All sockets of the guest.
pub(crate) struct Kernel {
    pub(crate) sockets: HashMap<Name, Socket>,
    pub(crate) listening: HashSet<u32>,
    /// Receive window of new sockets.
    pub(crate) window: u32,
    pub(crate) outbox: VecDeque<(Header, Vec<u8>)>,
    next_port: u32,
}

impl Kernel {
    pub(crate) fn new() -> Self {
        Self {
            sockets: HashMap::new(),
            listening: HashSet::new(),
            window: 64 << 10,
            outbox: VecDeque::new(),
            next_port: 5000,
        }
    }

    /// A header of this guest with nothing but addresses and operation.
    pub(crate) fn header((guest_port, host_port): Name, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest_port,
            dst_port: host_port,
            type_: TYPE_STREAM,
            op: op as u16,
            ..Header::default()
        }
    }

    fn say(&mut self, name: Name, op: Op, flags: u32, payload: Vec<u8>) {
        let socket = &self.sockets[&name];
        let header = Header {
            len: payload.len() as u32,
            flags,
            buf_alloc: socket.window,
            fwd_cnt: socket.read,
            ..Self::header(name, op)
        };
        self.outbox.push_back((header, payload));
    }

    pub(crate) fn connect(&mut self, host_port: u32) -> Name {
        let name = (self.next_port, host_port);
        self.next_port += 1;
        let socket = Socket {
            window: self.window,
            ..Socket::default()
        };
        self.sockets.insert(name, socket);
        self.say(name, Op::Request, 0, Vec::new());
        name
    }

    /// Sends as much as there is credit for; returns how much.
    pub(crate) fn send(&mut self, name: Name, data: &[u8]) -> usize {
        let Some(socket) = self.sockets.get_mut(&name).filter(|s| s.connected) else {
            return 0;
        };
        let count = data.len().min(socket.credit() as usize).min(64 << 10);
        if count > 0 {
            socket.sent = socket.sent.wrapping_add(count as u32);
            self.say(name, Op::Rw, 0, data[..count].to_vec());
        }
        count
    }

    /// Reads up to `most` bytes and tells the host of the room.
    pub(crate) fn read(&mut self, name: Name, most: usize) -> Vec<u8> {
        let Some(socket) = self.sockets.get_mut(&name) else {
            return Vec::new();
        };
        let count = most.min(socket.inbox.len());
        let data: Vec<u8> = socket.inbox.drain(..count).collect();
        socket.read = socket.read.wrapping_add(count as u32);
        if count > 0 && !socket.reset {
            self.say(name, Op::CreditUpdate, 0, Vec::new());
        }
        data
    }

    pub(crate) fn shutdown(&mut self, name: Name, flags: u32) {
        self.sockets.get_mut(&name).unwrap().ended |= flags;
        self.say(name, Op::Shutdown, flags, Vec::new());
    }

    /// Drops a connection at once.
    pub(crate) fn abort(&mut self, name: Name) {
        self.sockets.get_mut(&name).unwrap().reset = true;
        self.say(name, Op::Rst, 0, Vec::new());
    }

    /// Takes a packet of the host.
    pub(crate) fn receive(&mut self, header: &Header, payload: &[u8]) {
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        assert_eq!(header.type_, TYPE_STREAM);
        let name = (header.dst_port, header.src_port);
        let op = Op::new(header.op).unwrap();
        if op == Op::Request {
            if !self.listening.contains(&name.0) || self.sockets.contains_key(&name) {
                let refusal = Self::header(name, Op::Rst);
                return self.outbox.push_back((refusal, Vec::new()));
            }
            let socket = Socket {
                window: self.window,
                connected: true,
                host_window: header.buf_alloc,
                ..Socket::default()
            };
            self.sockets.insert(name, socket);
            return self.say(name, Op::Response, 0, Vec::new());
        }
        let Some(socket) = self.sockets.get_mut(&name) else {
            if op != Op::Rst {
                let refusal = Self::header(name, Op::Rst);
                self.outbox.push_back((refusal, Vec::new()));
            }
            return;
        };
        assert!(!socket.reset_by_host, "{op:?} after a reset");
        if op == Op::Rst {
            socket.reset_by_host = true;
        }
        if op == Op::Rst || socket.reset {
            socket.reset = true;
            return;
        }
        socket.host_window = header.buf_alloc;
        socket.host_read = header.fwd_cnt;
        match op {
            Op::Response => {
                assert!(!socket.connected);
                socket.connected = true;
            }
            Op::Rw => {
                assert!(!payload.is_empty());
                assert_eq!(socket.host_ended & SHUTDOWN_SEND, 0, "data after the end");
                socket.received = socket.received.wrapping_add(payload.len() as u32);
                let held = socket.received.wrapping_sub(socket.read);
                assert!(held <= socket.window, "host overran the guest's window");
                if socket.ended & SHUTDOWN_RECEIVE == 0 {
                    socket.inbox.extend(payload);
                }
            }
            Op::Shutdown => {
                socket.host_ended |= header.flags;
                if socket.host_ended == SHUTDOWN_BOTH && socket.inbox.is_empty() {
                    socket.reset = true;
                    self.say(name, Op::Rst, 0, Vec::new());
                }
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => self.say(name, Op::CreditUpdate, 0, Vec::new()),
            Op::Request | Op::Rst => unreachable!(),
        }
    }
}
