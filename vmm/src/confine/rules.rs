//! Which system calls each kind of thread may make once it is confined, and why. Tables only.
//!
//! A rule stands for a call that a test was seen to need: VM tests in the lab (`seen.txt`), or tests that
//! need no VM (`seen-here.txt`); `vmm/seen.sh` makes both. A test keeps tables and records together: what
//! nobody needs is not here.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::{May, Thread};

/// A system call that is allowed.
struct Rule {
    call: c_long,
    /// As people and strace call it.
    #[cfg_attr(not(test), expect(dead_code, reason = "for the test of the tables"))]
    name: &'static str,
    only: Only,
}

/// Which of its uses.
enum Only {
    /// All.
    Any,
    /// Those whose argument of this number is one of these.
    One(u8, &'static [u64]),
    /// Those whose argument of this number has none of these bits.
    Without(u8, u64),
}

/// `rule!(call)`, or `rule!(call, only)`.
macro_rules! rule {
    ($call:ident) => {
        rule!($call, Only::Any)
    };
    ($call:ident, $only:expr) => {
        Rule {
            call: libc::$call,
            name: stringify!($call),
            only: $only,
        }
    };
}

// ioctl numbers (linux/kvm.h, linux/if_tun.h, asm-generic/ioctls.h), x86-64.
const KVM_RUN: u64 = 0xae80;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const KVM_GET_MSR_INDEX_LIST: u64 = 0xc004_ae02;
const KVM_GET_IRQCHIP: u64 = 0xc208_ae62;
const KVM_GET_CLOCK: u64 = 0x8030_ae7c;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_GET_MSRS: u64 = 0xc008_ae88;
const KVM_GET_LAPIC: u64 = 0x8400_ae8e;
const KVM_GET_CPUID2: u64 = 0xc008_ae91;
const KVM_GET_MP_STATE: u64 = 0x8004_ae98;
const KVM_GET_VCPU_EVENTS: u64 = 0x8040_ae9f;
const KVM_GET_DEBUGREGS: u64 = 0x8080_aea1;
const KVM_GET_TSC_KHZ: u64 = 0xaea3;
const KVM_GET_XSAVE: u64 = 0x9000_aea4;
const KVM_GET_XCRS: u64 = 0x8188_aea6;
// fcntl commands.
const F_GETFD: u64 = libc::F_GETFD as u64;
const F_SETFD: u64 = libc::F_SETFD as u64;
const F_GETFL: u64 = libc::F_GETFL as u64;
const F_SETFL: u64 = libc::F_SETFL as u64;
const F_DUPFD: u64 = libc::F_DUPFD_CLOEXEC as u64;

const NOT_EXECUTABLE: Only = Only::Without(2, libc::PROT_EXEC as u64);

/// Every thread: memory, locks, eventfds, descriptors, its end.
const ALL: &[Rule] = &[
    // Locks; channels wait by yielding for a sender that is in the middle of it.
    rule!(SYS_futex),
    rule!(SYS_sched_yield),
    // The allocator: large blocks, which move when they grow, and arenas, the first of which threads may
    // share.
    rule!(SYS_mmap, NOT_EXECUTABLE),
    rule!(SYS_munmap),
    rule!(SYS_mprotect, NOT_EXECUTABLE),
    rule!(SYS_mremap),
    rule!(SYS_brk),
    // The allocator; the balloon.
    rule!(SYS_madvise),
    // Eventfds; the console; last words.
    rule!(SYS_read),
    rule!(SYS_write),
    // Devices that are given up.
    rule!(SYS_close),
    // A thread's or the process' end, also an abort's.
    rule!(SYS_exit_group),
    rule!(SYS_exit),
    rule!(SYS_sigaltstack),
    rule!(SYS_rt_sigprocmask),
    rule!(SYS_getpid),
    rule!(SYS_gettid),
];

/// A virtual processor: the guest, and devices when their driver comes up or goes.
const VCPU: &[Rule] = &[
    // The guest; what a network driver accepted; where the processor stands, when somebody asks.
    rule!(
        SYS_ioctl,
        Only::One(
            1,
            &[
                KVM_RUN,
                TUNSETOFFLOAD,
                KVM_GET_MP_STATE,
                KVM_GET_REGS,
                KVM_GET_LAPIC,
                KVM_GET_MSRS,
                KVM_GET_VCPU_EVENTS,
            ]
        )
    ),
    // After the signal that takes it out of the guest.
    rule!(SYS_rt_sigreturn),
    // Tells a vhost-user daemon of queues, and hears its answers.
    rule!(SYS_sendmsg),
    rule!(SYS_recvmsg),
    // A queue's eventfds go to the daemon as copies.
    rule!(SYS_fcntl, Only::One(1, &[F_GETFD, F_DUPFD])),
    // Has the devices' thread wait for a queue.
    rule!(SYS_epoll_ctl),
    // Abort.
    rule!(SYS_tgkill, Only::One(2, &[libc::SIGABRT as u64])),
];

/// The devices.
const DEVICES: &[Rule] = &[
    rule!(SYS_epoll_wait),
    // Disks: requests, flushes, discards, zeroing, and zeroing where the disk cannot do it.
    rule!(SYS_preadv),
    rule!(SYS_pwritev),
    rule!(SYS_fdatasync),
    rule!(SYS_fallocate),
    rule!(SYS_pwrite64),
    // Several requests at once, by a ring that can do nothing but read and write.
    rule!(SYS_io_uring_enter),
    // Whoever drops a device last closes what it had, and looks first whether that is open.
    #[cfg(debug_assertions)]
    rule!(SYS_fcntl, Only::One(1, &[F_GETFD])),
    // Taps.
    rule!(SYS_readv),
    rule!(SYS_writev),
    // Abort.
    rule!(SYS_tgkill, Only::One(2, &[libc::SIGABRT as u64])),
];

/// What the shim asks for, devices that come later, the end.
const MAIN: &[Rule] = &[
    rule!(SYS_epoll_wait),
    rule!(SYS_epoll_ctl),
    // The shim's requests, and descriptors; a share's daemon, and the vsock engine of a machine that is saved.
    rule!(SYS_recvfrom),
    rule!(SYS_sendto),
    rule!(SYS_recvmsg),
    rule!(SYS_sendmsg),
    // How long the daemon of a share that comes later may take.
    rule!(
        SYS_setsockopt,
        Only::One(2, &[libc::SO_RCVTIMEO as u64, libc::SO_SNDTIMEO as u64])
    ),
    // A tap's headers; how interrupts stand, when somebody asks.
    rule!(SYS_ioctl, Only::One(1, &[TUNSETVNETHDRSZ, KVM_GET_IRQCHIP])),
    rule!(
        SYS_fcntl,
        Only::One(1, &[F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD])
    ),
    // What kind of disk, and how large.
    rule!(SYS_statx),
    rule!(SYS_lseek),
    // Takes processors out of the guest; abort.
    rule!(SYS_tgkill, Only::One(2, &[KICK, libc::SIGABRT as u64])),
];

/// A virtual processor that may be written down: reads the rest of what KVM knows of it.
const VCPU_SAVED: &[Rule] = &[rule!(
    SYS_ioctl,
    Only::One(
        1,
        &[
            KVM_GET_SREGS,
            KVM_GET_XSAVE,
            KVM_GET_XCRS,
            KVM_GET_DEBUGREGS,
            KVM_GET_TSC_KHZ,
            KVM_GET_CPUID2,
        ]
    )
)];

/// Writes the rest of a machine that may be written down, and its memory, into open files.
const MAIN_SAVED: &[Rule] = &[
    rule!(
        SYS_ioctl,
        Only::One(1, &[KVM_GET_MSR_INDEX_LIST, KVM_GET_CLOCK])
    ),
    rule!(SYS_pwrite64),
    rule!(SYS_ftruncate),
    rule!(SYS_fsync),
];

/// `SIGRTMIN` as glibc has it: the first two real-time signals are its own.
const KICK: u64 = 34;

fn rules(kind: Thread) -> impl Iterator<Item = &'static Rule> {
    let own = match kind {
        Thread::Main => MAIN,
        Thread::Devices => DEVICES,
        Thread::Vcpu => VCPU,
    };
    ALL.iter().chain(own)
}

