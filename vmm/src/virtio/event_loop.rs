//! The one thread that serves all devices of a VM: waits for their descriptors and hands each event
//! to its device. Knows no queue and no device type.
//!
//! ```text
//!           run()                pause()                  resume()
//!  stopped ──────▶ running ──────────────▶ paused ───────────────────▶ running … stop() ends it
//!                     (returns when no device is in the middle of an event)
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Device, Error};

/// Slot of the loop's own eventfd; devices have the others.
const WAKE: u32 = u32::MAX;
/// Events taken from the kernel at a time.
const BATCH: usize = 32;

/// A device as the loop and its transport share it.
pub type Attached = Arc<Mutex<dyn Device>>;

/// Serves the devices of one VM in the thread that calls [`EventLoop::run`].
pub struct EventLoop {
    epoll: Arc<Epoll>,
    wake: EventFd,
    /// By slot; a slot is never used again, so that a late event finds nobody.
    devices: Mutex<Vec<Option<Attached>>>,
    phase: Mutex<Phase>,
    changed: Condvar,
}

#[derive(Default)]
struct Phase {
    paused: bool,
    stopping: bool,
    /// A device is handling an event.
    busy: bool,
}

/// Registers the descriptors of one device with the loop.
#[derive(Clone)]
pub struct Watch {
    epoll: Arc<Epoll>,
    slot: u32,
}

impl Watch {
    /// Has [`Device::event`] called with `token` when one of `events` is there. Whoever watches a
    /// descriptor removes it before closing it: a copy of it may live on elsewhere (in KVM, in a
    /// back end) and would keep the registration.
    ///
    /// # Errors
    /// The kernel's, for example that it is watched already.
    pub fn add(&self, fd: &impl AsRawFd, token: u32, events: EventSet) -> io::Result<()> {
        let event = EpollEvent::new(events, u64::from(self.slot) << 32 | u64::from(token));
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// No more events of this descriptor. Idempotent.
    pub fn remove(&self, fd: &impl AsRawFd) {
        // Fails only when it was not watched.
        let _ = self.epoll.ctl(
            ControlOperation::Delete,
            fd.as_raw_fd(),
            EpollEvent::default(),
        );
    }
}

impl EventLoop {
    /// A loop without devices that does not run yet.
    ///
    /// # Errors
    /// The kernel refuses an epoll set or an eventfd.
    pub fn new() -> Result<Self, Error> {
        let resource = |what| move |source| Error::Resource { what, source };
        let epoll = Epoll::new().map_err(resource("make an epoll set"))?;
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(resource("make an eventfd"))?;
        let event = EpollEvent::new(EventSet::IN, u64::from(WAKE) << 32);
        epoll
            .ctl(ControlOperation::Add, wake.as_raw_fd(), event)
            .map_err(resource("watch an eventfd"))?;
        Ok(Self {
            epoll: Arc::new(epoll),
            wake,
            devices: Mutex::default(),
            phase: Mutex::default(),
            changed: Condvar::new(),
        })
    }

    /// Takes in a device; what is returned goes into its [`super::Activation`].
    pub fn attach(&self, device: Attached) -> Watch {
        let mut devices = lock(&self.devices);
        devices.push(Some(device));
        Watch {
            epoll: self.epoll.clone(),
            slot: (devices.len() - 1) as u32, // a VM sees far fewer in its life
        }
    }

    /// Resets a device and forgets it.
    pub fn detach(&self, watch: &Watch) {
        let device = lock(&self.devices)
            .get_mut(watch.slot as usize)
            .and_then(Option::take);
        if let Some(device) = device {
            lock(&device).reset();
        }
    }

    /// Serves the devices until [`EventLoop::stop`].
    ///
    /// # Errors
    /// The kernel cannot wait for the devices' descriptors any more.
    pub fn run(&self) -> Result<(), Error> {
        while self.turn(-1)? {}
        Ok(())
    }

    /// Waits at most `timeout` milliseconds (-1: for ever) for events and handles them. Returns
    /// whether to go on.
    ///
    /// # Errors
    /// As [`EventLoop::run`].
    pub fn turn(&self, timeout: i32) -> Result<bool, Error> {
        let mut events = [EpollEvent::default(); BATCH];
        let count = match self.epoll.wait(timeout, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(source) => {
                let what = "wait for the devices' events";
                return Err(Error::Resource { what, source });
            }
        };
        if !self.enter() {
            return Ok(false);
        }
        for event in &events[..count] {
            self.dispatch((event.data() >> 32) as u32, event.data() as u32);
        }
        lock(&self.phase).busy = false;
        self.changed.notify_all();
        Ok(true)
    }

    /// Returns when no device does anything any more; nothing happens until [`EventLoop::resume`].
    /// Idempotent.
    pub fn pause(&self) {
        let mut phase = lock(&self.phase);
        phase.paused = true;
        while phase.busy {
            phase = (self.changed.wait(phase)).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Goes on. Idempotent.
    pub fn resume(&self) {
        lock(&self.phase).paused = false;
        self.changed.notify_all();
    }

    /// Has [`EventLoop::run`] return soon, also when it is paused. Idempotent.
    pub fn stop(&self) {
        lock(&self.phase).stopping = true;
        self.changed.notify_all();
        let _ = self.wake.write(1); // fails only when it is already signalled
    }

    /// Waits while the loop is paused. Returns whether to handle events.
    fn enter(&self) -> bool {
        let mut phase = lock(&self.phase);
        while phase.paused && !phase.stopping {
            phase = (self.changed.wait(phase)).unwrap_or_else(PoisonError::into_inner);
        }
        phase.busy = !phase.stopping;
        phase.busy
    }

    fn dispatch(&self, slot: u32, token: u32) {
        if slot == WAKE {
            let _ = self.wake.read();
            return;
        }
        let device = lock(&self.devices).get(slot as usize).cloned().flatten();
        if let Some(device) = device {
            lock(&device).event(token);
        }
    }
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
