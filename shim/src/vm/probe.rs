//! Whether this machine's KVM is real. `/dev/kvm` existing says nothing: nested and paravirtual ones
//! emulate a guest's kernel at a few million instructions a second, and stop at instructions they do
//! not know. So a counted loop is run in a guest of one vCPU, and its rate decides.

#![expect(
    unsafe_code,
    reason = "guest memory is given to KVM, and a vCPU that hangs is interrupted by a signal"
)]

use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm as Device, VcpuExit, VcpuFd};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::cache;

/// Instructions a second from which a KVM counts as real. Hardware does thousands of millions, in
/// the slowest nesting hundreds; an emulating one about two.
pub const REAL_RATE: u64 = 50_000_000;
/// Rounds of the first loop, two instructions each: enough to tell 2 million a second from 50.
const SHORT_ROUNDS: u32 = 10_000;
/// How often it is tried: entry and exit count here, and are slower the first time.
const SHORT_TRIES: u32 = 3;
/// Below this rate of the short loop no long one is tried.
const HOPELESS_RATE: u64 = 3_000_000;
/// Rounds of the second loop, long enough that entry and exit do not count: 40 ms at [`REAL_RATE`].
const LONG_ROUNDS: u32 = 1_000_000;
/// How long making the VM may take: it waits for every processor of the machine.
const SETUP_PATIENCE: Duration = Duration::from_secs(2);
/// After running for this long the vCPU is interrupted.
const PATIENCE: Duration = Duration::from_millis(90);
/// And again each time this long passes: a signal may come before the vCPU is entered.
const KICK_EVERY: Duration = Duration::from_millis(5);
/// Kicks until a vCPU that does not return is left behind.
const KICKS_MAX: u32 = 200;

/// Name of the file, in the state folder, that remembers the answer for this boot.
const CACHE_FILE: &str = "kvm-probe.json";

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kvm", rename_all = "snake_case")]
pub enum Kvm {
    /// Hardware KVM.
    Real {
        /// Instructions a second.
        rate: u64,
    },
    /// It works, but emulates.
    Slow {
        /// Instructions a second.
        rate: u64,
    },
    /// It is there and does not work.
    Unusable {
        /// Why.
        reason: String,
    },
    /// There is no `/dev/kvm`.
    Absent,
}

impl Kvm {
    /// Whether guests should run on it.
    #[must_use]
    pub fn is_real(&self) -> bool {
        matches!(self, Self::Real { .. })
    }
}

impl std::fmt::Display for Kvm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let millions = |rate: &u64| format!("{}.{}", rate / 1_000_000, rate / 100_000 % 10);
        let least = REAL_RATE / 1_000_000;
        match self {
            Self::Real { rate } => write!(f, "real, {} M instructions/s", millions(rate)),
            Self::Slow { rate } => write!(
                f,
                "emulated: {} M instructions/s where a real one does at least {least} M",
                millions(rate)
            ),
            Self::Unusable { reason } => write!(f, "/dev/kvm does not work: {reason}"),
            Self::Absent => write!(f, "there is no /dev/kvm"),
        }
    }
}

/// The answer for this boot and kernel, from the file in `state_dir` or by [`probe`], whose answer is
/// then written there.
#[must_use]
pub fn cached(state_dir: &Path) -> Kvm {
    cache::remembered(&state_dir.join(CACHE_FILE), probe)
}

/// Measures. Blocks for some 0.1 s at most, where making a VM does not take long itself.
#[must_use]
pub fn probe() -> Kvm {
    if !Path::new("/dev/kvm").exists() {
        return Kvm::Absent;
    }
    let unusable = |reason: String| Kvm::Unusable { reason };
    let (tell, told) = mpsc::channel();
    let vcpu = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            let answer = measure(|| {
                let _ = tell.send(Step::Running);
            });
            let _ = tell.send(Step::Done(answer));
        });
    let vcpu = match vcpu {
        Ok(thread) => thread,
        Err(e) => return unusable(e.to_string()),
    };
    match wait(&vcpu, &told) {
        Some(Ok(rate)) if rate >= REAL_RATE => Kvm::Real { rate },
        Some(Ok(rate)) => Kvm::Slow { rate },
        Some(Err(reason)) => unusable(reason),
        None => unusable("its vCPU did not return".into()),
    }
}

type Answer = Result<u64, String>;

/// What the vCPU's thread tells.
enum Step {
    /// The VM is made and its vCPU is about to run.
    Running,
    Done(Answer),
}

