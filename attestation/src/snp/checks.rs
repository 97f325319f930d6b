//! What an authentic report says, compared with limits and reference values: TCB, guest policy,
//! platform, identity.

use super::report::{GuestPolicy, PlatformInfo, Report};
use super::verify::{SnpLimits, SnpPolicy};
use super::{Product, Tcb};
use crate::encoding::hex;
use crate::verdict::Checks;

pub(super) fn tcb(checks: &mut Checks, report: &Report<'_>, product: Product, limits: &SnpLimits) {
    let decode = |bytes| Tcb::from_bytes(bytes, product);
    let [Some(reported), Some(current), Some(committed), Some(launch)] = [
        report.reported_tcb,
        report.current_tcb,
        report.committed_tcb,
        report.launch_tcb,
    ]
    .map(decode) else {
        checks.fail(
            "tcb-layout",
            format!("TCB layout of {product}"),
            "reserved bytes are set",
        );
        return;
    };
    checks.require(
        "tcb-reported-not-above-current",
        current.at_least(&reported),
        format!("at most {current}"),
        reported,
    );
    if limits.allow_provisional_firmware {
        checks.require(
            "tcb-committed",
            current.at_least(&committed),
            format!("at most {current}"),
            committed,
        );
    } else {
        checks.require("tcb-committed", committed == current, current, committed);
        let (now, then) = (report.current_version, report.committed_version);
        let text =
            |v: super::report::FirmwareVersion| format!("{}.{}.{}", v.major, v.minor, v.build);
        checks.require("firmware-committed", now == then, text(now), text(then));
    }
    match &limits.minimum_tcb {
        Some(minimum) => {
            checks.require(
                "tcb-minimum",
                reported.at_least(minimum),
                format!("at least {minimum}"),
                reported,
            );
            checks.require(
                "tcb-launch-minimum",
                launch.at_least(minimum),
                format!("at least {minimum}"),
                launch,
            );
        }
        None => checks.not_checked("tcb-minimum", "no minimum given", reported),
    }
    let version = report.committed_version;
    let found = (version.major, version.minor, version.build);
    let text = |v: (u8, u8, u8)| format!("{}.{}.{}", v.0, v.1, v.2);
    checks.require(
        "firmware-minimum",
        found >= limits.minimum_firmware,
        format!("at least {}", text(limits.minimum_firmware)),
        text(found),
    );
}

pub(super) fn guest_policy(checks: &mut Checks, report: &Report<'_>, limits: &SnpLimits) {
    let policy = report.policy;
    checks.require(
        "policy-reserved",
        policy.has(GuestPolicy::RESERVED_ONE),
        "bit 17 set",
        format!("0x{:x}", policy.0),
    );
    checks.require(
        "policy-known-bits",
        policy.unknown() == 0,
        "no unknown bit",
        format!("unknown 0x{:x}", policy.unknown()),
    );
    let mut forbid = |name: &str, forbidden: bool, bit: u64| {
        let set = policy.has(bit);
        checks.require(
            name,
            !forbidden || !set,
            if forbidden { "off" } else { "on or off" },
            if set { "on" } else { "off" },
        );
    };
    forbid("policy-debug", !limits.allow_debug, GuestPolicy::DEBUG);
    forbid(
        "policy-migration-agent",
        !limits.allow_migration_agent,
        GuestPolicy::MIGRATE_MA,
    );
    forbid("policy-smt", limits.forbid_smt, GuestPolicy::SMT);
    forbid("policy-cxl", limits.forbid_cxl, GuestPolicy::CXL);
    let mut demand = |name: &str, demanded: bool, bit: u64| {
        let set = policy.has(bit);
        checks.require(
            name,
            !demanded || set,
            if demanded { "on" } else { "on or off" },
            if set { "on" } else { "off" },
        );
    };
    demand(
        "policy-single-socket",
        limits.require_single_socket,
        GuestPolicy::SINGLE_SOCKET,
    );
    demand(
        "policy-aes-256-xts",
        limits.require_aes_256_xts,
        GuestPolicy::MEM_AES_256_XTS,
    );
    demand(
        "policy-rapl-disabled",
        limits.require_rapl_disabled,
        GuestPolicy::RAPL_DISABLED,
    );
    demand(
        "policy-ciphertext-hiding",
        limits.require_ciphertext_hiding,
        GuestPolicy::CIPHERTEXT_HIDING,
    );
    demand(
        "policy-page-swap-disabled",
        limits.require_page_swap_disabled,
        GuestPolicy::PAGE_SWAP_DISABLED,
    );
    let (abi, minimum) = (policy.abi(), limits.minimum_abi);
    checks.require(
        "policy-abi",
        abi >= minimum,
        format!("at least {}.{}", minimum.0, minimum.1),
        format!("{}.{}", abi.0, abi.1),
    );
}

