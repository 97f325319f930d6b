//! The TDX verifier: one path through the whole checklist, from the bytes of a quote and Intel's
//! collateral to a verdict.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::collateral::Bundle;
use super::event_log;
use super::pck::Pck;
use super::quote::{Quote, QuoteError};
use super::tcb::{self, TcbStatus};
use crate::anchors::{Pin, TrustAnchors};
use crate::collateral::Collateral;
use crate::crypto::{PublicKey, sha256};
use crate::encoding::{hex, pem_blocks_only};
use crate::time::Timestamp;
use crate::verdict::{Checks, Tee, Verdict};
use crate::x509::{self, Certificate, ChainError, Crl, CrlError, X509Error};

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

const ATTRIBUTE_DEBUG: u64 = 1;
const ATTRIBUTE_SEPT_VE_DISABLE: u64 = 1 << 28;
const ATTRIBUTE_MIGRATABLE: u64 = 1 << 29;
/// ICSSD, LASS, SEPT_VE_DISABLE, MIGRATABLE, PKS, KL, TPA, PERFMON, and DEBUG, which has its own check.
const ATTRIBUTES_KNOWN: u64 = 1 | 1 << 16 | 1 << 27 | 0xf << 28 | 0b11 << 62;
/// x87 and SSE state: every processor has them.
const XFAM_ALWAYS: u64 = 3;

/// Why a signed part of the collateral is not believed.
#[derive(Debug, thiserror::Error)]
enum CollateralFault {
    #[error("Certificate cannot be read")]
    X509(#[from] X509Error),
    #[error("Chain does not lead to the root")]
    Chain(#[from] ChainError),
    #[error("Revocation")]
    Crl(#[from] CrlError),
    #[error("Signature is not the signing certificate's")]
    Signature,
    #[error("Issued {0}, next update {1}: not current at {2}")]
    Window(Timestamp, Timestamp, Timestamp),
    #[error("It is {0} version {1}")]
    Kind(String, u32),
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
    let quote = match Quote::parse(quote) {
        Ok(quote) => quote,
        Err(
            error @ (QuoteError::TeeType(_)
            | QuoteError::Version(_)
            | QuoteError::KeyType(_)
            | QuoteError::Vendor(_)),
        ) => {
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
    check_td(&mut checks, &quote, &policy.limits);
    check_identity(&mut checks, &quote, policy);
    check_event_log(&mut checks, &quote, collateral);
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

    let Some(bundle) = choose_bundle(&collateral.bundles, &pck, now) else {
        checks.fail(
            "collateral",
            format!("TDX collateral for FMSPC {}", hex(&pck.fmspc)),
            "none given",
        );
        return None;
    };
    check_collateral(checks, bundle, &chain, pins, now)?;
    evaluate_tcb(checks, quote, bundle, &pck, &policy.limits)
}

/// The bundle for this platform; of several, one that is current.
fn choose_bundle<'a>(bundles: &'a [Bundle], pck: &Pck, now: Timestamp) -> Option<&'a Bundle> {
    bundles.iter().max_by_key(|b| {
        (
            b.tcb_info.fmspc == pck.fmspc,
            b.is_current(now),
            b.tcb_info.tcb_evaluation_data_number,
            b.tcb_info.issue_date,
        )
    })
}

/// CRLs, TCB info and QE identity: authentic and current.
fn check_collateral(
    checks: &mut Checks,
    bundle: &Bundle,
    pck_chain: &[&Certificate<'_>],
    pins: &[Pin],
    now: Timestamp,
) -> Option<()> {
    let root_crl = checks.result("root-crl-format", "a CRL", Crl::parse(&bundle.root_ca_crl))?;
    let pck_crl = checks.result("pck-crl-format", "a CRL", Crl::parse(&bundle.pck_crl))?;
    let [leaf, ca, root] = pck_chain else {
        checks.fail("pck-chain-length", "3 certificates", pck_chain.len());
        return None;
    };
    let revocation = || {
        root_crl.verify(root, now)?;
        root_crl.admits(root)?;
        root_crl.admits(ca)?;
        pck_crl.verify(ca, now)?;
        pck_crl.admits(leaf)
    };
    let ok = checks.result(
        "pck-revocation",
        "current CRLs of the root and of the PCK CA without the chain",
        revocation(),
    );
    if ok.is_some() {
        checks.valid_until(root_crl.next_update.min(pck_crl.next_update));
    }

    let info = &bundle.tcb_info;
    let signed = Signed {
        text: &bundle.tcb_info_text,
        signature: &bundle.tcb_info_signature,
        chain: &bundle.tcb_info_issuer_chain,
        window: (info.issue_date, info.next_update),
        kind: (&info.id, info.version),
        accepted: ("TDX", &[3]),
    };
    let end = checks.result(
        "tcb-info",
        "TDX version 3, signed by Intel, current",
        signed.verify(&root_crl, pins, now),
    );
    if let Some(end) = end {
        checks.valid_until(end);
    }
    let identity = &bundle.qe_identity;
    let signed = Signed {
        text: &bundle.qe_identity_text,
        signature: &bundle.qe_identity_signature,
        chain: &bundle.qe_identity_issuer_chain,
        window: (identity.issue_date, identity.next_update),
        kind: (&identity.id, identity.version),
        accepted: ("TD_QE", &[2, 3]),
    };
    let end = checks.result(
        "qe-identity",
        "TD_QE version 2 or 3, signed by Intel, current",
        signed.verify(&root_crl, pins, now),
    );
    if let Some(end) = end {
        checks.valid_until(end);
    }
    Some(())
}

/// A signed JSON part of the collateral.
struct Signed<'a> {
    text: &'a str,
    signature: &'a [u8],
    chain: &'a [Vec<u8>],
    window: (Timestamp, Timestamp),
    kind: (&'a str, u32),
    accepted: (&'a str, &'a [u32]),
}

impl Signed<'_> {
    fn verify(
        &self,
        root_crl: &Crl<'_>,
        pins: &[Pin],
        now: Timestamp,
    ) -> Result<Timestamp, CollateralFault> {
        let chain = x509::parse_all(self.chain)?;
        let chain: Vec<&Certificate<'_>> = chain.iter().collect();
        let end = x509::verify_chain(&chain, pins, now)?;
        let signer = chain.first().ok_or(CollateralFault::Signature)?;
        root_crl.admits(signer)?;
        // A PCK CA or a PCK of the same root may not sign collateral.
        let authentic = signer
            .common_name()
            .is_some_and(|n| n.ends_with("TCB Signing"))
            && signer
                .key
                .verify_fixed(self.text.as_bytes(), self.signature);
        if !authentic {
            return Err(CollateralFault::Signature);
        }
        if self.kind.0 != self.accepted.0 || !self.accepted.1.contains(&self.kind.1) {
            return Err(CollateralFault::Kind(
                self.kind.0.chars().take(20).collect(),
                self.kind.1,
            ));
        }
        if now < self.window.0 || now > self.window.1 {
            return Err(CollateralFault::Window(self.window.0, self.window.1, now));
        }
        Ok(end.min(self.window.1))
    }
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

fn check_td(checks: &mut Checks, quote: &Quote<'_>, limits: &TdxLimits) {
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

fn check_identity(checks: &mut Checks, quote: &Quote<'_>, policy: &TdxPolicy) {
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

fn check_event_log(checks: &mut Checks, quote: &Quote<'_>, collateral: &Collateral) {
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
