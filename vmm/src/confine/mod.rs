//! What a VMM gives up before its guest runs, so that whoever breaks into it from the guest has little:
//! no path of the host (Landlock), no core file, and in each thread the few system calls it is known to need
//! (seccomp). Knows threads and system calls, no devices. What another system call costs is the VM.
//!
//! ```text
//!  set up ── process() ──▶ no paths ── each thread: thread(kind) ──▶ its calls only ──▶ the guest may run
//! ```
//! Nothing leads back. Where a step fails there is no guest.

#![expect(
    unsafe_code,
    reason = "limits, signals and Landlock have no safe interface"
)]

mod landlock;
mod rules;

use std::cell::Cell;
use std::io;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Exit status of a process that made a system call it may not make: that of a `SIGSYS`.
pub const FORBIDDEN: i32 = 128 + libc::SIGSYS;

/// A kind of thread, by what it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Serves the shim, plugs devices, sees to the end.
    Main,
    /// Serves devices: disks, or all others.
    Devices,
    /// Runs a virtual processor.
    Vcpu,
}

impl Thread {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Main, Self::Devices, Self::Vcpu];

    /// What it is called in messages and in `seen.txt`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::Devices => "devices",
            Self::Vcpu => "vcpu",
        }
    }
}

/// What a confined machine may still have done to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum May {
    /// To run.
    Run,
    /// And to be written down: a template, which is nobody's pod.
    BeSaved,
}

/// Why there is no confinement, and so no guest.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused something.
    #[error("Cannot {what}")]
    Refused {
        /// What was wanted, after "cannot".
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// The filter of a thread could not be made or installed.
    #[error("Cannot filter the system calls of thread {thread}")]
    Filter {
        /// Which thread.
        thread: &'static str,
        /// What is wrong.
        source: seccompiler::Error,
    },
}

impl Error {
    fn last(what: &'static str) -> Self {
        let source = io::Error::last_os_error();
        Self::Refused { what, source }
    }
}

thread_local! {
    /// What [`tell_forbidden`] calls the thread. Has no destructor, and is set before it is read.
    static KIND: Cell<&'static str> = const { Cell::new("?") };
}

/// Takes paths, core files and locked memory from the calling thread and those that it starts from now
/// on, and has a forbidden system call told. Everything that has a path must be open by now.
///
/// # Errors
/// [`Error::Refused`]. A kernel without Landlock is no error.
pub fn process() -> Result<(), Error> {
    for (limit, what) in [
        (libc::RLIMIT_CORE, "do without core files"),
        (libc::RLIMIT_MEMLOCK, "do without locked memory"),
    ] {
        let none = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: `none` is a limit that outlives the call; the kernel only reads it.
        if unsafe { libc::setrlimit(limit, &raw const none) } != 0 {
            return Err(Error::last(what));
        }
    }
    handle_forbidden()?;
    landlock::deny_paths()
}

/// Lets the calling thread make the system calls of its kind only, for good.
///
/// # Errors
/// [`Error::Filter`]; the thread must not go on then.
pub fn thread(kind: Thread, may: May) -> Result<(), Error> {
    KIND.set(kind.name());
    let install = || seccompiler::apply_filter(&program(kind, may)?);
    install().map_err(|source| Error::Filter {
        thread: kind.name(),
        source,
    })
}

fn program(kind: Thread, may: May) -> seccompiler::Result<BpfProgram> {
    let rules = rules::filter(kind, may)?;
    // A trap and not a kill: what was forbidden is told before the process ends.
    let other = SeccompAction::Trap;
    let filter = SeccompFilter::new(rules, other, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(BpfProgram::try_from(filter)?)
}

fn handle_forbidden() -> Result<(), Error> {
    let handler: extern "C" fn(libc::c_int, *const Forbidden) = tell_forbidden;
    // SAFETY: a zeroed sigaction is valid; the handler makes two system calls and returns never.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut())
    };
    match result {
        0 => Ok(()),
        _ => Err(Error::last("handle forbidden system calls")),
    }
}

/// `siginfo_t` of a `SIGSYS` (sigaction(2)), x86-64.
#[repr(C)]
struct Forbidden {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: u64,
    call: libc::c_int,
    arch: libc::c_uint,
}
const _: () = assert!(std::mem::offset_of!(Forbidden, call) == 24);

/// Says which system call was forbidden, and ends the process. The call was not made.
extern "C" fn tell_forbidden(_: libc::c_int, info: *const Forbidden) {
    // SAFETY: the kernel hands a handler with SA_SIGINFO a siginfo_t; that of SIGSYS is so laid out.
    let call = unsafe { (*info).call };
    let mut line = Line::default();
    line.text("sealpod-vmm: System call ");
    line.number(call.unsigned_abs());
    line.text(" is not allowed in thread ");
    line.text(KIND.get());
    line.text("\n");
    // SAFETY: `line` outlives the call; both are what a signal handler may do.
    unsafe {
        libc::write(2, line.bytes.as_ptr().cast(), line.used);
        libc::_exit(FORBIDDEN);
    }
}

/// A line put together without allocating.
struct Line {
    bytes: [u8; 160],
    used: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 160],
            used: 0,
        }
    }
}

impl Line {
    /// What does not fit is left out.
    fn text(&mut self, text: &str) {
        for (to, from) in self.bytes[self.used..].iter_mut().zip(text.bytes()) {
            *to = from;
            self.used += 1;
        }
    }

    fn number(&mut self, number: u32) {
        let (mut digits, mut at, mut rest) = ([b'0'; 10], 10, number);
        while rest > 0 || at == 10 {
            at -= 1;
            digits[at] += (rest % 10) as u8;
            rest /= 10;
        }
        self.text(std::str::from_utf8(&digits[at..]).unwrap_or("?"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_its_numbers_and_never_more_than_fits() {
        let mut line = Line::default();
        for number in [0, 7, 41, u32::MAX] {
            line.number(number);
            line.text(" ");
        }
        assert_eq!(&line.bytes[..line.used], b"0 7 41 4294967295 ");
        line.text(&"x".repeat(500));
        assert_eq!(line.used, line.bytes.len());
    }

    #[test]
    fn every_thread_has_a_filter() {
        for kind in Thread::ALL {
            let run = program(kind, May::Run).unwrap();
            let saved = program(kind, May::BeSaved).unwrap();
            assert!(!run.is_empty() && saved.len() >= run.len());
        }
    }
}
