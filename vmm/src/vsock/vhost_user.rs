//! The engine behind QEMU: a vhost-user back end in threads of this process. Knows the vhost-user
//! protocol's events and the threads; packets are `queues`' and `engine`'s business.
//!
//! ```text
//! supervisor     waits for QEMU, then for its end, then for stop()
//! message thread (vhost-user-backend) QEMU's set-up messages; asleep while the guest runs
//! worker thread  (vhost-user-backend) kicks of the guest and the engine's sockets; does all the work
//! ```

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use tracing::{debug, warn};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::engine::{Config, Engine};
use super::{Error, queues};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Event of the worker: the engine's sockets. Numbers up to `queues::COUNT` are the library's.
const ENGINE: u16 = queues::COUNT as u16 + 1;
/// Event of the worker: look again, or stop.
const WAKE: u16 = ENGINE + 1;

/// The supervisor needs little; the other two threads are the library's.
const STACK: usize = 128 * 1024;

/// A vsock device for one QEMU, from [`VhostUserVsock::start`] to [`VhostUserVsock::stop`].
pub struct VhostUserVsock {
    shared: Arc<Shared>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

/// What `stop` and the supervisor tell each other.
struct Shared {
    stopping: AtomicBool,
    stop: EventFd,
    /// Ends the conversation with QEMU, once there is one.
    hang_up: Mutex<Option<ShutdownHandle>>,
}

impl VhostUserVsock {
    /// Starts to listen for host clients at once, and for QEMU, which connects its chardev to
    /// `listener`, in the background. One QEMU is served; when it is gone, its connections are
    /// closed once their clients have what was sent, and new clients are refused.
    ///
    /// # Errors
    /// [`Error`]: the configuration is unusable, or the kernel refuses.
    pub fn start(listener: UnixListener, config: &Config) -> Result<Self, Error> {
        let resource = |what| move |source| Error::Resource { what, source };
        let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
        let device = Arc::new(Device {
            state: Mutex::new(State {
                engine: Engine::new(config)?,
                memory: Memory::new(GuestMemoryMmap::new()),
                vrings: None,
                stopped_at: [None; 2],
                broken: false,
            }),
            wake: eventfd().map_err(resource("an eventfd"))?,
            stopping: AtomicBool::new(false),
            guest_cid: config.guest_cid,
        });
        let memory = Memory::new(GuestMemoryMmap::new());
        let daemon = VhostUserDaemon::new("vsock-vhost".into(), device.clone(), memory)
            .map_err(|e| Error::VhostUser(e.to_string()))?;
        // From here on the worker runs and `finish` ends it.
        let supervisor = Supervisor { daemon, device };
        supervisor
            .watch()
            .map_err(resource("the worker's events"))?;

        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            stop: eventfd().map_err(resource("an eventfd"))?,
            hang_up: Mutex::new(None),
        });
        let supervised = shared.clone();
        let thread = thread::Builder::new()
            .name("vsock".into())
            .stack_size(STACK)
            .spawn(move || supervisor.run(listener, &supervised))
            .map_err(resource("a thread"))?;
        Ok(Self {
            shared,
            supervisor: Mutex::new(Some(thread)),
        })
    }

    /// Closes all connections, ends the threads and removes the socket. Idempotent.
    pub fn stop(&self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = self.shared.stop.write(1); // fails only when it is already signalled
        if let Some(handle) = lock(&self.shared.hang_up).as_ref() {
            handle.shutdown();
        }
        if let Some(thread) = lock(&self.supervisor).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for VhostUserVsock {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Owns the vhost-user library's threads.
struct Supervisor {
    daemon: VhostUserDaemon<Arc<Device>>,
    device: Arc<Device>,
}

impl Supervisor {
    fn watch(&self) -> io::Result<()> {
        let engine = lock(&self.device.state).engine.as_raw_fd();
        let wake = self.device.wake.as_raw_fd();
        for worker in self.daemon.get_epoll_handlers() {
            // First what ends the worker.
            worker.register_listener(wake, EventSet::IN, WAKE.into())?;
            worker.register_listener(engine, EventSet::IN, ENGINE.into())?;
        }
        Ok(())
    }

    fn run(mut self, listener: UnixListener, shared: &Shared) {
        if let Err(e) = self.serve(listener, shared) {
            warn!("vsock: the connection to QEMU ended: {e}");
        }
        self.device.guest_gone();
        // What the guest sent may still be on its way to slow clients: the worker goes on.
        if let Err(e) = wait(&[&shared.stop]) {
            warn!("vsock: cannot wait for the end: {e}");
        }
    }

    /// Serves the first QEMU that connects, until it is gone or `stop` is called.
    fn serve(&mut self, listener: UnixListener, shared: &Shared) -> Result<(), String> {
        wait(&[&listener, &shared.stop]).map_err(|e| e.to_string())?;
        if shared.stopping.load(Ordering::SeqCst) {
            return Ok(());
        }
        let mut listener = Listener::from(listener);
        self.daemon
            .start(&mut listener)
            .map_err(|e| e.to_string())?;
        drop(listener); // one QEMU, no second
        *lock(&shared.hang_up) = self.daemon.shutdown_handle();
        if shared.stopping.load(Ordering::SeqCst) {
            self.daemon.request_shutdown();
        }
        // How QEMU leaves (quietly, or in the middle of a message) makes no difference.
        match self.daemon.wait() {
            Ok(()) => debug!("vsock: QEMU has disconnected"),
            Err(e) => debug!("vsock: QEMU has disconnected: {e}"),
        }
        Ok(())
    }
}

impl Drop for Supervisor {
    /// Ends the worker; the library joins it when `daemon` is dropped.
    fn drop(&mut self) {
        self.device.stopping.store(true, Ordering::SeqCst);
        let _ = self.device.wake.write(1);
    }
}

/// Sleeps until one of the descriptors is readable.
fn wait(on: &[&dyn AsRawFd]) -> io::Result<()> {
    let epoll = Epoll::new()?;
    for fd in on {
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)?;
    }
    loop {
        match epoll.wait(-1, &mut [EpollEvent::default()]) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// A poisoned lock means that a thread has panicked; what it guards is still consistent enough to
/// be closed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The device as the vhost-user library sees it.
struct Device {
    state: Mutex<State>,
    wake: EventFd,
    stopping: AtomicBool,
    guest_cid: u64,
}

struct State {
    engine: Engine,
    memory: Memory,
    /// Receive and transmit queue, as soon as there was an event.
    vrings: Option<[VringRwLock; 2]>,
    /// Where the queues stood when QEMU stopped them: when they go on from there the VM was only
    /// paused, else the guest has reset the device.
    stopped_at: [Option<u16>; 2],
    /// The guest has broken a ring.
    broken: bool,
}

impl Device {
    fn guest_gone(&self) {
        let mut state = lock(&self.state);
        if let Some([_, tx]) = state.vrings.clone() {
            state.drain(&tx);
        }
        state.engine.close();
    }
}

impl State {
    /// Moves packets, if both queues are running. Returns whether to call again.
    fn service(&mut self) -> bool {
        let Some([rx, tx]) = self.vrings.clone() else {
            return false;
        };
        let (mut rx, mut tx) = (rx.get_mut(), tx.get_mut());
        for vring in [&*rx, &*tx] {
            if !vring.is_enabled() || !vring.get_queue().ready() {
                return false;
            }
        }
        let positions = [rx.get_queue().next_avail(), tx.get_queue().next_avail()];
        let stopped_at = std::mem::take(&mut self.stopped_at);
        if (stopped_at.iter().zip(positions))
            .any(|(then, now)| then.is_some_and(|then| then != now))
        {
            debug!("vsock: the guest has reset the device");
            self.engine.reset();
        }
        if stopped_at.iter().any(Option::is_some) {
            // It may have been reset where it stood: a queue can be broken at its first entry. One that
            // was only paused breaks again.
            self.broken = false;
        }
        if self.broken {
            return false;
        }
        let memory = self.memory.memory();
        let (engine, rxq, txq) = (&mut self.engine, rx.get_queue_mut(), tx.get_queue_mut());
        match queues::service(engine, &memory, rxq, txq) {
            Ok(outcome) => {
                for (wanted, vring) in [(outcome.signal_rx, &rx), (outcome.signal_tx, &tx)] {
                    if wanted && let Err(e) = vring.signal_used_queue() {
                        debug!("vsock: cannot signal the guest: {e}");
                    }
                }
                outcome.again
            }
            Err(e) => {
                warn!("vsock: the guest has broken a queue, the device stops: {e}");
                self.broken = true;
                self.engine.reset();
                false
            }
        }
    }

    /// Takes what the guest sent before its device was stopped and the worker did not come to.
    fn drain(&mut self, tx: &VringRwLock) {
        let mut tx = tx.get_mut();
        if self.broken || !tx.is_enabled() {
            return;
        }
        let memory = self.memory.memory();
        let queue = tx.get_queue_mut();
        let ready = queue.ready();
        queue.set_ready(true);
        if let Err(e) = queues::drain(&mut self.engine, &memory, queue) {
            debug!("vsock: cannot look at the stopped queue: {e}");
        }
        queue.set_ready(ready);
    }
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        queues::COUNT
    }

    fn max_queue_size(&self) -> usize {
        queues::MAX_SIZE.into()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&self, _enabled: bool) {} // the queues know

    /// `struct virtio_vsock_config` (VIRTIO 1.2, 5.10.4): the guest's CID.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest_cid.to_le_bytes();
        let end = offset.checked_add(size).map(|end| end as usize);
        let wanted = end.and_then(|end| config.get(offset as usize..end));
        wanted.unwrap_or_default().to_vec()
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        lock(&self.state).memory = memory;
        Ok(())
    }

    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let mut state = lock(&self.state);
        if let Some(vrings) = state.vrings.clone()
            && let Some(vring) = vrings.get(index as usize)
        {
            if index as usize == queues::TX {
                state.drain(vring);
            }
            let position = vring.get_ref().get_queue().next_avail();
            state.stopped_at[index as usize] = Some(position);
        }
        Ok(())
    }

    /// An error ends the worker: it is returned once, when the device is stopped.
    fn handle_event(
        &self,
        event: u16,
        _ready: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        if event == WAKE {
            let _ = self.wake.read();
            if self.stopping.load(Ordering::SeqCst) {
                return Err(io::Error::other("the device was stopped"));
            }
        }
        let mut state = lock(&self.state);
        if state.vrings.is_none()
            && let [rx, tx, ..] = vrings
        {
            state.vrings = Some([rx.clone(), tx.clone()]);
        }
        if event == ENGINE {
            state.engine.handle_events();
        }
        if state.service() {
            let _ = self.wake.write(1);
        }
        Ok(())
    }
}
