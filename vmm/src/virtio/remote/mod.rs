//! A device that another process implements (a virtiofs daemon, the shim's vsock engine; vhost-user, this
//! side the front end): shows it to the guest. The daemon works in the guest's memory and with the guest's
//! kicks itself ([`direct`]), or, given a [`Window`], only ever sees copies ([`relay`]).
//!
//! ```text
//!  guest ──kick (ioeventfd)──▶ daemon ──call──▶ irqfd        with Interrupt::notifier
//!                                     └─call──▶ event loop ─▶ Interrupt::queue   without
//! ```
//! Source: VIRTIO 1.2, sections 5.10 and 5.11; the vhost-user protocol of the QEMU project.

mod daemon;
mod direct;
mod relay;
mod shadow;
mod window;

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};

use super::vsock::KIND as VSOCK;
use super::{
    Activation, Device, Error, Interrupt, Memory, QueueState, Saved, State, Watch, read_bytes,
};
use daemon::Daemon;
use direct::Direct;
use relay::Relay;

pub use window::Window;

/// Device type of virtiofs.
const FS: u32 = 26;
/// Bytes of the tag, padded with zeros (5.11.4).
const TAG: usize = 36;
/// Descriptors: the high priority queue has little to carry; a read or write takes a descriptor for
/// each page, and Linux asks for up to 256 pages less its own overhead.
const FS_QUEUES: [u16; 2] = [16, 256];
/// Receive, transmit, events; the last is not the daemon's.
const VSOCK_QUEUES: [u16; 3] = [128, 128, 16];
/// Room in a window for the data of each queue, bytes: what Linux asks at once with room to spare. The
/// largest request of a file system is 1 MiB; of vsock, 64 KiB, and a full queue to receive 512 KiB.
const FS_ROOM: [u64; 2] = [64 << 10, 5 << 20];
const VSOCK_ROOM: [u64; 2] = [1 << 20, 2 << 20];
const OWN: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device of a guest that another process implements.
pub struct Remote {
    /// None until [`Remote::attach`]; what the guest asks before waits in its queues.
    daemon: Option<Daemon>,
    kind: u32,
    queue_sizes: &'static [u16],
    /// Room in a window for each queue that is the daemon's, which are the first.
    room: [u64; window::QUEUES],
    /// The device's configuration; nothing in it is writable.
    config: Vec<u8>,
    window: Option<Arc<Window>>,
    active: Option<Box<dyn Way>>,
    /// A driver that is up while there is no daemon yet.
    waiting: Option<Activation>,
    /// The guest comes from another process, and its connections are gone.
    moved: bool,
}

/// What a daemon works in, and how it hears of the guest; lives as long as the driver is up.
trait Way: Send {
    /// Gives the daemon its queues.
    fn start(&mut self, daemon: &Daemon) -> Result<(), Error>;

    /// Takes back what was given. A daemon that does not give a queue back is given up, and what it works in
    /// with it.
    fn stop(&mut self, daemon: &mut Daemon);

    /// A kick of the guest, or the daemon's signal.
    fn event(&mut self, token: u32);

    /// Tells a guest with a new vsock engine that its connections are gone (5.10.6.7).
    fn tell_reset(&mut self) -> Result<(), Error>;

    /// Where the queues stand.
    fn positions(&mut self, daemon: &Daemon) -> Result<Vec<QueueState>, Error>;
}

impl Remote {
    /// A shared folder, by the virtiofs daemon at the other end of `socket`. Without a window the daemon
    /// must be told of shared memory: guest memory has to be a file's. `tag`, 1 to 36 bytes, is what the
    /// guest mounts.
    ///
    /// # Errors
    /// [`Error`]: an unusable tag, or the daemon is not a vhost-user back end that can do what is
    /// needed.
    pub fn folder(socket: UnixStream, tag: &str, window: Option<Window>) -> Result<Self, Error> {
        let mut folder = Self::folder_to_come(tag, window)?;
        folder.attach(socket)?;
        Ok(folder)
    }

    /// A shared folder whose daemon comes later, by [`Self::attach`]. Until then it can be saved.
    ///
    /// # Errors
    /// [`Error::Configuration`]: an unusable tag.
    pub fn folder_to_come(tag: &str, window: Option<Window>) -> Result<Self, Error> {
        if !(1..=TAG).contains(&tag.len()) || tag.bytes().any(|b| b == 0) {
            return Err(Error::Configuration(format!(
                "tag {tag:?} of a shared folder does not have 1 to {TAG} bytes"
            )));
        }
        // `struct virtio_fs_config` (5.11.4): the tag, and one queue for requests.
        let mut config = tag.as_bytes().to_vec();
        config.resize(TAG, 0);
        config.extend(1_u32.to_le_bytes());
        Ok(Self::new(FS, &FS_QUEUES, FS_ROOM, config, window))
    }

