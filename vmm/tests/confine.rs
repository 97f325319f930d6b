//! What a confined process cannot do, what is told when it tries, and what it can do without any guest's
//! help. Each case is a process of its own, this program run again; no KVM is needed. `vmm/seen.sh`
//! records what threads with the names of a VMM's do here.
#![expect(clippy::unwrap_used, reason = "a panic is a failed test")]
#![expect(
    unsafe_code,
    reason = "system calls that must not happen, and an end without clean-up"
)]

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::ptr::null_mut;
use std::thread;

use sealpod_vmm::confine::{self, FORBIDDEN, May, Thread};

/// Names the case that a process is.
const CASE: &str = "SEALPOD_TEST_CONFINED";

/// Runs the test of this name again, as a case.
fn run(test: &str, case: &str) -> Output {
    again(test, case).output().unwrap()
}

fn again(test: &str, case: &str) -> Command {
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args([test, "--exact", "--nocapture"]).env(CASE, case);
    again.env_remove("RUST_BACKTRACE");
    again
}

/// Does something in a confined thread that is called as one of its kind, and then ends well.
fn in_thread(kind: &str, work: impl FnOnce() + Send + 'static) -> ! {
    let kind = Thread::ALL.into_iter().find(|k| k.name() == kind).unwrap();
    confine::process().unwrap();
    let confined = move || {
        confine::thread(kind, May::BeSaved).unwrap();
        work();
    };
    let thread = thread::Builder::new().name(kind.name().into());
    match thread.spawn(confined).unwrap().join() {
        Ok(()) => end(0),
        Err(_) => end(1),
    }
}

fn case() -> Option<String> {
    std::env::var(CASE).ok()
}

fn end(status: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

/// Confines this thread as one of a kind, makes a system call, and ends well.
fn confined(kind: Thread, call: &str) -> ! {
    confine::process().unwrap();
    confine::thread(kind, May::BeSaved).unwrap();
    // SAFETY: none of these uses memory of this process; all but the last are forbidden.
    unsafe {
        match call {
            "socket" => libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0),
            "open" => libc::open(c"/".as_ptr(), libc::O_RDONLY),
            "execve" => libc::execv(c"/bin/true".as_ptr(), [std::ptr::null()].as_ptr()),
            "executable" => {
                let access = libc::PROT_READ | libc::PROT_EXEC;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                i32::from(libc::mmap(null_mut(), 4096, access, flags, -1, 0).is_null())
            }
            "terminal" => libc::ioctl(0, libc::TIOCSTI, c"x".as_ptr()),
            _ => libc::getpid(),
        }
    };
    end(0)
}

#[test]
fn a_forbidden_system_call_ends_its_process_alone_and_is_named() {
    const NAME: &str = "a_forbidden_system_call_ends_its_process_alone_and_is_named";
    if let Some(case) = case() {
        let (kind, call) = case.split_once(' ').unwrap();
        let kind = Thread::ALL.into_iter().find(|k| k.name() == kind).unwrap();
        confined(kind, call);
    }
    for kind in Thread::ALL.map(Thread::name) {
        for (call, number) in [
            ("socket", libc::SYS_socket),
            ("open", libc::SYS_openat),
            ("execve", libc::SYS_execve),
            ("executable", libc::SYS_mmap),
            ("terminal", libc::SYS_ioctl),
        ] {
            let output = run(NAME, &format!("{kind} {call}"));
            let told = String::from_utf8_lossy(&output.stderr);
            assert_eq!(
                output.status.code(),
                Some(FORBIDDEN),
                "{kind} {call}: {told}"
            );
            let wanted = format!("System call {number} is not allowed in thread {kind}");
            assert!(told.lines().last().unwrap().contains(&wanted), "{told}");
        }
        let output = run(NAME, &format!("{kind} none"));
        assert!(output.status.success(), "{kind}: {output:?}");
    }
}

#[test]
fn no_path_can_be_opened_and_what_is_open_can_be_used() {
    // SAFETY: asks for the version of Landlock; no pointer is passed.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    if version < 0 {
        eprintln!("SKIPPED: this kernel has no Landlock");
        return;
    }
    // A thread of its own: the others of this program need paths.
    let work = || {
        let mut file = tempfile::tempfile().unwrap();
        confine::process().unwrap();
        for path in ["/", "/dev/null", "/proc/self/status"] {
            let refused = File::open(path).unwrap_err().kind();
            assert_eq!(refused, io::ErrorKind::PermissionDenied, "{path}");
        }
        file.write_all(b"still").unwrap();
    };
    std::thread::spawn(work).join().unwrap();
}

/// Memory in small blocks, in large ones, and in one that grows.
fn use_memory() {
    let small: Vec<Box<[u8; 100]>> = (0..20_000).map(|n| Box::new([n as u8; 100])).collect();
    let mut large = vec![1_u8; 1 << 20];
    large.reserve_exact(64 << 20);
    large.resize(32 << 20, 2);
    assert_eq!(u64::from(small[7][0]) + u64::from(large[9 << 20]), 9);
}

#[test]
fn every_thread_can_use_memory_wait_and_close_whatever_the_allocator_does() {
    const NAME: &str = "every_thread_can_use_memory_wait_and_close_whatever_the_allocator_does";
    if let Some(kind) = case() {
        let file = tempfile::tempfile().unwrap();
        in_thread(&kind, move || {
            use_memory();
            thread::yield_now();
            drop(file);
        });
    }
    for kind in Thread::ALL.map(Thread::name) {
        // Arenas of their own, and one for all threads.
        for arenas in ["8", "1"] {
            let mut again = again(NAME, kind);
            let output = again.env("MALLOC_ARENA_MAX", arenas).output().unwrap();
            assert!(output.status.success(), "{kind} {arenas}: {output:?}");
        }
    }
}

#[test]
fn every_thread_can_say_why_it_panics_and_abort() {
    const NAME: &str = "every_thread_can_say_why_it_panics_and_abort";
    if let Some(case) = case() {
        let (kind, how) = case.split_once(' ').unwrap();
        let how = how.to_owned();
        in_thread(kind, move || match &*how {
            "panic" => panic!("as it should"),
            _ => std::process::abort(),
        });
    }
    for kind in Thread::ALL.map(Thread::name) {
        let output = run(NAME, &format!("{kind} panic"));
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("as it should"), "{kind}: {told}");
        assert_eq!(output.status.code(), Some(1), "{kind}: {told}");
        let output = run(NAME, &format!("{kind} abort"));
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    }
}

#[test]
fn a_confined_thread_of_each_kind_can_log() {
    let test = "a_confined_thread_of_each_kind_can_log";
    if let Some(kind) = case() {
        sealpod_vmm::log::start();
        in_thread(&kind, || tracing::warn!("What a device says"));
    }
    for kind in Thread::ALL {
        let done = run(test, kind.name());
        let said = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(0), "{}: {said}", kind.name());
        assert_eq!(said.trim(), "WARN What a device says", "{}", kind.name());
    }
}
