//! The threads of the virtual processors: they run the guest, hand its accesses to the [`Bus`], and
//! stop for whoever asks. Nothing here knows what is on the bus.
//!
//! ```text
//!            pause()                 resume()
//!  running ──────────▶ paused ───────────────▶ running … stop(), or one of them ends ─▶ gone
//!            (returns when every processor is out of the guest and its registers are readable)
//! ```

#![expect(
    unsafe_code,
    reason = "a thread that runs a guest is interrupted by a signal"
)]

use std::error::Error as _;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_ioctls::{VcpuExit, VcpuFd};

use super::bus::Bus;
use super::{End, Error};
use crate::confine::{self, May};

/// A thread that did not see its signal, because it was about to enter the guest, gets another.
const KICK_EVERY: Duration = Duration::from_millis(2);
/// A processor's thread needs little.
const STACK: usize = 128 * 1024;

/// What the processors are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// What the threads share.
struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    wanted: Wanted,
    /// Threads that are in the guest or about to be.
    running: usize,
    /// Threads that have not ended.
    alive: usize,
    /// What each paused thread does once with its processor: the how manieth, and what.
    job: Option<(u64, Job)>,
    /// Threads that have not done it yet.
    left: usize,
}

type Job = Arc<dyn Fn(usize, &VcpuFd) + Send + Sync>;