    /// A socket device, by the vsock engine at the other end of `socket`; memory as for
    /// [`Self::folder`]. `cid` is the guest's number (5.10.4).
    ///
    /// # Errors
    /// As [`Self::folder`].
    pub fn vsock(socket: UnixStream, cid: u64, window: Option<Window>) -> Result<Self, Error> {
        let config = cid.to_le_bytes().to_vec();
        let mut vsock = Self::new(VSOCK, &VSOCK_QUEUES, VSOCK_ROOM, config, window);
        vsock.attach(socket)?;
        Ok(vsock)
    }

    /// Greets the daemon at the other end of `socket`, which serves from now on.
    ///
    /// # Errors
    /// As [`Self::folder`]; or there was one already.
    pub fn attach(&mut self, socket: UnixStream) -> Result<(), Error> {
        if self.daemon.is_some() {
            return Err(Error::Configuration("it has a daemon already".into()));
        }
        self.daemon = Some(Daemon::new(socket, self.room.len())?);
        match self.waiting.take() {
            Some(activation) => self.activate(activation),
            None => Ok(()),
        }
    }

    fn new(
        kind: u32,
        queue_sizes: &'static [u16],
        room: [u64; window::QUEUES],
        config: Vec<u8>,
        window: Option<Window>,
    ) -> Self {
        Self {
            daemon: None,
            kind,
            queue_sizes,
            room,
            config,
            window: window.map(Arc::new),
            active: None,
            waiting: None,
            moved: false,
        }
    }
}

impl Device for Remote {
    fn kind(&self) -> u32 {
        self.kind
    }

    fn features(&self) -> u64 {
        match (&self.window, &self.daemon) {
            (None, Some(daemon)) => OWN & daemon.features(),
            _ => OWN,
        }
    }

    fn queue_sizes(&self) -> &[u16] {
        self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {} // nothing in it is writable

    fn activate(&mut self, activation: Activation) -> Result<(), Error> {
        let (expected, found) = (self.queue_sizes.len(), activation.queues.len());
        if found != expected {
            return Err(Error::Queues { expected, found });
        }
        let offered = self.features();
        let Some(daemon) = &mut self.daemon else {
            self.waiting = Some(activation);
            return Ok(());
        };
        let mut way: Box<dyn Way> = match &self.window {
            None => {
                let features = offered & activation.features;
                Box::new(Direct::new(activation, features, self.room.len()))
            }
            Some(window) => {
                let (kind, sizes) = (self.kind, self.queue_sizes);
                Box::new(Relay::new(kind, sizes, &self.room, window, activation)?)
            }
        };
        let mut started = way.start(daemon);
        if started.is_ok() && std::mem::take(&mut self.moved) {
            started = way.tell_reset();
        }
        if let Err(e) = &started {
            daemon.give_up(e);
            way.stop(daemon);
        } else {
            self.active = Some(way);
        }
        started
    }

    fn reset(&mut self) {
        self.waiting = None;
        if let (Some(mut way), Some(daemon)) = (self.active.take(), &mut self.daemon) {
            way.stop(daemon);
        }
    }

    fn event(&mut self, token: u32) {
        if let Some(way) = &mut self.active {
            way.event(token);
        }
    }

    /// Only of a vsock engine, whose connections do not move: the guest is told that they are gone; and of
    /// what no daemon has served yet.
    fn save(&mut self) -> Result<Saved, Error> {
        let queues = match (&mut self.active, &mut self.daemon) {
            (_, Some(_)) if self.kind != VSOCK => {
                return Err(Error::NotSaved {
                    kind: self.kind,
                    why: "what it remembers of the guest is its daemon's",
                });
            }
            (Some(way), Some(daemon)) => {
                let positions = way.positions(daemon);
                if let Err(e) = &positions {
                    daemon.give_up(e);
                }
                positions?
            }
            _ => {
                let queues = self.waiting.iter().flat_map(|waiting| &waiting.queues);
                queues.map(|(queue, _)| QueueState::from(queue)).collect()
            }
        };
        Ok(Saved {
            queues,
            state: State::Stateless { kind: self.kind },
        })
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        let kind = self.kind;
        if kind != VSOCK && self.daemon.is_some() {
            let found = state.clone();
            return Err(Error::WrongState { kind, found });
        }
        state.expect_stateless(kind)?;
        self.moved = kind == VSOCK;
        Ok(())
    }
}