/// What a machine that may be saved needs beyond that: calls of its own, and more uses of others.
fn saved(kind: Thread, may: May) -> &'static [Rule] {
    match (may, kind) {
        (May::BeSaved, Thread::Main) => MAIN_SAVED,
        (May::BeSaved, Thread::Vcpu) => VCPU_SAVED,
        (May::BeSaved, Thread::Devices) | (May::Run, _) => &[],
    }
}

/// The rules of a kind of thread as a filter takes them.
pub(super) fn filter(
    kind: Thread,
    may: May,
) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut filter: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for rule in rules(kind).chain(saved(kind, may)) {
        let conditions = conditions(&rule.only)?;
        filter.entry(rule.call).or_default().extend(conditions);
    }
    Ok(filter)
}

/// One of them must hold; none: always.
fn conditions(only: &Only) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    // Commands, protections and signals are ints; the kernel ignores what is above.
    let holds = |argument, operator, value| {
        let length = SeccompCmpArgLen::Dword;
        SeccompRule::new(vec![SeccompCondition::new(
            argument, length, operator, value,
        )?])
    };
    match *only {
        Only::Any => Ok(Vec::new()),
        Only::One(argument, values) => (values.iter())
            .map(|value| holds(argument, SeccompCmpOp::Eq, *value))
            .collect(),
        Only::Without(argument, bits) => {
            Ok(vec![holds(argument, SeccompCmpOp::MaskedEq(bits), 0)?])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// Each line: thread, call, and the command of an ioctl.
    const SEEN: [&str; 2] = [include_str!("seen.txt"), include_str!("seen-here.txt")];

    fn seen(kind: Thread) -> BTreeSet<(&'static str, Option<u64>)> {
        let lines = SEEN
            .into_iter()
            .flat_map(str::lines)
            .filter(|line| !line.starts_with('#'));
        let of_kind = lines.filter_map(|line| line.strip_prefix(kind.name())?.strip_prefix(' '));
        let words = of_kind.map(|line| match line.split_once(" 0x") {
            Some((call, command)) => (call, u64::from_str_radix(command, 16).ok()),
            None => (line, None),
        });
        words.collect()
    }

    #[test]
    fn every_rule_was_seen_in_use() {
        for kind in Thread::ALL {
            let seen = seen(kind);
            let somebody: BTreeSet<_> = Thread::ALL.into_iter().flat_map(self::seen).collect();
            for rule in rules(kind).chain(saved(kind, May::BeSaved)) {
                let name = &rule.name["SYS_".len()..];
                let shared = ALL.iter().any(|all| all.call == rule.call);
                let used = if shared { &somebody } else { &seen };
                let used = used.iter().any(|(call, _)| *call == name);
                assert!(used, "{} may {name}, and nothing does", kind.name());
                if let (Only::One(1, commands), "ioctl") = (&rule.only, name) {
                    for command in *commands {
                        assert!(seen.contains(&(name, Some(*command))), "{command:#x}");
                    }
                }
            }
        }
    }

    #[test]
    fn what_was_seen_is_allowed_and_no_call_has_two_rules() {
        for kind in Thread::ALL {
            let calls: Vec<_> = rules(kind).map(|rule| rule.name).collect();
            let names: BTreeSet<_> = calls.iter().map(|name| &name["SYS_".len()..]).collect();
            assert_eq!(names.len(), calls.len(), "{}", kind.name());
            let seen = seen(kind);
            assert!(!seen.is_empty());
            let all = || rules(kind).chain(saved(kind, May::BeSaved));
            for (call, command) in seen {
                let mut of_call = all().filter(|rule| &rule.name["SYS_".len()..] == call);
                let allowed = of_call.any(|rule| match (command, &rule.only) {
                    (Some(command), Only::One(1, commands)) => commands.contains(&command),
                    _ => true,
                });
                assert!(allowed, "{} does {call} {command:x?}", kind.name());
            }
        }
    }

    #[test]
    fn a_vcpu_may_make_25_calls_at_most_and_others_45() {
        let count = |kind| filter(kind, May::BeSaved).unwrap().len();
        let counts = Thread::ALL.map(count);
        eprintln!("main, devices, vcpu: {counts:?}");
        assert!(count(Thread::Vcpu) <= 25, "{counts:?}");
        assert!(counts.iter().all(|count| *count <= 45), "{counts:?}");
    }

    #[test]
    fn the_signal_that_interrupts_processors_is_the_one_that_is_allowed() {
        assert_eq!(KICK, libc::SIGRTMIN() as u64);
    }
}