/// All processors of a VM.
pub(super) struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a thread for each, paused. `ended` is called once, by the first that ends.
    pub(super) fn start(
        cpus: Vec<VcpuFd>,
        bus: &Arc<Bus>,
        confined: Option<May>,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<Self, Error> {
        handle_kicks().map_err(Error::io("handle the signal that interrupts vCPUs"))?;
        let gate = Arc::new(Gate {
            state: Mutex::new(State {
                wanted: Wanted::Pause,
                running: cpus.len(),
                alive: cpus.len(),
                job: None,
                left: 0,
            }),
            changed: Condvar::new(),
        });
        let ended = Arc::new(Mutex::new(Some(ended)));
        let mut threads = Vec::new();
        for (id, mut cpu) in cpus.into_iter().enumerate() {
            let gate = Arc::clone(&gate);
            let (bus, ended) = (Arc::clone(bus), Arc::clone(&ended));
            let body = move || {
                // Without its filter it never enters the guest.
                let end = match confine(confined) {
                    Ok(()) => gate.serve(id, &mut cpu, &bus),
                    Err(why) => Some(End::Failed(why)),
                };
                gate.leave();
                if let Some(end) = end
                    && let Some(tell) = lock(&ended).take()
                {
                    tell(end);
                }
            };
            let thread = thread::Builder::new()
                .name(format!("vcpu{id}"))
                .stack_size(STACK)
                .spawn(body);
            threads.push(thread.map_err(Error::io("start a vCPU's thread"))?);
        }
        Ok(Self { gate, threads })
    }

    /// Takes every processor out of the guest. Idempotent.
    pub(super) fn pause(&self) {
        self.ask(Wanted::Pause);
    }

    /// Lets them run. Idempotent; without effect once they have stopped.
    pub(super) fn resume(&self) {
        let mut state = lock(&self.gate.state);
        if state.wanted == Wanted::Pause {
            state.wanted = Wanted::Run;
            self.gate.changed.notify_all();
        }
    }

    /// Whether they run, or would if they had not ended.
    pub(super) fn are_to_run(&self) -> bool {
        lock(&self.gate.state).wanted == Wanted::Run
    }

    /// Ends the threads. Idempotent.
    pub(super) fn stop(&self) {
        self.ask(Wanted::Stop);
    }

    /// Has each paused processor's thread call `job` once; returns the results in the processors'
    /// order. `None`: they are not paused, or one of them has ended.
    pub(super) fn each<T: Send + 'static>(
        &self,
        job: impl Fn(&VcpuFd) -> T + Send + Sync + 'static,
    ) -> Option<Vec<T>> {
        let empty = self
            .threads
            .iter()
            .map(|_| None)
            .collect::<Vec<Option<T>>>();
        let results = Arc::new(Mutex::new(empty));
        let into = Arc::clone(&results);
        let job: Job = Arc::new(move |id, cpu| lock(&into)[id] = Some(job(cpu)));
        let mut state = lock(&self.gate.state);
        if state.wanted != Wanted::Pause || state.alive != self.threads.len() {
            return None;
        }
        let number = state.job.as_ref().map_or(1, |(number, _)| number + 1);
        (state.job, state.left) = (Some((number, job)), state.alive);
        self.gate.changed.notify_all();
        while state.left > 0 && state.wanted == Wanted::Pause {
            state = (self.gate.changed.wait(state)).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        std::mem::take(&mut *lock(&results)).into_iter().collect()
    }

    fn ask(&self, wanted: Wanted) {
        let mut state = lock(&self.gate.state);
        if state.wanted != Wanted::Stop {
            state.wanted = wanted;
        }
        self.gate.changed.notify_all();
        while state.running > 0 {
            for thread in &self.threads {
                // SAFETY: the thread was not joined, so that its handle is valid.
                unsafe { libc::pthread_kill(thread.as_pthread_t(), libc::SIGRTMIN()) };
            }
            let waited = self.gate.changed.wait_timeout(state, KICK_EVERY);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

fn confine(wanted: Option<May>) -> Result<(), String> {
    match wanted {
        Some(may) => confine::thread(confine::Thread::Vcpu, may).map_err(|e| match e.source() {
            Some(cause) => format!("{e}: {cause}"),
            None => e.to_string(),
        }),
        None => Ok(()),
    }
}

/// A handler that does nothing: the signal makes `KVM_RUN` return.
fn handle_kicks() -> std::io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: a zeroed sigaction is valid; the handler does nothing.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as libc::sighandler_t;
        libc::sigaction(libc::SIGRTMIN(), &raw const action, std::ptr::null_mut())
    };
    if result == 0 {
        return Ok(());
    }
    Err(std::io::Error::last_os_error())
}

impl Gate {
    /// Runs a processor until it ends (then how) or is to stop.
    fn serve(&self, id: usize, cpu: &mut VcpuFd, bus: &Bus) -> Option<End> {
        let mut done = 0;
        loop {
            if !self.enter(id, cpu, &mut done) {
                return None;
            }
            let ended = self.run(cpu, bus);
            // What the guest read last reaches its registers only when it is entered again.
            cpu.set_kvm_immediate_exit(1);
            let _ = cpu.run();
            cpu.set_kvm_immediate_exit(0);
            if ended.is_some() {
                return ended;
            }
        }
    }

    /// Runs the guest until it ends or somebody wants something else.
    fn run(&self, cpu: &mut VcpuFd, bus: &Bus) -> Option<End> {
        loop {
            match cpu.run() {
                Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
                Ok(VcpuExit::IoOut(port, data)) => {
                    if bus.port_write(port, data) {
                        return Some(End::Reset);
                    }
                }
                Ok(VcpuExit::MmioRead(_, data)) => Bus::read(data),
                Ok(VcpuExit::MmioWrite(address, data)) => bus.write(address, data),
                // A triple fault: how a guest restarts, which is how it ends.
                Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(..)) => {
                    return Some(End::TripleFault);
                }
                Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::FailEntry(reason, _)) => {
                    let why = format!("The processor refused to enter the guest: {reason:#x}");
                    return Some(End::Failed(why));
                }
                Ok(other) => {
                    let why = format!("KVM stopped the guest: {other:?}");
                    return Some(End::Failed(why));
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                    if lock(&self.state).wanted != Wanted::Run {
                        return None;
                    }
                }
                Err(e) => return Some(End::Failed(format!("KVM_RUN failed: {e}"))),
            }
        }
    }

    /// Waits while the processors are paused; returns whether to run. `done` is the last job.
    fn enter(&self, id: usize, cpu: &VcpuFd, done: &mut u64) -> bool {
        let mut state = lock(&self.state);
        if state.wanted != Wanted::Run {
            state.running -= 1;
            self.changed.notify_all();
            while state.wanted == Wanted::Pause {
                match state.job.clone() {
                    Some((number, job)) if number > *done => {
                        *done = number;
                        drop(state);
                        job(id, cpu);
                        state = lock(&self.state);
                        state.left = state.left.saturating_sub(1);
                        self.changed.notify_all();
                    }
                    _ => {
                        state = (self.changed.wait(state)).unwrap_or_else(PoisonError::into_inner);
                    }
                }
            }
            state.running += 1;
        }
        state.wanted == Wanted::Run
    }

    fn leave(&self) {
        let mut state = lock(&self.state);
        state.running -= 1;
        state.alive -= 1;
        self.changed.notify_all();
    }
}

/// A poisoned lock means that a thread has panicked; what it guards is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
