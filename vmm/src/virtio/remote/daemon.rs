//! The front end's side of vhost-user: what a daemon is told of memory and queues, and what it answers.
//! Knows no guest: which memory and which queues these are is the caller's business.
//!
//! Source: the vhost-user protocol of the QEMU project.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Error as VhostUserError, Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::Error;

/// How long the daemon may take to answer while it is set up: a guest's CPU waits for it.
const PATIENCE: Duration = Duration::from_secs(10);
const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// A connection to a daemon.
pub(super) struct Daemon {
    /// Gone for good once it did not answer in time: a late answer would be taken for another one.
    front: Option<Frontend>,
    /// Features that it offers.
    features: u64,
}

impl Daemon {
    /// Greets the daemon at the other end of `socket`, which is to serve so many queues.
    pub(super) fn new(socket: UnixStream, queues: usize) -> Result<Self, Error> {
        for done in [
            socket.set_read_timeout(Some(PATIENCE)),
            socket.set_write_timeout(Some(PATIENCE)),
        ] {
            done.map_err(|source| Error::Resource {
                what: "limit the wait for a device's daemon",
                source,
            })?;
        }
        let mut front = Frontend::from_stream(socket, queues as u64);
        let features = negotiate(&mut front).map_err(failed("greeted"))?;
        if features & 1 << VIRTIO_F_VERSION_1 == 0 {
            return Err(Error::Configuration(
                "a device's daemon does not offer VIRTIO_F_VERSION_1".into(),
            ));
        }
        Ok(Self {
            front: Some(front),
            features,
        })
    }

    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Tells it which features are in use and which memory it works in, a file's.
    pub(super) fn start(&self, features: u64, memory: &GuestMemoryMmap) -> Result<(), Error> {
        let front = self.front()?;
        (front.set_features(features | PROTOCOL)).map_err(failed("told the features"))?;
        let regions: Vec<_> = (memory.iter())
            .map(VhostUserMemoryRegionInfo::from_guest_region)
            .collect::<Result<_, _>>()
            .map_err(|_| Error::Configuration("guest memory is not a file's".into()))?;
        (front.set_mem_table(&regions)).map_err(failed("shown its memory"))?;
        Ok(())
    }

    /// Gives it a queue that lies in this memory, from where it stands.
    pub(super) fn give_queue(
        &self,
        index: usize,
        queue: &Queue,
        memory: &GuestMemoryMmap,
        call: &EventFd,
        kick: &EventFd,
    ) -> Result<(), Error> {
        give_queue(self.front()?, index, queue, memory, call, kick).map_err(failed("given a queue"))
    }

    /// Takes a queue back; returns the next entry of its available ring.
    pub(super) fn take_queue(&self, index: usize) -> Result<u16, Error> {
        let base =
            (self.front()?.get_vring_base(index)).map_err(failed("asked where a queue stands"))?;
        Ok(base as u16) // a ring's index has 16 bits
    }

    fn front(&self) -> Result<&Frontend, Error> {
        let gone = || VhostUserError::Disconnected.into();
        (self.front.as_ref()).ok_or_else(|| failed("reached")(gone()))
    }

    /// Gives up a daemon that is gone or no longer in step. Returns whether it did.
    pub(super) fn give_up(&mut self, failure: &Error) -> bool {
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
            self.front = None;
        }
        !refused
    }
}

/// Returns the features that it offers.
fn negotiate(front: &mut Frontend) -> Result<u64, vhost::Error> {
    front.set_owner()?;
    let offered = front.get_features()?;
    // Acknowledged now because the next questions need it; what the guest accepts comes later.
    if offered & PROTOCOL == 0 {
        return Err(vhost::Error::VhostUserProtocol(
            VhostUserError::InactiveFeature(VhostUserVirtioFeatures::PROTOCOL_FEATURES),
        ));
    }
    let can = front.get_protocol_features()?;
    // With acknowledgements a refusal is an error here, not silence.
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    front.set_protocol_features(can & wanted)?;
    if can.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    Ok(offered)
}

fn give_queue(
    front: &Frontend,
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
    let mut front = front.clone();
    front.set_vring_num(index, queue.size())?;
    front.set_vring_addr(index, &config)?;
    front.set_vring_base(index, queue.next_avail())?;
    front.set_vring_call(index, call)?;
    front.set_vring_kick(index, kick)?;
    front.set_vring_enable(index, true)
}

/// Names what the daemon would not be.
fn failed(what: &'static str) -> impl Fn(vhost::Error) -> Error {
    move |source| Error::Daemon { what, source }
}
