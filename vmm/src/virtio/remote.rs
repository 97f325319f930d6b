//! A device that another process implements (a virtiofs daemon, the shim's vsock engine): shows it to the
//! guest and then stays out of the way. The daemon works in the guest's memory and with the guest's
//! kicks itself (vhost-user, this side the front end).
//!
//! ```text
//!  guest ──kick (ioeventfd)──▶ daemon ──call──▶ irqfd        with Interrupt::notifier
//!                                     └─call──▶ event loop ─▶ Interrupt::queue   without
//! ```
//! Source: VIRTIO 1.2, sections 5.10 and 5.11; the vhost-user protocol of the QEMU project.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Error as VhostUserError, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{
    Activation, Device, Error, Interrupt, Memory, QueueState, Saved, State, Watch, read_bytes,
};

/// Device types.
const FS: u32 = 26;
const VSOCK: u32 = 19;
/// Bytes of the tag, padded with zeros (5.11.4).
const TAG: usize = 36;
/// Descriptors: the high priority queue has little to carry; a read or write takes a descriptor for
/// each page, and Linux asks for up to 256 pages less its own overhead.
const FS_QUEUES: [u16; 2] = [16, 256];
/// Receive, transmit, events; the last is not the daemon's.
const VSOCK_QUEUES: [u16; 3] = [128, 128, 16];
const VSOCK_SERVED: usize = 2;
const VSOCK_EVENTS: usize = 2;
/// Event: all connections are gone (`VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`).
const TRANSPORT_RESET: u32 = 0;
/// How long the daemon may take to answer while it is set up: a guest's CPU waits for it.
const PATIENCE: Duration = Duration::from_secs(10);

/// A device of a guest that another process implements.
pub struct Remote {
    /// Gone for good once it did not answer in time: a late answer would be taken for another one.
    daemon: Option<Frontend>,
    kind: u32,
    queue_sizes: &'static [u16],
    /// How many of the queues, from the first, are the daemon's.
    served: usize,
    /// The device's configuration; nothing in it is writable.
    config: Vec<u8>,
    /// Features that the daemon and this device have.
    features: u64,
    active: Option<Active>,
    /// The guest comes from another process, and its connections are gone.
    moved: bool,
}

/// What lives as long as the driver is up.
struct Active {
    memory: Memory,
    watch: Watch,
    interrupt: Arc<dyn Interrupt>,
    /// All queues, also those that are not the daemon's, with what the guest's kick signals.
    queues: Vec<(Queue, EventFd)>,
    /// Signalled by the daemon where the transport has no descriptor of its own.
    calls: Vec<(u16, EventFd)>,
    /// Queues that were started.
    started: usize,
}

impl Remote {
    /// A shared folder, by the virtiofs daemon at the other end of `socket`, which must be told of
    /// shared memory: guest memory has to be a file's. `tag`, 1 to 36 bytes, is what the guest mounts.
    ///
    /// # Errors
    /// [`Error`]: an unusable tag, or the daemon is not a vhost-user back end that can do what is
    /// needed.
    pub fn folder(socket: UnixStream, tag: &str) -> Result<Self, Error> {
        if !(1..=TAG).contains(&tag.len()) || tag.bytes().any(|b| b == 0) {
            return Err(Error::Configuration(format!(
                "tag {tag:?} of a shared folder does not have 1 to {TAG} bytes"
            )));
        }
        // `struct virtio_fs_config` (5.11.4): the tag, and one queue for requests.
        let mut config = tag.as_bytes().to_vec();
        config.resize(TAG, 0);
        config.extend(1_u32.to_le_bytes());
        Self::new(socket, FS, &FS_QUEUES, FS_QUEUES.len(), config)
    }

    /// A socket device, by the vsock engine at the other end of `socket`; memory as for
    /// [`Self::folder`]. `cid` is the guest's number (5.10.4).
    ///
    /// # Errors
    /// As [`Self::folder`].
    pub fn vsock(socket: UnixStream, cid: u64) -> Result<Self, Error> {
        let config = cid.to_le_bytes().to_vec();
        Self::new(socket, VSOCK, &VSOCK_QUEUES, VSOCK_SERVED, config)
    }

