//! Which devices a container may use: its rules as a BPF program on its cgroup (there is no device
//! controller in cgroup v2). Building the program is pure; attaching it is two system calls.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::sys;

// linux/bpf.h: BPF_DEVCG_*
const TYPE_BLOCK: u32 = 1;
const TYPE_CHAR: u32 = 2;
const ACCESS_MKNOD: u32 = 1;
const ACCESS_READ: u32 = 2;
const ACCESS_WRITE: u32 = 4;
const ACCESS_ALL: u32 = 7;

/// More rules than this are refused: the program would be too long for the kernel.
const RULES_MAX: usize = 4096;

/// A rule; the last that matches decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

/// What every container may use, after its own rules (as its specification expects of a runtime): the
/// default devices, terminals, and making any node.
fn always() -> [Rule; 11] {
    let device = |major, minor: Option<u32>| Rule {
        allow: true,
        kind: Some(TYPE_CHAR),
        major: Some(major),
        minor,
        access: ACCESS_ALL,
    };
    let make = |kind| Rule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        access: ACCESS_MKNOD,
    };
    [
        make(TYPE_CHAR),
        make(TYPE_BLOCK),
        device(1, Some(3)), // null
        device(1, Some(5)), // zero
        device(1, Some(7)), // full
        device(1, Some(8)), // random
        device(1, Some(9)), // urandom
        device(5, Some(0)), // tty
        device(5, Some(1)), // console
        device(5, Some(2)), // ptmx
        device(136, None),  // pts
    ]
}

