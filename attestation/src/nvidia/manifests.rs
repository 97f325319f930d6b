//! A device's measurements compared with the golden values of its manifests, after the manifests
//! themselves were verified.

use std::sync::Arc;

use super::device::{Context, Kind, check_revocation};
use super::report::Report;
use super::rim::{Rim, RimKind};
use crate::anchors::Pin;
use crate::encoding::hex;
use crate::verdict::Checks;
use crate::x509;

/// The measurement of the first video decoder; present or not by its fuses.
const NVDEC0_INDEX: u8 = 35;
const NVDEC0_ENABLED: u8 = 0xaa;
const NVDEC0_DISABLED: u8 = 0x55;

pub(super) fn check(
    checks: &mut Checks,
    report: &Report<'_>,
    chip: &str,
    kind: Kind,
    context: &Context<'_>,
) {
    let wanted: &[(RimKind, &str)] = match kind {
        Kind::Gpu => &[
            (RimKind::Driver, "driver-rim"),
            (RimKind::Vbios, "vbios-rim"),
        ],
        Kind::Switch => &[(RimKind::Switch, "switch-rim")],
    };
    let mut used: Vec<&Rim> = Vec::new();
    for (rim_kind, name) in wanted {
        let version = match rim_kind {
            RimKind::Driver => report.opaque.driver_version(),
            RimKind::Vbios | RimKind::Switch => report.opaque.vbios_version(),
        };
        let version = version.unwrap_or_else(|| "(no version in the report)".into());
        let of_kind = |r: &&Rim| r.kind == *rim_kind;
        // The one for this version, or else any of its kind: the checks then say what differs.
        let rims = || context.rims.iter().map(Arc::as_ref);
        let exact = rims()
            .filter(of_kind)
            .find(|r| r.version.eq_ignore_ascii_case(&version) && r.product == chip);
        match exact.or_else(|| rims().find(of_kind)) {
            Some(rim) => {
                check_rim(checks, name, rim, chip, &version, context);
                used.push(rim);
            }
            None if context.policy.limits.require_rims => checks.fail(
                name,
                format!("a manifest for {chip} {version}"),
                "none given",
            ),
            None => checks.not_checked(name, "no manifest given", format!("{chip} {version}")),
        }
    }
    check_measurements(checks, report, &used, kind, used.len() == wanted.len());
}

fn check_rim(
    checks: &mut Checks,
    name: &str,
    rim: &Rim,
    chip: &str,
    version: &str,
    context: &Context<'_>,
) {
    let ok = rim.product == chip && rim.version.eq_ignore_ascii_case(version);
    checks.require(
        &format!("{name}-version"),
        ok,
        format!("{chip} {version}"),
        format!("{} {}", rim.product, rim.version),
    );
    checks.result(
        &format!("{name}-signature"),
        "the signer's over this content",
        rim.verify_signature(),
    );
    let pins: &[Pin] = &context.anchors.nvidia_rim;
    let result = rim.verify_chain(pins, context.now);
    if let Some(end) = checks.result(
        &format!("{name}-chain"),
        "signer > … > NVIDIA CoRIM signing Root CA (pinned)",
        result,
    ) {
        checks.valid_until(end);
    }
    if let Ok(chain) = x509::parse_all(&rim.chain) {
        check_revocation(
            checks,
            &format!("{name}-revocation"),
            &chain.iter().collect::<Vec<_>>(),
            context,
        );
    }
}

fn check_measurements(
    checks: &mut Checks,
    report: &Report<'_>,
    rims: &[&Rim],
    kind: Kind,
    complete: bool,
) {
    if rims.is_empty() {
        checks.not_checked(
            "measurements",
            "no manifest given",
            format!("{} blocks", report.measurements.len()),
        );
        return;
    }
    if let [a, b] = rims {
        let both: Vec<String> = a
            .golden
            .keys()
            .filter(|i| b.golden.contains_key(i))
            .map(u8::to_string)
            .collect();
        checks.require(
            "rim-overlap",
            both.is_empty(),
            "no index in both manifests",
            if both.is_empty() {
                "none".into()
            } else {
                both.join(", ")
            },
        );
    }
    let golden = rims.iter().flat_map(|r| &r.golden);
    let (mut compared, mut matching) = (0, 0);
    let mut mismatches = Vec::new();
    for (index, values) in golden {
        if *index == NVDEC0_INDEX && kind == Kind::Gpu {
            match report.opaque.nvdec0() {
                Some(NVDEC0_DISABLED) => continue,
                Some(NVDEC0_ENABLED) => {}
                other => {
                    checks.fail(
                        "nvdec0-status",
                        "0x55 or 0xaa",
                        other.map_or("none".into(), |s| format!("0x{s:02x}")),
                    );
                    continue;
                }
            }
        }
        compared += 1;
        match report.measurements.get(usize::from(*index)) {
            Some(found) if values.contains(found) => matching += 1,
            Some(found) => mismatches.push(format!("{index}: {}…", hex(&found[..8]))),
            None => mismatches.push(format!("{index}: no such block")),
        }
    }
    let found = match mismatches.as_slice() {
        [] => format!("{matching} of {compared}"),
        list => format!("{matching} of {compared}; not index {}", list.join(", ")),
    };
    checks.require(
        "measurements",
        compared > 0 && mismatches.is_empty(),
        format!("{compared} golden values"),
        found,
    );
    if complete {
        let covered = |i: usize| {
            rims.iter()
                .any(|r| u8::try_from(i).is_ok_and(|i| r.golden.contains_key(&i)))
        };
        let loose: Vec<String> = report
            .measurements
            .iter()
            .enumerate()
            .filter(|(i, m)| **m != [0; 48] && !covered(*i))
            .map(|(i, _)| i.to_string())
            .collect();
        if !loose.is_empty() {
            checks.not_checked(
                "measurements-uncovered",
                "no manifest has a golden value for them",
                format!("index {}", loose.join(", ")),
            );
        }
    }
}
