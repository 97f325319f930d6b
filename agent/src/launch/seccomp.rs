//! Seccomp: a profile of the specification compiled once for a container, and the program that is then
//! loaded into each of its processes. Runs in the child.
//!
//! Two things are added to what libseccomp makes of the profile, in front of its program. System calls
//! that are newer than the library get the action that the profile names for them. System calls that
//! are newer than everything in the profile fail with ENOSYS, not with the default EPERM: the C library
//! tries an older call after the former and gives up after the latter.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator, LinuxSyscall,
};

use super::{LaunchError, Step};
use crate::sys;

/// Largest program that the kernel takes: BPF_MAXINSNS instructions of 8 bytes, and our flags.
const FILE_MAX: usize = 4 + 4096 * 8;

/// System calls by the number that they have on every architecture since 5.1 (unified numbers).
const NEWER: [(&str, u32); 20] = [
    ("set_mempolicy_home_node", 450),
    ("cachestat", 451),
    ("fchmodat2", 452),
    ("map_shadow_stack", 453),
    ("futex_wake", 454),
    ("futex_wait", 455),
    ("futex_requeue", 456),
    ("statmount", 457),
    ("listmount", 458),
    ("lsm_get_self_attr", 459),
    ("lsm_set_self_attr", 460),
    ("lsm_list_modules", 461),
    ("mseal", 462),
    ("setxattrat", 463),
    ("getxattrat", 464),
    ("listxattrat", 465),
    ("removexattrat", 466),
    ("open_tree_attr", 467),
    ("file_getattr", 468),
    ("file_setattr", 469),
];

/// A compiled filter.
pub(super) struct Program {
    flags: u32,
    instructions: Vec<u8>,
}

impl Program {
    /// Reads what [`compile`] has written.
    pub(super) fn read(file: BorrowedFd<'_>) -> Result<Self, LaunchError> {
        let what = || "read the container's seccomp program".to_owned();
        let file = File::from(file.try_clone_to_owned().step(what)?);
        let mut bytes = vec![0; FILE_MAX];
        let length = file.read_at(&mut bytes, 0).step(what)?;
        bytes.truncate(length);
        let Some((flags, instructions)) = bytes.split_first_chunk::<4>() else {
            return Err(LaunchError::text(
                "The container's seccomp program is empty",
            ));
        };
        Ok(Self {
            flags: u32::from_ne_bytes(*flags),
            instructions: instructions.to_vec(),
        })
    }

    /// Puts this process under it.
    pub(super) fn load(&self) -> Result<(), LaunchError> {
        sys::seccomp_load(&self.instructions, self.flags.into())
            .step(|| "load the seccomp filter".into())
    }
}

/// Compiles a profile; the file holds the program for later processes.
pub(super) fn compile(profile: &LinuxSeccomp) -> Result<(Program, OwnedFd), LaunchError> {
    let rules = profile.syscalls().iter().flatten();
    let mut actions = rules
        .map(LinuxSyscall::action)
        .chain([profile.default_action()]);
    let notifies = actions.any(|a| a == LinuxSeccompAction::ScmpActNotify);
    if profile.listener_path().is_some() || notifies {
        return Err(LaunchError::text("Seccomp listeners are not supported"));
    }
    let what = || "store the seccomp program".to_owned();
    let file = memfd_create(c"seccomp", MFdFlags::MFD_CLOEXEC).step(what)?;
    filter(profile, file.as_fd())
        .map_err(|e| LaunchError::text(format!("failed to compile the seccomp profile: {e}")))?;
    let file = File::from(file);
    let length = file.metadata().step(what)?.len() as usize;
    let mut compiled = vec![0; length.min(FILE_MAX)];
    file.read_exact_at(&mut compiled, 0).step(what)?;

    let program = Program {
        flags: flags(profile),
        instructions: [prelude(profile), compiled].concat(),
    };
    let stored = [&program.flags.to_ne_bytes()[..], &program.instructions].concat();
    file.write_all_at(&stored, 0).step(what)?;
    Ok((program, file.into()))
}

