//! Any sequence of guest packets, host clients' doings and receive buffers through the vsock engine.
//! It must not panic, and its accounting must add up after every step.
//!
//! The input is a list of steps: one byte that chooses, then that step's arguments. `seeds.rs`
//! writes the same language.
#![no_main]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use sealpod_vmm::virtio::Buffers;
use sealpod_vmm::vsock::{Config, Engine, HOST_CID, Header, Limits, TYPE_STREAM};

const CID: u64 = 3;
/// Steps of one input.
const MAX_STEPS: usize = 4096;

/// The rest of the input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (front, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        front
    }

    fn word(&mut self) -> u32 {
        let mut word = [0; 4];
        let bytes = self.bytes(4);
        word[..bytes.len()].copy_from_slice(bytes);
        u32::from_le_bytes(word)
    }
}

struct World {
    engine: Engine,
    uds: PathBuf,
    clients: Vec<UnixStream>,
    /// Guest port and host port of connections that were seen.
    names: Vec<(u32, u32)>,
}

impl World {
    fn step(&mut self, choice: u8, input: &mut Input<'_>) {
        match choice % 10 {
            0..=2 => self.likely_packet(input),
            3 => self.any_packet(input),
            4 => self.take_packet(1 + input.word() as usize % 70_000),
            5 => {
                let line = match input.byte() {
                    Some(port @ 0..32) => format!("CONNECT {port}\n").into_bytes(),
                    other => input.bytes(other.unwrap_or(0).into()).to_vec(),
                };
                if let Ok(mut client) = UnixStream::connect(&self.uds) {
                    let _ = client.set_nonblocking(true);
                    let _ = client.write_all(&line);
                    self.clients.push(client);
                }
            }
            6 => {
                let count = input.word() as usize % 300_000;
                if let Some(client) = self.client(input) {
                    let _ = client.write(&vec![0x33; count]);
                }
            }
            7 => {
                let count = input.word() as usize % 300_000;
                if let Some(client) = self.client(input) {
                    let _ = client.read(&mut vec![0; count]);
                }
            }
            8 => match input.byte() {
                Some(0) => self.engine.reset(),
                Some(n) if n % 2 == 1 => {
                    if let Some(client) = self.client(input) {
                        let _ = client.shutdown(Shutdown::Write);
                    }
                }
                _ => {
                    let index = usize::from(input.byte().unwrap_or(0));
                    if index < self.clients.len() {
                        self.clients.swap_remove(index);
                    }
                }
            },
            _ => self.engine.handle_events(),
        }
    }

    fn client(&mut self, input: &mut Input<'_>) -> Option<&mut UnixStream> {
        let count = self.clients.len().max(1);
        self.clients.get_mut(usize::from(input.byte()?) % count)
    }

    /// A packet that is right but for what the input changes.
    fn likely_packet(&mut self, input: &mut Input<'_>) {
        let op = input.byte().unwrap_or(5);
        let which = usize::from(input.byte().unwrap_or(0));
        let (src_port, dst_port) = match self.names.len() {
            known if which < 200 && known > 0 => self.names[which % known],
            _ => (which as u32, 1024 + which as u32 % 2),
        };
        let length = match op {
            5 => input.word() % 70_000,
            _ => 0,
        };
        let mut header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port,
            dst_port,
            len: length,
            type_: TYPE_STREAM,
            op: op.into(),
            flags: which as u32 % 4,
            buf_alloc: 65536,
            fwd_cnt: 0,
        };
        match input.byte().unwrap_or(0) {
            200..216 => header.len = input.word(),
            216..232 => header.fwd_cnt = input.word(),
            232..248 => header.buf_alloc = input.word(),
            248.. => header.flags = input.word(),
            _ => {}
        }
        let mut payload = vec![0x44; length as usize];
        self.receive(&header, &mut payload);
    }

    fn any_packet(&mut self, input: &mut Input<'_>) {
        let mut raw = [0; 44];
        let bytes = input.bytes(44);
        raw[..bytes.len()].copy_from_slice(bytes);
        let length = input.word() as usize % 70_000;
        self.receive(&Header::decode(&raw), &mut vec![0x55; length]);
    }

    fn receive(&mut self, header: &Header, payload: &mut [u8]) {
        if self.engine.accepts_packets() {
            let mut buffers = Buffers::from(payload);
            buffers.truncate(header.len.min(64 << 10) as usize);
            self.engine.receive(header, &buffers);
        }
    }

    fn take_packet(&mut self, size: usize) {
        let mut space = vec![0; size];
        if let Some(header) = self.engine.next_packet(&Buffers::from(&mut space[..])) {
            assert!(header.len as usize <= size);
            assert_eq!(header.encode().len(), 44);
            self.names.push((header.dst_port, header.src_port));
            if self.names.len() > 16 {
                self.names.remove(0);
            }
        }
    }
}

/// A folder with a service on port 1024, for all inputs of this process.
fn place() -> &'static (tempfile::TempDir, UnixListener) {
    static PLACE: OnceLock<(tempfile::TempDir, UnixListener)> = OnceLock::new();
    PLACE.get_or_init(|| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let listener = UnixListener::bind(dir.path().join("v_1024")).expect("a socket");
        listener.set_nonblocking(true).expect("a flag");
        (dir, listener)
    })
}

fuzz_target!(
    init: {
        // SAFETY: no handler is installed, the signal is only ignored, as Rust's own start does.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    },
    |data: &[u8]| {
        let (dir, service) = place();
        let uds = dir.path().join("v");
        let limits = Limits {
            host_connections: 6,
            guest_connections: 4,
            greetings: 3,
            window: 64 << 10,
            memory: 256 << 10,
        };
        let config = Config {
            uds: uds.clone(),
            guest_cid: CID,
            limits,
        };
        let mut world = World {
            engine: Engine::new(&config).expect("an engine"),
            uds,
            clients: Vec::new(),
            names: Vec::new(),
        };
        let mut input = Input(data);
        for _ in 0..MAX_STEPS {
            let Some(choice) = input.byte() else {
                break;
            };
            world.step(choice, &mut input);
            world.engine.check();
            while let Ok((stream, _)) = service.accept() {
                let _ = stream.set_nonblocking(true);
                world.clients.push(stream);
            }
        }
        world.engine.close();
        world.engine.check();
    }
);
