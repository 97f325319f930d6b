//! The TDX verifier: one path through the whole checklist, from the bytes of a quote and Intel's
//! collateral to a verdict.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checks;
use super::collateral::Bundle;
use super::endorsed;
use super::pck::Pck;
use super::quote::{Quote, QuoteError};
use super::tcb::{self, TcbStatus};
use crate::anchors::{Pin, TrustAnchors};
use crate::collateral::Collateral;
use crate::crypto::{PublicKey, sha256};
use crate::encoding::{hex, pem_blocks_only};
use crate::time::Timestamp;
use crate::verdict::{Checks, Tee, Verdict};
use crate::x509::{self, Certificate};

/// What a quote is compared with. Whatever is `None` or empty is reported as not checked.
#[derive(Clone, Debug, Default)]
pub struct TdxPolicy {
    /// REPORTDATA, exactly.
    pub report_data: Option<[u8; 64]>,
    /// MRCONFIGID, exactly.
    pub mr_config_id: Option<[u8; 48]>,
    /// MROWNER, exactly.
    pub mr_owner: Option<[u8; 48]>,
    /// MROWNERCONFIG, exactly.
    pub mr_owner_config: Option<[u8; 48]>,
    /// Reference values for MRTD; one must be met.
    pub mr_td: Vec<[u8; 48]>,
    /// Reference values for RTMR0 to RTMR3; one of each must be met.
    pub rtmr: [Vec<[u8; 48]>; 4],
    /// Platforms that are allowed; all if empty.
    pub ppids: Vec<[u8; 16]>,
    /// The rest: limits that a file can set.
    pub limits: TdxLimits,
}

/// Limits of what is accepted, as a file can set them. The defaults are the strict ones.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TdxLimits {
    /// TCB statuses that are accepted.
    pub tcb_statuses: Vec<TcbStatus>,
    /// Advisories that may not apply, whatever the status.
    pub forbidden_advisories: Vec<String>,
    /// Lowest evaluation number of the TCB info and the QE identity.
    pub minimum_evaluation_number: u32,
    /// Accept a TD the host may debug. For tests of the harness only.
    pub allow_debug: bool,
    /// Accept a TD that takes #VE on unmapped pages (SEPT_VE_DISABLE off).
    pub allow_sept_ve: bool,
    /// Accept a TD that may be migrated.
    pub allow_migration: bool,
    /// Accept service TDs.
    pub allow_service_td: bool,
    /// Extended features a TD may have.
    pub xfam_allowed: u64,
}

impl Default for TdxLimits {
    fn default() -> Self {
        Self {
            tcb_statuses: vec![TcbStatus::UpToDate],
            forbidden_advisories: Vec::new(),
            minimum_evaluation_number: 0,
            allow_debug: false,
            allow_sept_ve: false,
            allow_migration: false,
            allow_service_td: false,
            // What today's TDX module lets a TD have at all.
            xfam_allowed: 0x0006_dbe7,
        }
    }
}

/// Verifies a quote with the collateral at the time `now`.
pub fn verify(
    quote: &[u8],
    collateral: &Collateral,
    policy: &TdxPolicy,
    anchors: &TrustAnchors,
    now: Timestamp,
) -> Verdict {
    let mut checks = Checks::new(Tee::Tdx);
    // Version 3 with the same key type: a quote, but of an enclave.
    let of_enclave = quote.starts_with(&[3, 0, 2, 0]);
    let quote = match Quote::parse(quote) {
        Ok(quote) => quote,
        Err(error)
            if of_enclave
                || matches!(
                    error,
                    QuoteError::TeeType(_) | QuoteError::KeyType(_) | QuoteError::Vendor(_)
                ) =>
        {
            checks.fail("quote-format", "a TDX quote of version 4 or 5", error);
            return checks.into_verdict(anchors.simulated, Value::Null);
        }
        Err(error) => {
            checks.unreadable("quote-format", "a TDX quote of version 4 or 5", &error);
            return checks.into_verdict(anchors.simulated, Value::Null);
        }
    };
    checks.require(
        "quote-format",
        true,
        "version 4 or 5",
        format!("version {}, body type {}", quote.version, quote.body_type),
    );
    let extra = quote.trailing.iter().position(|b| *b != 0);
    let found = extra.map_or_else(
        || format!("{} zero bytes", quote.trailing.len()),
        |at| format!("byte {at} of {} is not zero", quote.trailing.len()),
    );
    checks.require(
        "quote-padding",
        extra.is_none(),
        "nothing but zeros behind the quote",
        found,
    );
    let mut claims = quote.claims();
    let level = authenticate(&mut checks, &quote, collateral, policy, &anchors.intel, now);
    if let (Some(level), Value::Object(map)) = (level, &mut claims) {
        map.insert("tcb".into(), level);
    }
    checks::td(&mut checks, &quote, &policy.limits);
    checks::identity(&mut checks, &quote, policy);
    checks::event_log(&mut checks, &quote, collateral);
    checks.into_verdict(anchors.simulated, claims)
}