/// Waits for the answer; interrupts a vCPU that runs for too long, so that it tells how far it came.
fn wait(vcpu: &std::thread::JoinHandle<()>, told: &mpsc::Receiver<Step>) -> Option<Answer> {
    extern "C" fn nothing(_: libc::c_int) {}
    let mut patience = SETUP_PATIENCE;
    let mut kicks = 0;
    loop {
        match told.recv_timeout(patience) {
            Ok(Step::Done(answer)) => return Some(answer),
            Ok(Step::Running) => patience = PATIENCE,
            Err(_) if kicks == KICKS_MAX => return None,
            Err(_) => {
                kicks += 1;
                patience = KICK_EVERY;
                let signal = libc::SIGRTMIN();
                // SAFETY: the handler does nothing; the thread was not joined: its handle is valid.
                unsafe {
                    let mut action: libc::sigaction = std::mem::zeroed();
                    action.sa_sigaction = nothing as *const () as libc::sighandler_t;
                    libc::sigaction(signal, &raw const action, std::ptr::null_mut());
                    libc::pthread_kill(vcpu.as_pthread_t(), signal);
                }
            }
        }
    }
}

fn measure(running: impl FnOnce()) -> Answer {
    let mut page = Box::new(Page([0; 4096]));
    // again: dec ecx; jnz again; hlt
    page.0[..4].copy_from_slice(&[0x49, 0x75, 0xfd, 0xf4]);
    let vm = Device::new()
        .and_then(|device| device.create_vm())
        .map_err(text("KVM_CREATE_VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: ADDRESS,
        memory_size: size_of::<Page>() as u64,
        userspace_addr: &raw mut *page as u64,
    };
    // SAFETY: the page outlives the VM, which is dropped first, and nobody else uses it meanwhile.
    unsafe { vm.set_user_memory_region(region) }.map_err(text("KVM_SET_USER_MEMORY_REGION"))?;
    let mut vcpu = vm.create_vcpu(0).map_err(text("KVM_CREATE_VCPU"))?;
    protected_mode(&vcpu)?;
    running();
    // The first entry brings page faults with it.
    run_loop(&mut vcpu, 1)?;
    let mut best = 0;
    for _ in 0..SHORT_TRIES {
        best = best.max(run_loop(&mut vcpu, SHORT_ROUNDS)?);
        if best >= HOPELESS_RATE {
            return run_loop(&mut vcpu, LONG_ROUNDS);
        }
    }
    Ok(best)
}

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Where the page lies in the guest.
const ADDRESS: u64 = 0x1000;

fn text(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> String {
    move |e| format!("{what}: {e}")
}

/// Flat 32-bit protected mode: what hardware without "unrestricted guest" runs too.
fn protected_mode(vcpu: &VcpuFd) -> Result<(), String> {
    let mut sregs = vcpu.get_sregs().map_err(text("KVM_GET_SREGS"))?;
    let data = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment {
        selector: 8,
        type_: 11,
        ..data
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).map_err(text("KVM_SET_SREGS"))
}

/// Runs at most `rounds` rounds; returns instructions a second of this thread's processor time, which
/// other work on the machine does not count against.
fn run_loop(vcpu: &mut VcpuFd, rounds: u32) -> Answer {
    let regs = kvm_regs {
        rip: ADDRESS,
        rflags: 2,
        rcx: rounds.into(),
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(text("KVM_SET_REGS"))?;
    let start = thread_nanos();
    let ended = match vcpu.run() {
        Ok(VcpuExit::Hlt | VcpuExit::Intr) => Ok(()),
        Ok(other) => Err(format!("a counted loop ended with {other:?}")),
        // The signal: how far it came tells the rate as well.
        Err(e) if e.errno() == libc::EINTR => Ok(()),
        Err(e) => Err(text("KVM_RUN")(e)),
    };
    let nanos = thread_nanos().saturating_sub(start).max(1);
    ended?;
    let left = vcpu.get_regs().map_err(text("KVM_GET_REGS"))?.rcx;
    let done = u128::from(u64::from(rounds).saturating_sub(left));
    Ok(u64::try_from(done * 2 * 1_000_000_000 / nanos).unwrap_or(u64::MAX))
}

fn thread_nanos() -> u128 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u128::try_from(time.tv_sec).unwrap_or(0);
    seconds * 1_000_000_000 + u128::try_from(time.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn the_probe_is_quick_and_its_answer_is_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let start = Instant::now();
        let found = cached(dir.path());
        let took = start.elapsed();
        eprintln!("KVM: {found} (took {took:?})");
        // The limit is the vCPU's; the rest is room for a busy machine.
        let most = SETUP_PATIENCE + PATIENCE + KICK_EVERY * KICKS_MAX;
        assert!(took < most + Duration::from_secs(1));
        let start = Instant::now();
        assert_eq!(cached(dir.path()), found);
        assert!(start.elapsed() < took);
    }
}