    fn new(
        socket: UnixStream,
        kind: u32,
        queue_sizes: &'static [u16],
        served: usize,
        config: Vec<u8>,
    ) -> Result<Self, Error> {
        for done in [
            socket.set_read_timeout(Some(PATIENCE)),
            socket.set_write_timeout(Some(PATIENCE)),
        ] {
            done.map_err(|source| Error::Resource {
                what: "limit the wait for a device's daemon",
                source,
            })?;
        }
        let mut daemon = Frontend::from_stream(socket, served as u64);
        let features = negotiate(&mut daemon).map_err(failed("greeted"))?;
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Error::Configuration(
                "a device's daemon does not offer VIRTIO_F_VERSION_1".into(),
            ));
        }
        Ok(Self {
            daemon: Some(daemon),
            kind,
            queue_sizes,
            served,
            config,
            features,
            active: None,
            moved: false,
        })
    }

    fn start(&self, accepted: u64, active: &mut Active) -> Result<(), Error> {
        let daemon = self.daemon()?;
        let accepted = self.features & accepted;
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        (daemon.set_features(accepted | protocol)).map_err(failed("told the features"))?;
        let memory = active.memory.memory();
        let regions: Vec<_> = (memory.iter())
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::Configuration("guest memory is not a file's".into()))?;
        (daemon.set_mem_table(&regions)).map_err(failed("shown the guest's memory"))?;
        for index in 0..self.served {
            let (queue, _) = &active.queues[index];
            if !queue.ready() || queue.size() == 0 || !queue.is_valid(&*memory) {
                return Err(Error::Queue(index));
            }
            active.started = index + 1;
            active.start_queue(daemon, index)?;
        }
        Ok(())
    }

    fn daemon(&self) -> Result<&Frontend, Error> {
        let gone = || VhostUserError::Disconnected.into();
        (self.daemon.as_ref()).ok_or_else(|| failed("reached")(gone()))
    }

    /// Gives up a daemon that is gone or no longer in step. Returns whether it did.
    fn give_up(&mut self, failure: &Error) -> bool {
        let Error::Daemon {
            source: vhost::Error::VhostUserProtocol(why),
            ..
        } = failure
        else {
            return false;
        };
        // What it refuses, it has answered.
        let refused = matches!(why, VhostUserError::BackendInternalError);
        if !refused {
            self.daemon = None;
        }
        !refused
    }

    /// Where the queues stand; the daemon tells only when it stops.
    fn positions(&mut self) -> Result<Vec<QueueState>, Error> {
        let Some(mut active) = self.active.take() else {
            return Ok(Vec::new());
        };
        let mut ask = || {
            let daemon = self.daemon()?;
            for index in 0..active.started {
                active.stop_queue(daemon, index)?;
            }
            let queues = active.queues.iter();
            let states = queues.map(|(queue, _)| QueueState::from(queue)).collect();
            for index in 0..active.started {
                active.start_queue(daemon, index)?;
            }
            Ok(states)
        };
        let states = ask();
        self.active = Some(active);
        if let Err(e) = &states {
            self.give_up(e);
        }
        states
    }
}

/// Returns the features that both have.
fn negotiate(daemon: &mut Frontend) -> Result<u64, vhost::Error> {
    daemon.set_owner()?;
    let offered = daemon.get_features()?;
    // Acknowledged now because the next questions need it; what the guest accepts comes later.
    let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    if offered & protocol == 0 {
        return Err(vhost::Error::VhostUserProtocol(
            vhost::vhost_user::Error::InactiveFeature(VhostUserVirtioFeatures::PROTOCOL_FEATURES),
        ));
    }
    let can = daemon.get_protocol_features()?;
    // With acknowledgements a refusal is an error here, not silence.
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    daemon.set_protocol_features(can & wanted)?;
    if can.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        daemon.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    }
    let own =
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    Ok(offered & own)
}

impl Active {
    /// Gives a queue to the daemon, from where it stands.
    fn start_queue(&mut self, daemon: &Frontend, index: usize) -> Result<(), Error> {
        let call = self.call(index as u16)?;
        let (queue, kick) = &self.queues[index];
        give_queue(daemon, index, queue, &self.memory.memory(), &call, kick)
            .map_err(failed("given a queue"))?;
        if queue.next_avail() != 0 {
            // What was kicked or signalled before may have been lost.
            let _ = kick.write(1);
            self.interrupt.queue(index as u16);
        }
        Ok(())
    }

    /// Takes a queue back from the daemon, with where it stands.
    fn stop_queue(&mut self, daemon: &Frontend, index: usize) -> Result<(), Error> {
        let base = (daemon.get_vring_base(index)).map_err(failed("asked where a queue stands"))?;
        let (queue, _) = &mut self.queues[index];
        queue.set_next_avail(base as u16); // a ring's index has 16 bits
        let used = queue.used_idx(&*self.memory.memory(), Ordering::Acquire);
        queue.set_next_used(used.map_err(|_| Error::Queue(index))?.0);
        Ok(())
    }

