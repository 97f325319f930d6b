//! What an authentic quote says, compared with limits and reference values: attributes, identity,
//! event log.

use super::event_log;
use super::quote::Quote;
use super::verify::{TdxLimits, TdxPolicy};
use crate::collateral::Collateral;
use crate::encoding::hex;
use crate::verdict::Checks;

const ATTRIBUTE_DEBUG: u64 = 1;
const ATTRIBUTE_SEPT_VE_DISABLE: u64 = 1 << 28;
const ATTRIBUTE_MIGRATABLE: u64 = 1 << 29;
/// ICSSD, LASS, SEPT_VE_DISABLE, MIGRATABLE, PKS, KL, TPA, PERFMON, and DEBUG, which has its own check.
const ATTRIBUTES_KNOWN: u64 = 1 | 1 << 16 | 1 << 27 | 0xf << 28 | 0b11 << 62;
/// x87 and SSE state: every processor has them.
const XFAM_ALWAYS: u64 = 3;

pub(super) fn td(checks: &mut Checks, quote: &Quote<'_>, limits: &TdxLimits) {
    let body = &quote.body;
    let attributes = body.td_attributes;
    let mut flag = |name: &str, bit: u64, wanted: bool, excused: bool| {
        let set = attributes & bit != 0;
        let text = |on| if on { "on" } else { "off" };
        checks.require(
            name,
            set == wanted || excused,
            if excused { "on or off" } else { text(wanted) },
            text(set),
        );
    };
    flag("td-debug", ATTRIBUTE_DEBUG, false, limits.allow_debug);
    flag(
        "td-sept-ve-disable",
        ATTRIBUTE_SEPT_VE_DISABLE,
        true,
        limits.allow_sept_ve,
    );
    flag(
        "td-migratable",
        ATTRIBUTE_MIGRATABLE,
        false,
        limits.allow_migration,
    );
    let unknown = attributes & !ATTRIBUTES_KNOWN;
    checks.require(
        "td-attributes",
        unknown == 0,
        "no unknown attribute",
        format!("unknown 0x{unknown:x}"),
    );
    let ok = body.xfam & XFAM_ALWAYS == XFAM_ALWAYS && body.xfam & !limits.xfam_allowed == 0;
    checks.require(
        "xfam",
        ok,
        format!("within 0x{:x}, x87 and SSE on", limits.xfam_allowed),
        format!("0x{:x}", body.xfam),
    );
    if let Some((_, service)) = &body.v1_5 {
        let none = *service == [0; 48];
        let expected = if limits.allow_service_td {
            "any"
        } else {
            "none"
        };
        checks.require(
            "service-td",
            none || limits.allow_service_td,
            expected,
            hex(service),
        );
    }
    if let Some(extra) = &body.v1_5_ex {
        // Hash of the service TD that is bound now: 48 bytes before the last 8 (its attributes).
        let current = &extra[extra.len() - 56..extra.len() - 8];
        let none = current.iter().all(|b| *b == 0);
        let expected = if limits.allow_service_td {
            "any"
        } else {
            "none"
        };
        checks.require(
            "service-td-current",
            none || limits.allow_service_td,
            expected,
            hex(current),
        );
    }
}

pub(super) fn identity(checks: &mut Checks, quote: &Quote<'_>, policy: &TdxPolicy) {
    let body = &quote.body;
    checks.compare(
        "report-data",
        policy.report_data.as_ref(),
        &body.report_data,
        |d| hex(d),
    );
    checks.compare(
        "mr-config-id",
        policy.mr_config_id.as_ref(),
        &body.mr_config_id,
        |d| hex(d),
    );
    if policy.mr_owner.is_some() {
        checks.compare("mr-owner", policy.mr_owner.as_ref(), &body.mr_owner, |d| {
            hex(d)
        });
    }
    if policy.mr_owner_config.is_some() {
        checks.compare(
            "mr-owner-config",
            policy.mr_owner_config.as_ref(),
            &body.mr_owner_config,
            |d| hex(d),
        );
    }
    let mut among = |name: &str, references: &[[u8; 48]], found: &[u8; 48]| {
        if references.is_empty() {
            checks.not_checked(name, "no reference value given", hex(found));
        } else {
            let expected = references
                .iter()
                .map(|r| hex(r))
                .collect::<Vec<_>>()
                .join(" or ");
            checks.require(name, references.contains(found), expected, hex(found));
        }
    };
    among("mr-td", &policy.mr_td, &body.mr_td);
    for (name, (references, found)) in ["rtmr0", "rtmr1", "rtmr2", "rtmr3"]
        .iter()
        .zip(policy.rtmr.iter().zip(&body.rtmr))
    {
        among(name, references, found);
    }
}

pub(super) fn event_log(checks: &mut Checks, quote: &Quote<'_>, collateral: &Collateral) {
    for log in &collateral.event_logs {
        let Some(events) = checks.result(
            "event-log-format",
            "a log with SHA-384 digests",
            event_log::parse_event_log(log),
        ) else {
            continue;
        };
        let replayed = event_log::replay(&events);
        for (i, (expected, found)) in replayed.iter().zip(&quote.body.rtmr).enumerate() {
            checks.require(
                &format!("event-log-rtmr{i}"),
                expected == found,
                format!("{} (replayed)", hex(expected)),
                hex(found),
            );
        }
    }
}
