//! The threads that serve a machine's devices: one for disks, which wait for the host's, and one for all
//! others, so that nobody waits for a disk but who asked it. Knows devices by their type only.

use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use super::{Error, lock_device};
use crate::confine::{self, May};
use crate::virtio::{self, Device, EventLoop, Watch};

/// Type of block devices (VIRTIO 1.2, section 5).
const BLOCK: u32 = 2;
/// A thread that serves devices needs little.
const STACK: usize = 256 * 1024;

/// A device as slots and threads share it.
type Shared = Arc<Mutex<dyn Device>>;

/// The loops of both threads.
pub(super) struct Serving {
    disks: Arc<EventLoop>,
    others: Arc<EventLoop>,
}

impl Serving {
    /// Loops without devices, of which nothing runs yet.
    pub(super) fn new() -> Result<Self, Error> {
        Ok(Self {
            disks: Arc::new(EventLoop::new()?),
            others: Arc::new(EventLoop::new()?),
        })
    }

    /// Starts the threads, with what disks need if there may be any; returns when they are confined, if they are to be.
    pub(super) fn start(&self, disks: bool, confined: Option<May>) -> Result<(), Error> {
        let (tell, told) = mpsc::channel();
        for (name, events, deep) in [
            ("disks", &self.disks, disks),
            ("devices", &self.others, false),
        ] {
            let (events, tell) = (Arc::clone(events), tell.clone());
            let body = move || {
                if deep && let Err(e) = virtio::prepare_thread() {
                    tracing::info!("Disks do one request after the other, without io_uring: {e}");
                }
                let ready = match confined {
                    Some(may) => confine::thread(confine::Thread::Devices, may),
                    None => Ok(()),
                };
                let go = ready.is_ok();
                // Whoever started it waits for this.
                let _ = tell.send(ready);
                drop(tell);
                if go && let Err(e) = events.run() {
                    tracing::error!("Thread {name} stops: {e}");
                }
            };
            thread::Builder::new()
                .name(name.into())
                .stack_size(STACK)
                .spawn(body)
                .map_err(Error::io("start a thread for devices"))?;
        }
        drop(tell);
        for _ in 0..2 {
            let ended = |_| Error::Cpu("a thread for devices ended".into());
            told.recv().map_err(ended)??;
        }
        Ok(())
    }

    /// Takes in a device.
    pub(super) fn attach(&self, device: &Shared) -> Watch {
        self.of(device).attach(Arc::clone(device))
    }

    /// Resets a device and forgets it.
    pub(super) fn detach(&self, device: &Shared, watch: &Watch) {
        self.of(device).detach(watch);
    }

    /// Lets the devices go on. Idempotent.
    pub(super) fn resume(&self) {
        self.both().for_each(|events| events.resume());
    }

    /// Returns when no device does anything any more. Idempotent.
    pub(super) fn pause(&self) {
        self.both().for_each(|events| events.pause());
    }

    /// Has the threads end soon. Idempotent.
    pub(super) fn stop(&self) {
        self.both().for_each(|events| events.stop());
    }

    fn of(&self, device: &Shared) -> &EventLoop {
        match is_disk(device) {
            true => &self.disks,
            false => &self.others,
        }
    }

    fn both(&self) -> impl Iterator<Item = &EventLoop> {
        [&*self.disks, &*self.others].into_iter()
    }
}

pub(super) fn is_disk(device: &Shared) -> bool {
    lock_device(device).kind() == BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::{Activation, Error as DeviceError, Saved, State};
    use std::time::Duration;
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::eventfd::EventFd;

    /// Has a type, says when it has an event, and is done with it when it is told so.
    struct Slow(u32, mpsc::Sender<u32>, mpsc::Receiver<()>);

    impl Device for Slow {
        fn kind(&self) -> u32 {
            self.0
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &[]
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn write_config(&mut self, _: u64, _: &[u8]) {}
        fn activate(&mut self, _: Activation) -> Result<(), DeviceError> {
            Ok(())
        }
        fn reset(&mut self) {}
        fn event(&mut self, _: u32) {
            self.1.send(self.0).unwrap();
            let _ = self.2.recv();
        }
        fn save(&mut self) -> Result<Saved, DeviceError> {
            let state = State::Stateless { kind: self.0 };
            Ok(Saved {
                queues: Vec::new(),
                state,
            })
        }
        fn restore(&mut self, _: &State) -> Result<(), DeviceError> {
            Ok(())
        }
    }

    #[test]
    fn nobody_waits_for_a_slow_disk_but_another_disk() {
        let serving = Serving::new().unwrap();
        serving.start(true, None).unwrap();
        let (say, said) = mpsc::channel();
        let (mut ends, mut kicks) = (Vec::new(), Vec::new());
        let mut kick = |kind| {
            let (end, ended) = mpsc::channel();
            let device: Shared = Arc::new(Mutex::new(Slow(kind, say.clone(), ended)));
            let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            serving.attach(&device).add(&kick, 0, EventSet::IN).unwrap();
            kick.write(1).unwrap();
            kicks.push(kick);
            ends.push(end);
        };
        let patience = Duration::from_secs(20);
        kick(BLOCK);
        assert_eq!(said.recv_timeout(patience), Ok(BLOCK));
        kick(BLOCK);
        kick(1);
        assert_eq!(said.recv_timeout(patience), Ok(1));
        drop(ends);
        serving.pause();
        serving.stop();
    }
}
