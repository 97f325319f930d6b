//! A guest and the QEMU around it, with the device behind vhost-user in threads of its own: what
//! QEMU does over the vhost-user socket is done here by the `vhost` crate's front end.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use sealpod_vmm::vsock::{Config, Limits, SHUTDOWN_SEND, VhostUserVsock};
use tempfile::TempDir;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{Driver, MEMORY, SIZE};
use crate::kernel::{CID, Kernel, Name};

/// How long a client waits for bytes before its test has failed.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) struct Machine {
    pub(crate) device: VhostUserVsock,
    pub(crate) frontend: Frontend,
    pub(crate) driver: Driver,
    pub(crate) kernel: Kernel,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
    dir: TempDir,
}

fn eventfd() -> EventFd {
    EventFd::new(libc::EFD_NONBLOCK).unwrap()
}

fn client(uds: &Path, port: u32) -> UnixStream {
    let mut client = UnixStream::connect(uds).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let line = format!("CONNECT {port}\n");
    client.write_all(line.as_bytes()).unwrap();
    client
}

/// A device that waits for QEMU.
pub(crate) fn device() -> (VhostUserVsock, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vhost.sock")).unwrap();
    let config = Config {
        uds: dir.path().join("vsock.sock"),
        guest_cid: CID,
        limits: Limits::default(),
    };
    (VhostUserVsock::start(listener, &config).unwrap(), dir)
}

impl Machine {
    /// A machine whose guest's driver is up.
    pub(crate) fn new() -> Self {
        let (device, dir) = device();
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY as u64).unwrap();
        let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::from_ranges_with_files([range]).unwrap();

        let mut frontend = Frontend::connect(dir.path().join("vhost.sock"), 3).unwrap();
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_ne!(offered & 1 << 32, 0, "VIRTIO_F_VERSION_1");
        assert_ne!(offered & 1 << 29, 0, "VIRTIO_F_EVENT_IDX");
        assert_ne!(
            offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            0
        );
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend.set_protocol_features(protocol).unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 3);
        frontend.set_features(offered).unwrap();
        let region = memory.iter().next().unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        frontend.set_mem_table(&[region]).unwrap();

        let mut machine = Self {
            device,
            frontend,
            driver: Driver::new(memory),
            kernel: Kernel::new(),
            kicks: [eventfd(), eventfd()],
            calls: [eventfd(), eventfd()],
            dir,
        };
        machine.driver.refill();
        machine.start([0, 0]);
        machine
    }

    pub(crate) fn uds(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    /// Starts both queues at these positions of their available rings.
    pub(crate) fn start(&mut self, positions: [u16; 2]) {
        let host = |address: GuestAddress| {
            let memory = &self.driver.memory;
            memory.get_host_address(address).unwrap() as u64
        };
        for (index, ring) in [&self.driver.rx, &self.driver.tx].into_iter().enumerate() {
            let config = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                desc_table_addr: host(ring.desc()),
                avail_ring_addr: host(ring.avail()),
                used_ring_addr: host(ring.used()),
                ..VringConfigData::default()
            };
            let frontend = &mut self.frontend;
            frontend.set_vring_num(index, SIZE).unwrap();
            frontend.set_vring_base(index, positions[index]).unwrap();
            frontend.set_vring_addr(index, &config).unwrap();
            frontend.set_vring_call(index, &self.calls[index]).unwrap();
            frontend.set_vring_kick(index, &self.kicks[index]).unwrap();
            frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Stops both queues, as when the VM is paused; returns where they are.
    pub(crate) fn stop(&mut self) -> [u16; 2] {
        [0, 1].map(|index| self.frontend.get_vring_base(index).unwrap() as u16)
    }

    /// A connected client of a port on which the guest echoes.
    pub(crate) fn client(&self, port: u32) -> UnixStream {
        client(&self.uds(), port)
    }

    /// Sends what the guest has to say.
    pub(crate) fn send(&mut self) {
        while let Some((header, payload)) = self.kernel.outbox.front() {
            if !self.driver.send(header, payload) {
                break;
            }
            self.kernel.outbox.pop_front();
        }
    }

    pub(crate) fn kick(&self) {
        for kick in &self.kicks {
            kick.write(1).unwrap();
        }
    }

    /// Takes what has arrived, echoes it, and passes the end of each stream back.
    fn echo(&mut self) {
        while let Some((header, payload)) = self.driver.receive() {
            self.kernel.receive(&header, &payload);
        }
        self.driver.refill();
        let names: Vec<Name> = self.kernel.sockets.keys().copied().collect();
        for name in names {
            loop {
                let socket = &mut self.kernel.sockets.get_mut(&name).unwrap();
                let room = socket.credit() as usize;
                let data: Vec<u8> = socket.inbox.make_contiguous().to_vec();
                let count = self.kernel.send(name, &data[..data.len().min(room)]);
                if count == 0 {
                    break;
                }
                self.kernel.read(name, count);
            }
            let socket = &self.kernel.sockets[&name];
            let over = socket.host_ended & SHUTDOWN_SEND != 0 && socket.inbox.is_empty();
            if over && !socket.reset && !socket.ended_sending() {
                self.kernel.shutdown(name, SHUTDOWN_SEND);
            }
        }
        self.send();
    }

    /// Runs the guest in a thread until the returned event is signalled.
    pub(crate) fn run(mut self) -> Running {
        let uds = self.uds();
        let stop = eventfd();
        let stopped = stop.try_clone().unwrap();
        let guest = thread::spawn(move || {
            let epoll = Epoll::new().unwrap();
            for fd in [&self.calls[0], &self.calls[1], &stopped] {
                let event = EpollEvent::new(EventSet::IN, fd.as_raw_fd() as u64);
                let fd = fd.as_raw_fd();
                epoll.ctl(ControlOperation::Add, fd, event).unwrap();
            }
            loop {
                self.echo();
                self.kick();
                let mut event = [EpollEvent::default()];
                epoll.wait(-1, &mut event).unwrap();
                for call in &self.calls {
                    let _ = call.read();
                }
                if stopped.read().is_ok() {
                    return self;
                }
            }
        });
        Running { stop, guest, uds }
    }
}

pub(crate) struct Running {
    stop: EventFd,
    guest: JoinHandle<Machine>,
    uds: PathBuf,
}

impl Running {
    pub(crate) fn client(&self, port: u32) -> UnixStream {
        client(&self.uds, port)
    }

    pub(crate) fn halt(self) -> Machine {
        self.stop.write(1).unwrap();
        self.guest.join().unwrap()
    }
}

/// Reads the line that grants a connection.
pub(crate) fn granted(client: &mut UnixStream) {
    let mut line = Vec::new();
    let mut byte = [0];
    while byte != *b"\n" {
        client.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    assert!(line.starts_with(b"OK "), "{line:?}");
}
