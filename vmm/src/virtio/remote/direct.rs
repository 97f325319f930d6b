//! A daemon that works in the guest's memory: the guest's queues are handed to it, and this process is
//! not on the way.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::daemon::Daemon;
use super::{Activation, Error, Interrupt, Memory, QueueState, Watch, Way};
use crate::virtio::vsock::{EVENTS, TRANSPORT_RESET};

/// What lives as long as the driver is up.
pub(super) struct Direct {
    memory: Memory,
    watch: Watch,
    interrupt: Arc<dyn Interrupt>,
    /// All queues, also those that are not the daemon's, with what the guest's kick signals.
    queues: Vec<(Queue, EventFd)>,
    /// Signalled by the daemon where the transport has no descriptor of its own.
    calls: Vec<(u16, EventFd)>,
    /// Features that the guest and the daemon have.
    features: u64,
    /// How many of the queues, from the first, are the daemon's.
    served: usize,
    /// Queues that were started.
    started: usize,
}

impl Direct {
    pub(super) fn new(activation: Activation, features: u64, served: usize) -> Self {
        Self {
            memory: activation.memory,
            watch: activation.watch,
            interrupt: activation.interrupt,
            queues: activation.queues,
            calls: Vec::new(),
            features,
            served,
            started: 0,
        }
    }

    /// Gives a queue to the daemon, from where it stands.
    fn start_queue(&mut self, daemon: &Daemon, index: usize) -> Result<(), Error> {
        let call = self.call(index as u16)?;
        let (queue, kick) = &self.queues[index];
        daemon.give_queue(index, queue, &self.memory.memory(), &call, kick)?;
        if queue.next_avail() != 0 {
            // What was kicked or signalled before may have been lost.
            let _ = kick.write(1);
            self.interrupt.queue(index as u16);
        }
        Ok(())
    }

    /// Takes a queue back from the daemon, with where it stands.
    fn stop_queue(&mut self, daemon: &Daemon, index: usize) -> Result<(), Error> {
        let base = daemon.take_queue(index)?;
        let (queue, _) = &mut self.queues[index];
        queue.set_next_avail(base);
        let used = queue.used_idx(&*self.memory.memory(), Ordering::Acquire);
        queue.set_next_used(used.map_err(|_| Error::Queue(index))?.0);
        Ok(())
    }

    fn write_reset(&mut self) -> Result<(), virtio_queue::Error> {
        let memory = self.memory.memory();
        let Some((queue, _)) = self.queues.get_mut(EVENTS) else {
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
        self.interrupt.queue(EVENTS as u16);
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

impl Way for Direct {
    fn start(&mut self, daemon: &Daemon) -> Result<(), Error> {
        let memory = self.memory.memory();
        daemon.start(self.features, &memory)?;
        for index in 0..self.served {
            let (queue, _) = &self.queues[index];
            if !queue.ready() || queue.size() == 0 || !queue.is_valid(&*memory) {
                return Err(Error::Queue(index));
            }
            self.started = index + 1;
            self.start_queue(daemon, index)?;
        }
        Ok(())
    }

    fn stop(&mut self, daemon: &mut Daemon) {
        for index in 0..self.started {
            if let Err(e) = self.stop_queue(daemon, index) {
                tracing::debug!("A device's daemon did not stop queue {index}: {e}");
                if daemon.give_up(&e) {
                    return;
                }
            }
        }
    }

    /// The guest's kicks are the daemon's.
    fn event(&mut self, token: u32) {
        if let Ok(index) = u16::try_from(token) {
            self.interrupt.queue(index);
        }
    }

    fn tell_reset(&mut self) -> Result<(), Error> {
        self.write_reset().map_err(|_| Error::Queue(EVENTS))
    }

    /// The daemon tells only when it stops.
    fn positions(&mut self, daemon: &Daemon) -> Result<Vec<QueueState>, Error> {
        for index in 0..self.started {
            self.stop_queue(daemon, index)?;
        }
        let queues = self.queues.iter();
        let states = queues.map(|(queue, _)| QueueState::from(queue)).collect();
        for index in 0..self.started {
            self.start_queue(daemon, index)?;
        }
        Ok(states)
    }
}

impl Drop for Direct {
    fn drop(&mut self) {
        for (_, call) in &self.calls {
            self.watch.remove(call);
        }
    }
}