fn flags(profile: &LinuxSeccomp) -> u32 {
    // linux/seccomp.h
    const LOG: u32 = 2;
    const SPEC_ALLOW: u32 = 4;
    let Some(list) = profile.flags() else {
        return SPEC_ALLOW; // what runc does: the mitigation costs much and guards little
    };
    list.iter().fold(0, |flags, flag| {
        flags
            | match flag {
                LinuxSeccompFilterFlag::SeccompFilterFlagLog => LOG,
                LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => SPEC_ALLOW,
                // One thread; no listener.
                LinuxSeccompFilterFlag::SeccompFilterFlagTsync
                | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
            }
    })
}

fn filter(
    profile: &LinuxSeccomp,
    out: BorrowedFd<'_>,
) -> Result<(), libseccomp::error::SeccompError> {
    let default = action(profile.default_action(), profile.default_errno_ret());
    let mut filter = ScmpFilterContext::new(default)?;
    filter.set_ctl_nnp(false)?;
    let _ = filter.set_ctl_optimize(2); // a tree, where the library can: half the comparisons
    for arch in profile.architectures().iter().flatten() {
        // Others cannot run here.
        let arch = match arch {
            Arch::ScmpArchX86_64 => ScmpArch::X8664,
            Arch::ScmpArchX86 => ScmpArch::X86,
            Arch::ScmpArchX32 => ScmpArch::X32,
            _ => continue,
        };
        if !filter.is_arch_present(arch)? {
            filter.add_arch(arch)?;
        }
    }
    for rule in profile.syscalls().iter().flatten() {
        let act = action(rule.action(), rule.errno_ret());
        if act == default {
            continue; // refused by the library, and without effect
        }
        for name in rule.names() {
            let Ok(syscall) = ScmpSyscall::from_name(name) else {
                continue; // not of this library's time: see NEWER
            };
            add(
                &mut filter,
                act,
                syscall,
                rule.args().as_deref().unwrap_or_default(),
            )?;
        }
    }
    filter.export_bpf(out)
}

fn add(
    filter: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    args: &[LinuxSeccompArg],
) -> Result<(), libseccomp::error::SeccompError> {
    let conditions: Vec<_> = args.iter().map(compare).collect();
    let twice = args.iter().enumerate().any(|(n, arg)| {
        args[..n]
            .iter()
            .any(|earlier| earlier.index() == arg.index())
    });
    if conditions.is_empty() {
        filter.add_rule(action, syscall)?;
    } else if twice {
        // The library takes one condition for an argument: several are alternatives, as in runc.
        for condition in conditions {
            filter.add_rule_conditional(action, syscall, &[condition])?;
        }
    } else {
        filter.add_rule_conditional(action, syscall, &conditions)?;
    }
    Ok(())
}