/// Signatures from the root down to the TD body, then the TCB level, which is returned as a claim.
fn authenticate(
    checks: &mut Checks,
    quote: &Quote<'_>,
    collateral: &Collateral,
    policy: &TdxPolicy,
    pins: &[Pin],
    now: Timestamp,
) -> Option<Value> {
    let key = PublicKey::P256(&quote.attestation_key);
    let ok = key.verify_fixed(quote.signed, quote.signature);
    checks.require(
        "quote-signature",
        ok,
        "the attestation key's",
        if ok {
            "verified"
        } else {
            "not the attestation key's"
        },
    );

    let mut hash = [0; 64];
    hash[..32].copy_from_slice(&sha256(
        &[&quote.attestation_key[1..], quote.qe_auth_data].concat(),
    ));
    checks.require(
        "attestation-key",
        quote.qe_report.report_data == hash,
        hex(&hash),
        hex(&quote.qe_report.report_data),
    );

    let ders = checks.result(
        "pck-format",
        "PCK certificate chain in PEM",
        pem_blocks_only(quote.pck_chain),
    )?;
    let ders: Vec<Vec<u8>> = ders.into_iter().map(|b| b.1).collect();
    let chain = checks.result(
        "pck-certificates",
        "X.509 certificates",
        x509::parse_all(&ders),
    )?;
    let chain: Vec<&Certificate<'_>> = chain.iter().collect();
    let end = checks.result(
        "pck-chain",
        "PCK > PCK CA > Intel root (pinned)",
        x509::verify_chain(&chain, pins, now),
    )?;
    checks.valid_until(end);
    let leaf = chain.first()?;
    let ok = leaf
        .key
        .verify_fixed(quote.qe_report_raw, quote.qe_report_signature);
    checks.require(
        "qe-report-signature",
        ok,
        "the PCK's",
        if ok { "verified" } else { "not the PCK's" },
    );
    let pck = checks.result(
        "pck-extensions",
        "SGX extensions",
        Pck::from_certificate(leaf),
    )?;
    if !policy.ppids.is_empty() {
        let expected = format!("one of {} allowed platforms", policy.ppids.len());
        checks.require(
            "platform-allowed",
            policy.ppids.contains(&pck.ppid),
            expected,
            hex(&pck.ppid),
        );
    }

    let Some(bundle) = endorsed::choose(&collateral.bundles, &pck, now) else {
        checks.fail(
            "collateral",
            format!("TDX collateral for FMSPC {}", hex(&pck.fmspc)),
            "none given",
        );
        return None;
    };
    endorsed::check(checks, bundle, &chain, pins, now)?;
    evaluate_tcb(checks, quote, bundle, &pck, &policy.limits)
}

fn evaluate_tcb(
    checks: &mut Checks,
    quote: &Quote<'_>,
    bundle: &Bundle,
    pck: &Pck,
    limits: &TdxLimits,
) -> Option<Value> {
    let info = &bundle.tcb_info;
    checks.require(
        "fmspc",
        info.fmspc == pck.fmspc,
        hex(&info.fmspc),
        hex(&pck.fmspc),
    );
    checks.require(
        "pce-id",
        info.pce_id == pck.pce_id,
        hex(&info.pce_id),
        hex(&pck.pce_id),
    );
    let number = info
        .tcb_evaluation_data_number
        .min(bundle.qe_identity.tcb_evaluation_data_number);
    let minimum = limits.minimum_evaluation_number;
    checks.require(
        "tcb-evaluation-number",
        number >= minimum,
        format!("at least {minimum}"),
        number,
    );
    let platform = checks.result(
        "tcb-level",
        "a TCB level that the platform reaches",
        tcb::platform_level(info, pck, &quote.body),
    )?;
    let qe = checks.result(
        "qe-level",
        "Intel's TD quoting enclave",
        tcb::qe_level(&bundle.qe_identity, &quote.qe_report),
    )?;
    let level = tcb::merge(platform, &qe);
    let expected = limits
        .tcb_statuses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" or ");
    let found = if level.advisories.is_empty() {
        level.status.to_string()
    } else {
        format!("{} ({})", level.status, level.advisories.join(", "))
    };
    // A revoked TCB is refused whatever a policy says.
    let ok = limits.tcb_statuses.contains(&level.status) && level.status != TcbStatus::Revoked;
    checks.require("tcb-status", ok, expected, found);
    if !limits.forbidden_advisories.is_empty() {
        let hit: Vec<&str> = level
            .advisories
            .iter()
            .filter(|a| limits.forbidden_advisories.contains(a))
            .map(String::as_str)
            .collect();
        checks.require(
            "advisories",
            hit.is_empty(),
            "none of the forbidden",
            hit.join(", "),
        );
    }
    Some(serde_json::json!({
        "status": level.status,
        "date": level.date.to_string(),
        "advisories": level.advisories,
        "evaluation_number": number,
        "fmspc": hex(&pck.fmspc),
        "ppid": hex(&pck.ppid),
        "cpu_svn": hex(&pck.cpu_svn),
        "pce_svn": pck.pce_svn,
    }))
}