fn rule(device: &LinuxDeviceCgroup) -> Rule {
    let number = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
    let access = device.access().as_deref().unwrap_or("rwm");
    Rule {
        allow: device.allow(),
        kind: match device.typ() {
            Some(LinuxDeviceType::B) => Some(TYPE_BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(TYPE_CHAR),
            Some(LinuxDeviceType::A | LinuxDeviceType::P) | None => None,
        },
        major: number(device.major()),
        minor: number(device.minor()),
        access: access.bytes().fold(0, |bits, b| {
            bits | match b {
                b'r' => ACCESS_READ,
                b'w' => ACCESS_WRITE,
                b'm' => ACCESS_MKNOD,
                _ => 0,
            }
        }),
    }
}

/// An attached program.
#[derive(Debug)]
pub struct DeviceFilter(OwnedFd);

impl DeviceFilter {
    /// Attaches the rules to a cgroup, in place of those before.
    ///
    /// # Errors
    /// `E2BIG` for more than 4096 rules; what the kernel says.
    pub fn attach(
        cgroup: BorrowedFd<'_>,
        rules: &[LinuxDeviceCgroup],
        before: Option<&Self>,
    ) -> nix::Result<Self> {
        Self::load(cgroup, rules, &always(), before)
    }

    /// The same without the devices that every container may use.
    ///
    /// # Errors
    /// As [`Self::attach`].
    pub fn attach_exactly(
        cgroup: BorrowedFd<'_>,
        rules: &[LinuxDeviceCgroup],
        before: Option<&Self>,
    ) -> nix::Result<Self> {
        Self::load(cgroup, rules, &[], before)
    }

    fn load(
        cgroup: BorrowedFd<'_>,
        rules: &[LinuxDeviceCgroup],
        last: &[Rule],
        before: Option<&Self>,
    ) -> nix::Result<Self> {
        if rules.len() > RULES_MAX {
            return Err(nix::errno::Errno::E2BIG);
        }
        let rules: Vec<_> = rules.iter().map(rule).chain(last.iter().copied()).collect();
        let program = sys::bpf_load_device_program(&program(&rules))?;
        let replace = before.map(|b| b.0.as_fd());
        sys::bpf_attach_device(cgroup, program.as_fd(), replace)?;
        Ok(Self(program))
    }
}

/// One BPF instruction (linux/bpf.h, `struct bpf_insn`).
fn instruction(code: u8, dst: u8, src: u8, offset: i16, value: i32) -> u64 {
    u64::from(code)
        | u64::from(dst) << 8
        | u64::from(src) << 12
        | u64::from(offset as u16) << 16
        | u64::from(value as u32) << 32
}

/// The program: rules from the last to the first, the first that matches returns. No match: denied.
///
/// A rule that allows matches when it covers all of the access that is asked for; one that denies, when
/// it covers any of it.
fn program(rules: &[Rule]) -> Vec<u64> {
    const LOAD32: u8 = 0x61; // dst = *(u32 *)(src + offset)
    const MOVE: u8 = 0xb7; // dst = value
    const MOVE_REG: u8 = 0xbf;
    const AND32: u8 = 0x54;
    const SHIFT_RIGHT32: u8 = 0x74;
    const JUMP_NOT_EQUAL: u8 = 0x55;
    const JUMP_EQUAL: u8 = 0x15;
    const EXIT: u8 = 0x95;
    // struct bpf_cgroup_dev_ctx: access_type (access << 16 | type), major, minor
    let mut all = vec![
        instruction(LOAD32, 2, 1, 0, 0),
        instruction(AND32, 2, 0, 0, 0xffff), // r2: type
        instruction(LOAD32, 3, 1, 0, 0),
        instruction(SHIFT_RIGHT32, 3, 0, 0, 16), // r3: access
        instruction(LOAD32, 4, 1, 4, 0),         // r4: major
        instruction(LOAD32, 5, 1, 8, 0),         // r5: minor
    ];
    for rule in rules.iter().rev() {
        let mut tests: Vec<(u8, u8, i32)> = Vec::new();
        for (register, wanted) in [(2, rule.kind), (4, rule.major), (5, rule.minor)] {
            tests.extend(wanted.map(|value| (JUMP_NOT_EQUAL, register, value as i32)));
        }
        // Jumps lead past the rule's return: count what follows each.
        let access: &[u64] = match (rule.access, rule.allow) {
            (ACCESS_ALL, _) => &[],
            (access, true) => &[
                instruction(MOVE_REG, 0, 3, 0, 0),
                instruction(AND32, 0, 0, 0, !(access as i32) & ACCESS_ALL as i32),
                instruction(JUMP_NOT_EQUAL, 0, 0, 2, 0),
            ],
            (access, false) => &[
                instruction(MOVE_REG, 0, 3, 0, 0),
                instruction(AND32, 0, 0, 0, access as i32),
                instruction(JUMP_EQUAL, 0, 0, 2, 0),
            ],
        };
        let count = tests.len();
        for (n, (code, register, value)) in tests.into_iter().enumerate() {
            let past = (count - n - 1) + access.len() + 2;
            all.push(instruction(code, register, 0, past as i16, value));
        }
        all.extend_from_slice(access);
        all.push(instruction(MOVE, 0, 0, 0, rule.allow.into()));
        all.push(instruction(EXIT, 0, 0, 0, 0));
        if count == 0 && access.is_empty() {
            return all; // matches everything: the verifier refuses code that cannot be reached
        }
    }
    all.push(instruction(MOVE, 0, 0, 0, 0));
    all.push(instruction(EXIT, 0, 0, 0, 0));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a program as the kernel would, for the instructions that it uses.
    fn allowed(program: &[u64], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0_u64; 6];
        let mut at = 0;
        loop {
            let word = program[at];
            let (dst, src) = ((word >> 8 & 0xf) as usize, (word >> 12 & 0xf) as usize);
            let offset = (word >> 16) as u16 as i16;
            let value = (word >> 32) as u32 as i32 as i64 as u64;
            at += 1;
            match word as u8 {
                0x61 => registers[dst] = context[offset as usize / 4].into(),
                0xb7 => registers[dst] = value,
                0xbf => registers[dst] = registers[src],
                0x54 => registers[dst] &= value & 0xffff_ffff,
                0x74 => registers[dst] >>= value,
                0x55 if registers[dst] != value => at += offset as usize,
                0x15 if registers[dst] == value => at += offset as usize,
                0x55 | 0x15 => {}
                0x95 => return registers[0] == 1,
                other => panic!("unexpected instruction {other:#x}"),
            }
        }
    }

    fn rules(json: serde_json::Value) -> Vec<Rule> {
        let list: Vec<LinuxDeviceCgroup> = serde_json::from_value(json).expect("rules");
        list.iter().map(rule).chain(always()).collect()
    }

    #[test]
    fn a_container_gets_its_devices_and_the_default_ones_only() {
        let p = program(&rules(serde_json::json!([
            {"allow": false, "access": "rwm"},
            {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"},
            {"allow": true, "type": "b", "major": 254, "access": "r"},
        ])));
        let read_write = ACCESS_READ | ACCESS_WRITE;
        assert!(allowed(&p, TYPE_CHAR, read_write, 10, 229));
        assert!(!allowed(&p, TYPE_CHAR, read_write, 10, 228));
        assert!(allowed(&p, TYPE_BLOCK, ACCESS_READ, 254, 3));
        assert!(!allowed(&p, TYPE_BLOCK, read_write, 254, 3));
        assert!(allowed(&p, TYPE_CHAR, read_write, 1, 3));
        assert!(allowed(&p, TYPE_CHAR, read_write, 136, 7));
        assert!(allowed(&p, TYPE_BLOCK, ACCESS_MKNOD, 8, 0));
        assert!(!allowed(&p, TYPE_BLOCK, ACCESS_READ, 8, 0));
    }

    #[test]
    fn privileged_containers_get_everything() {
        let p = program(&rules(
            serde_json::json!([{"allow": true, "access": "rwm"}]),
        ));
        assert!(allowed(&p, TYPE_BLOCK, ACCESS_ALL, 8, 0));
    }

    #[test]
    fn without_rules_nothing_but_the_defaults_is_allowed() {
        let p = program(&rules(serde_json::json!([])));
        assert!(!allowed(&p, TYPE_CHAR, ACCESS_READ, 10, 1));
        assert!(allowed(&p, TYPE_CHAR, ACCESS_READ, 1, 9));
    }
}