    /// Tells a guest with a new vsock engine that its connections are gone (5.10.6.7).
    fn tell_reset(&mut self) -> Result<(), virtio_queue::Error> {
        let memory = self.memory.memory();
        let Some((queue, _)) = self.queues.get_mut(VSOCK_EVENTS) else {
            return Ok(());
        };
        let Some(chain) = queue.iter(&*memory)?.next() else {
            return Ok(()); // the guest left no room for news
        };
        let head = chain.head_index();
        let room = chain.writable().next();
        let event = TRANSPORT_RESET.to_le_bytes();
        let fits = room.filter(|room| room.len() as usize >= event.len());
        let told = fits.is_some_and(|room| memory.write_slice(&event, room.addr()).is_ok());
        queue.add_used(&*memory, head, if told { event.len() as u32 } else { 0 })?;
        self.interrupt.queue(VSOCK_EVENTS as u16);
        Ok(())
    }

    /// What the daemon signals when it has used buffers.
    fn call(&mut self, index: u16) -> Result<EventFd, Error> {
        if let Some(notifier) = self.interrupt.notifier(index) {
            return Ok(notifier);
        }
        if let Some((_, call)) = self.calls.iter().find(|(of, _)| *of == index) {
            return call.try_clone().map_err(|source| Error::Resource {
                what: "copy an eventfd",
                source,
            });
        }
        let resource = |what| move |source| Error::Resource { what, source };
        let call = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(resource("make an eventfd"))?;
        let copy = call.try_clone().map_err(resource("copy an eventfd"))?;
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        (self.watch.add(&call, index.into(), events))
            .map_err(resource("watch a daemon's signals"))?;
        self.calls.push((index, call));
        Ok(copy)
    }
}

fn give_queue(
    daemon: &Frontend,
    index: usize,
    queue: &Queue,
    memory: &GuestMemoryMmap,
    call: &EventFd,
    kick: &EventFd,
) -> Result<(), vhost::Error> {
    // The daemon is told addresses as this process has them, and translates.
    let host = |address: u64| {
        let at = memory.get_host_address(GuestAddress(address));
        at.map(|at| at as u64)
            .map_err(|_| vhost::Error::InvalidGuestMemory)
    };
    let config = VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: host(queue.desc_table())?,
        avail_ring_addr: host(queue.avail_ring())?,
        used_ring_addr: host(queue.used_ring())?,
        log_addr: None,
    };
    let mut daemon = daemon.clone();
    daemon.set_vring_num(index, queue.size())?;
    daemon.set_vring_addr(index, &config)?;
    daemon.set_vring_base(index, queue.next_avail())?;
    daemon.set_vring_call(index, call)?;
    daemon.set_vring_kick(index, kick)?;
    daemon.set_vring_enable(index, true)
}

impl Drop for Active {
    fn drop(&mut self) {
        for (_, call) in &self.calls {
            self.watch.remove(call);
        }
    }
}

impl Device for Remote {
    fn kind(&self) -> u32 {
        self.kind
    }

    fn features(&self) -> u64 {
        self.features
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
        let mut active = Active {
            memory: activation.memory,
            watch: activation.watch,
            interrupt: activation.interrupt,
            queues: activation.queues,
            calls: Vec::new(),
            started: 0,
        };
        let mut started = self.start(activation.features, &mut active);
        if started.is_ok() && std::mem::take(&mut self.moved) {
            started = active.tell_reset().map_err(|_| Error::Queue(VSOCK_EVENTS));
        }
        self.active = Some(active);
        if let Err(e) = &started {
            self.give_up(e);
            self.reset();
        }
        started
    }

    fn reset(&mut self) {
        let Some(mut active) = self.active.take() else {
            return;
        };
        for index in 0..active.started {
            let stopped = (self.daemon()).and_then(|daemon| active.stop_queue(daemon, index));
            // A daemon that is gone does not touch the guest's memory either.
            if let Err(e) = stopped {
                tracing::debug!("A device's daemon did not stop queue {index}: {e}");
                if self.give_up(&e) {
                    return;
                }
            }
        }
    }

    fn event(&mut self, token: u32) {
        let Some(active) = &self.active else {
            return;
        };
        if let Ok(index) = u16::try_from(token) {
            active.interrupt.queue(index);
        }
    }

    /// Only of a vsock engine, whose connections do not move: the guest is told that they are gone.
    fn save(&mut self) -> Result<Saved, Error> {
        if self.kind != VSOCK {
            return Err(Error::NotSaved {
                kind: self.kind,
                why: "what it remembers of the guest is its daemon's",
            });
        }
        Ok(Saved {
            queues: self.positions()?,
            state: State::Stateless { kind: self.kind },
        })
    }

    fn restore(&mut self, state: &State) -> Result<(), Error> {
        let kind = self.kind;
        if kind != VSOCK {
            let found = state.clone();
            return Err(Error::WrongState { kind, found });
        }
        state.expect_stateless(kind)?;
        self.moved = true;
        Ok(())
    }
}

/// Names what the daemon would not be.
fn failed(what: &'static str) -> impl Fn(vhost::Error) -> Error {
    move |source| Error::Daemon { what, source }
}