pub(super) fn platform(checks: &mut Checks, report: &Report<'_>, limits: &SnpLimits) {
    let platform = report.platform_info;
    // A machine that does what the guest's policy forbids would not have started the guest.
    let smt = platform.has(PlatformInfo::SMT);
    let allowed = report.policy.has(GuestPolicy::SMT);
    checks.require(
        "platform-smt",
        allowed || !smt,
        if allowed { "on or off" } else { "off" },
        if smt { "on" } else { "off" },
    );
    let alias = platform.has(PlatformInfo::ALIAS_CHECK);
    let expected = if limits.require_alias_check {
        "done"
    } else {
        "done or not"
    };
    checks.require(
        "platform-alias-check",
        alias || !limits.require_alias_check,
        expected,
        if alias { "done" } else { "not done" },
    );
    let required = limits.required_mitigations;
    match report.mitigations {
        Some((launch, current)) => {
            let ok = launch & required == required && current & required == required;
            checks.require(
                "mitigations",
                ok,
                format!("at least 0x{required:x}"),
                format!("launch 0x{launch:x}, current 0x{current:x}"),
            );
        }
        None => {
            let found = format!("none in version {}", report.version);
            checks.require(
                "mitigations",
                required == 0,
                format!("at least 0x{required:x}"),
                found,
            );
        }
    }
}

pub(super) fn identity(checks: &mut Checks, report: &Report<'_>, policy: &SnpPolicy) {
    match policy.limits.vmpl {
        Some(vmpl) => {
            checks.require("vmpl", report.vmpl == vmpl, vmpl, report.vmpl);
        }
        // A report asked for by the host has VMPL 0xffffffff, and its REPORT_DATA is the host's.
        None => {
            checks.require("vmpl", report.vmpl <= 3, "0 to 3", report.vmpl);
        }
    }
    let svn = report.guest_svn;
    checks.require(
        "guest-svn",
        svn >= policy.limits.minimum_guest_svn,
        format!("at least {}", policy.limits.minimum_guest_svn),
        svn,
    );
    checks.compare(
        "report-data",
        policy.report_data.as_ref(),
        &report.report_data,
        |d| hex(d),
    );
    checks.compare(
        "host-data",
        policy.host_data.as_ref(),
        &report.host_data,
        |d| hex(d),
    );
    if policy.measurements.is_empty() {
        checks.not_checked(
            "measurement",
            "no reference value given",
            hex(&report.measurement),
        );
    } else {
        let expected = policy
            .measurements
            .iter()
            .map(|m| hex(m))
            .collect::<Vec<_>>()
            .join(" or ");
        checks.require(
            "measurement",
            policy.measurements.contains(&report.measurement),
            expected,
            hex(&report.measurement),
        );
    }
    if policy.id_key_digest.is_some() {
        checks.compare(
            "id-key-digest",
            policy.id_key_digest.as_ref(),
            &report.id_key_digest,
            |d| hex(d),
        );
    }
    if policy.author_key_digest.is_some() {
        checks.compare(
            "author-key-digest",
            policy.author_key_digest.as_ref(),
            &report.author_key_digest,
            |d| hex(d),
        );
    }
    if !policy.limits.allow_migration_agent {
        let none = report.report_id_ma == [0xff; 32];
        checks.require(
            "migration-agent",
            none,
            "no REPORT_ID_MA",
            hex(&report.report_id_ma),
        );
    }
    if !policy.chip_ids.is_empty() {
        let expected = format!("one of {} allowed chips", policy.chip_ids.len());
        checks.require(
            "chip-allowed",
            policy.chip_ids.contains(&report.chip_id),
            expected,
            hex(&report.chip_id),
        );
    }
}