fn compare(arg: &LinuxSeccompArg) -> ScmpArgCompare {
    let (op, value) = match arg.op() {
        LinuxSeccompOperator::ScmpCmpNe => (ScmpCompareOp::NotEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpLt => (ScmpCompareOp::Less, arg.value()),
        LinuxSeccompOperator::ScmpCmpLe => (ScmpCompareOp::LessOrEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpEq => (ScmpCompareOp::Equal, arg.value()),
        LinuxSeccompOperator::ScmpCmpGe => (ScmpCompareOp::GreaterEqual, arg.value()),
        LinuxSeccompOperator::ScmpCmpGt => (ScmpCompareOp::Greater, arg.value()),
        // The mask comes first in the specification's pair.
        LinuxSeccompOperator::ScmpCmpMaskedEq => (
            ScmpCompareOp::MaskedEqual(arg.value()),
            arg.value_two().unwrap_or_default(),
        ),
    };
    ScmpArgCompare::new(u32::try_from(arg.index()).unwrap_or(u32::MAX), op, value)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> ScmpAction {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            ScmpAction::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => ScmpAction::KillProcess,
        LinuxSeccompAction::ScmpActTrap => ScmpAction::Trap,
        LinuxSeccompAction::ScmpActErrno => ScmpAction::Errno((errno & 0xffff) as i32),
        LinuxSeccompAction::ScmpActNotify => ScmpAction::Notify, // refused by compile
        LinuxSeccompAction::ScmpActTrace => ScmpAction::Trace(errno as u16),
        LinuxSeccompAction::ScmpActLog => ScmpAction::Log,
        LinuxSeccompAction::ScmpActAllow => ScmpAction::Allow,
    }
}

/// Instructions in front of the library's (see the head of this file).
fn prelude(profile: &LinuxSeccomp) -> Vec<u8> {
    // linux/filter.h, linux/bpf_common.h, linux/audit.h
    const LOAD_ABSOLUTE: u16 = 0x20;
    const JUMP_EQUAL: u16 = 0x15;
    const JUMP_GREATER: u16 = 0x25;
    const JUMP_BIT: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
    const AUDIT_ARCH_I386: u32 = 0x4000_0003;
    const X32_BIT: u32 = 0x4000_0000;
    const ERRNO: u32 = 0x0005_0000;

    let mut body = Vec::new();
    for rule in profile.syscalls().iter().flatten() {
        for number in rule.names().iter().filter_map(|n| newer(n)) {
            if rule.args().as_ref().is_none_or(Vec::is_empty) {
                body.push((JUMP_EQUAL, 0, 1, number));
                body.push((RETURN, 0, 0, rule.action().as_u32(rule.errno_ret())));
            }
        }
    }
    let denies = !matches!(
        profile.default_action(),
        LinuxSeccompAction::ScmpActAllow
            | LinuxSeccompAction::ScmpActLog
            | LinuxSeccompAction::ScmpActTrace
    );
    if let (true, Some(newest)) = (denies, newest(profile)) {
        body.push((JUMP_GREATER, 0, 1, newest));
        body.push((RETURN, 0, 0, ERRNO | libc::ENOSYS as u32));
    }
    let Ok(skip) = u8::try_from(body.len()) else {
        return Vec::new(); // a profile that repeats itself without end gets no comfort
    };
    if skip == 0 {
        return Vec::new();
    }
    let head = [
        (LOAD_ABSOLUTE, 0, 0, 4), // seccomp_data.arch
        (JUMP_EQUAL, 1, 0, AUDIT_ARCH_X86_64),
        (JUMP_EQUAL, 0, skip.saturating_add(2), AUDIT_ARCH_I386),
        (LOAD_ABSOLUTE, 0, 0, 0), // seccomp_data.nr
        (JUMP_BIT, skip, 0, X32_BIT),
    ];
    let mut bytes = Vec::new();
    for (code, jt, jf, k) in head.into_iter().chain(body) {
        bytes.extend_from_slice(&code.to_ne_bytes());
        bytes.extend_from_slice(&[jt, jf]);
        bytes.extend_from_slice(&k.to_ne_bytes());
    }
    bytes
}

/// Number of a system call that the library does not know.
fn newer(name: &str) -> Option<u32> {
    let (_, number) = NEWER.iter().find(|(n, _)| *n == name)?;
    ScmpSyscall::from_name(name).is_err().then_some(*number)
}

/// The newest system call that the profile mentions, by number.
fn newest(profile: &LinuxSeccomp) -> Option<u32> {
    let names = profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(LinuxSyscall::names);
    names
        .filter_map(|name| {
            let known = ScmpSyscall::from_name(name)
                .ok()
                .map(|s| s.as_raw_syscall());
            known
                .and_then(|n| u32::try_from(n).ok())
                .or_else(|| newer(name))
        })
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn profile(json: serde_json::Value) -> LinuxSeccomp {
        serde_json::from_value(json).expect("a profile")
    }

    #[test]
    fn a_profile_compiles_to_whole_instructions_that_are_read_back() {
        let (program, file) = compile(&profile(serde_json::json!({
        "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
        "syscalls": [
            {"names": ["read", "write", "fchmodat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
        ]})))
        .expect("compiles");
        assert!(!program.instructions.is_empty() && program.instructions.len() % 8 == 0);
        let again = Program::read(file.as_fd()).expect("readable");
        assert_eq!(
            (again.flags, again.instructions),
            (program.flags, program.instructions)
        );
    }

    #[test]
    fn unknown_future_calls_fail_with_enosys_only_where_the_default_denies() {
        let deny = profile(serde_json::json!({"defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}));
        assert_eq!(prelude(&deny).len(), (5 + 2) * 8);
        let allow = profile(serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO"}]}));
        assert!(prelude(&allow).is_empty());
    }

    #[test]
    fn listeners_and_notify_are_refused() {
        for json in [
            serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}),
            serde_json::json!({"defaultAction": "SCMP_ACT_NOTIFY"}),
        ] {
            assert!(compile(&profile(json)).is_err());
        }
    }
}
