//! A guest and its device in one thread: model kernel, driver, virtqueues, engine. Nothing here
//! waits: after [`Guest::run`] everything that could happen has happened.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use sealpod_vmm::vsock::{Config, Engine, Header, Limits, queues};
use tempfile::TempDir;
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::driver::{Driver, MEMORY};
use crate::kernel::{CID, Kernel, Name};

pub(crate) struct Guest {
    pub(crate) engine: Engine,
    pub(crate) driver: Driver,
    pub(crate) kernel: Kernel,
    rx: Queue,
    tx: Queue,
    dir: TempDir,
}

impl Guest {
    pub(crate) fn new(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            uds: dir.path().join("vsock.sock"),
            guest_cid: CID,
            limits,
        };
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let mut driver = Driver::new(memory);
        driver.refill();
        Self {
            engine: Engine::new(&config).unwrap(),
            rx: driver.rx.device_side(),
            tx: driver.tx.device_side(),
            driver,
            kernel: Kernel::new(),
            dir,
        }
    }

    pub(crate) fn uds(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    /// A host service that the guest reaches at `port`.
    pub(crate) fn service(&self, port: u32) -> UnixListener {
        let path = self.dir.path().join(format!("vsock.sock_{port}"));
        UnixListener::bind(path).unwrap()
    }

    /// A client that has said what it wants.
    pub(crate) fn client(&self, greeting: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.uds()).unwrap();
        client.write_all(greeting).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    /// Lets the device do what it can.
    pub(crate) fn step(&mut self) {
        self.engine.handle_events();
        while queues::service(
            &mut self.engine,
            &self.driver.memory,
            &mut self.rx,
            &mut self.tx,
        )
        .unwrap()
        .again
        {}
        self.engine.check();
    }

    /// Lets device and guest answer each other until both are silent.
    pub(crate) fn run(&mut self) {
        loop {
            self.step();
            let mut quiet = true;
            while let Some((header, payload)) = self.driver.receive() {
                quiet = false;
                self.kernel.receive(&header, &payload);
            }
            self.driver.refill();
            while let Some((header, payload)) = self.kernel.outbox.front() {
                if !self.driver.send(header, payload) {
                    break;
                }
                quiet = false;
                self.kernel.outbox.pop_front();
            }
            if quiet {
                return;
            }
        }
    }

    /// The guest starts anew: empty rings, no sockets.
    pub(crate) fn reboot(&mut self) {
        self.driver.reset();
        self.driver.refill();
        self.rx = self.driver.rx.device_side();
        self.tx = self.driver.tx.device_side();
        self.kernel = Kernel::new();
        self.engine.reset();
    }

    /// Sends one packet outside the model kernel, and returns what the device answers.
    pub(crate) fn inject(&mut self, header: &Header, payload: &[u8]) -> Vec<Header> {
        assert!(self.driver.send(header, payload));
        self.step();
        self.answers()
    }

    /// Takes packets of the device past the model kernel.
    pub(crate) fn answers(&mut self) -> Vec<Header> {
        let mut answers = Vec::new();
        while let Some((header, _)) = self.driver.receive() {
            answers.push(header);
        }
        self.driver.refill();
        answers
    }

    /// A connection that the host has opened to the guest's `port`.
    pub(crate) fn connected_by_host(&mut self, port: u32) -> (UnixStream, Name) {
        self.kernel.listening.insert(port);
        let mut client = self.client(format!("CONNECT {port}\n").as_bytes());
        self.run();
        let line = String::from_utf8(read_some(&mut client)).unwrap();
        let local = line.strip_prefix("OK ").and_then(|l| l.strip_suffix('\n'));
        let local = local.unwrap_or_else(|| panic!("not granted: {line:?}"));
        (client, (port, local.parse().unwrap()))
    }

    /// A connection that the guest has opened to a new host service at `port`.
    pub(crate) fn connected_by_guest(&mut self, port: u32) -> (UnixStream, Name) {
        let listener = self.service(port);
        let name = self.kernel.connect(port);
        self.run();
        assert!(self.kernel.sockets[&name].connected);
        let (stream, _) = listener.accept().unwrap();
        stream.set_nonblocking(true).unwrap();
        (stream, name)
    }

    /// Whether bytes still go both ways over this connection.
    pub(crate) fn assert_alive(&mut self, stream: &mut UnixStream, name: Name) {
        stream.write_all(b"ping").unwrap();
        self.run();
        assert_eq!(self.kernel.read(name, 4), b"ping");
        assert_eq!(self.kernel.send(name, b"pong"), 4);
        self.run();
        assert_eq!(read_some(stream), b"pong");
    }
}

/// What is there to be read now.
pub(crate) fn read_some(stream: &mut UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    let mut piece = [0; 65536];
    loop {
        match stream.read(&mut piece) {
            Ok(0) => return data,
            Ok(count) => data.extend(&piece[..count]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return data,
            Err(e) => panic!("{e}"),
        }
    }
}

/// Whether the stream is at its end, with nothing left to read.
pub(crate) fn at_end(stream: &mut UnixStream) -> bool {
    match stream.read(&mut [0]) {
        Ok(0) => true,
        Ok(_) => panic!("there was something left to read"),
        Err(e) if e.kind() == ErrorKind::WouldBlock => false,
        Err(e) => panic!("{e}"),
    }
}

/// Writes what the socket takes; returns how much.
pub(crate) fn write_some(stream: &mut UnixStream, data: &[u8]) -> usize {
    let mut done = 0;
    while done < data.len() {
        match stream.write(&data[done..]) {
            Ok(count) => done += count,
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    done
}

/// Bytes that look like no others: xorshift from a seed.
pub(crate) fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Random(seed | 1);
    (0..count.div_ceil(8))
        .flat_map(|_| random.next().to_le_bytes())
        .take(count)
        .collect()
}

/// A reproducible sequence of numbers (Marsaglia's xorshift64).
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}
