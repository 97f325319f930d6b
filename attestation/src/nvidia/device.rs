//! One device: report, certificate chain, firmware id, revocation, manifests, measurements.

use std::sync::Arc;

use serde_json::Value;

use super::evidence::Device;
use super::manifests;
use super::report::{Mode, Report};
use super::rim::Rim;
use super::verify::NvidiaPolicy;
use crate::anchors::TrustAnchors;
use crate::collateral::Collateral;
use crate::der::{self, Reader, tag};
use crate::encoding::hex;
use crate::ocsp::OcspResponse;
use crate::time::Timestamp;
use crate::verdict::Checks;
use crate::x509::{self, Certificate};

/// Leaf, boot ROM, provisioner, chip identity, root.
const CHAIN_LENGTH: usize = 5;
/// 2.23.133.5.4.1, TCG DICE composite device id: Hopper.
const DICE_FWID: &[u8] = &[0x67, 0x81, 5, 5, 4, 1];
/// 2.23.133.5.4.1.1, TCG DICE TcbInfo: Blackwell.
const DICE_TCB_INFO: &[u8] = &[0x67, 0x81, 5, 5, 4, 1, 1];
/// 2.5.4.5, serialNumber in a name.
const SERIAL_NUMBER: &[u8] = &[0x55, 4, 5];

/// Kind of device, by the chip its certificate names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Gpu,
    Switch,
}

/// What the topology needs to know of a device whose report was read.
pub(super) struct Checked {
    pub kind: Kind,
    pub chip: String,
    pub serial: String,
    pub nonce: [u8; 32],
    pub mode: Option<Mode>,
    pub pdi: Option<[u8; 8]>,
    pub switch_pdis: Option<Vec<[u8; 8]>>,
    pub gpu_pdis: Option<Vec<[u8; 8]>>,
}

/// What devices are verified with.
pub(super) struct Context<'a> {
    pub collateral: &'a Collateral,
    pub rims: &'a [Arc<Rim>],
    pub policy: &'a NvidiaPolicy,
    pub anchors: &'a TrustAnchors,
    pub now: Timestamp,
}

/// Verifies one device; returns what its topology needs, and its claims.
pub(super) fn verify(
    checks: &mut Checks,
    device: &Device,
    context: &Context<'_>,
) -> (Option<Checked>, Value) {
    let report = match Report::parse(&device.report) {
        Ok(report) => report,
        Err(error) => {
            checks.unreadable("report-format", "an SPDM 1.1 measurement report", &error);
            return (None, Value::Null);
        }
    };
    let mut claims = report.claims();
    if let Value::Object(map) = &mut claims {
        map.insert("name".into(), device.name.clone().into());
    }
    checks.require(
        "report-format",
        true,
        "an SPDM 1.1 measurement report",
        format!("{} blocks", report.measurements.len()),
    );
    checks.compare("nonce", context.policy.nonce.as_ref(), &report.nonce, |n| {
        hex(n)
    });

    let own = if device.chain.is_empty() {
        &context.collateral.certificates
    } else {
        &device.chain
    };
    let Some(given) = checks.result("chain-format", "X.509 certificates", x509::parse_all(own))
    else {
        return (None, claims);
    };
    let chain: Vec<&Certificate<'_>> = if device.chain.is_empty() {
        find_chain(&given, &report)
    } else {
        given.iter().collect()
    };
    let ok = chain.len() == CHAIN_LENGTH;
    checks.require("chain-length", ok, CHAIN_LENGTH, chain.len());
    let (Some(leaf), true) = (chain.first(), ok) else {
        return (None, claims);
    };
    let result = x509::verify_chain(&chain, &context.anchors.nvidia_device, context.now);
    if let Some(end) = checks.result(
        "chain",
        "device > … > NVIDIA Device Identity CA (pinned)",
        result,
    ) {
        checks.valid_until(end);
    }
    let ok = leaf.key.verify_fixed(report.signed, report.signature);
    checks.require(
        "report-signature",
        ok,
        "the leaf certificate's",
        if ok {
            "verified"
        } else {
            "not the leaf certificate's"
        },
    );

    let chip = chip(leaf);
    let kind = match chip.get(..2) {
        Some("GH" | "GB") => Kind::Gpu,
        Some("LS") => Kind::Switch,
        _ => {
            checks.fail("chip", "GH…, GB… or LS…", &chip);
            return (None, claims);
        }
    };
    let named = report.opaque.chip();
    checks.require(
        "chip",
        named.as_ref().is_none_or(|n| *n == chip),
        named.as_ref().unwrap_or(&chip),
        &chip,
    );
    check_fwid(checks, leaf, &report, kind);
    check_revocation(checks, "chain-revocation", &chain[1..], context);
    manifests::check(checks, &report, &chip, kind, context);

    let serial = serial(chain[1]).unwrap_or_default();
    let checked = Checked {
        kind,
        pdi: pdi(&serial),
        chip,
        serial,
        nonce: report.nonce,
        mode: report.opaque.mode(),
        switch_pdis: report.opaque.switch_pdis(),
        gpu_pdis: report.opaque.switch_gpu_pdis(),
    };
    (Some(checked), claims)
}

/// The chain in a pile: from the certificate whose key signed the report up to a self-issued one.
fn find_chain<'c, 'd>(
    pile: &'c [Certificate<'d>],
    report: &Report<'_>,
) -> Vec<&'c Certificate<'d>> {
    let is_issuer = |c: &Certificate<'_>| {
        pile.iter()
            .any(|o| o.subject != c.subject && o.issuer == c.subject)
    };
    let signer = pile
        .iter()
        .find(|c| c.key.verify_fixed(report.signed, report.signature));
    // Without a signer, any leaf will do: the signature check then says what is wrong.
    let mut chain: Vec<&Certificate<'_>> = signer
        .or_else(|| pile.iter().find(|c| !is_issuer(c)))
        .into_iter()
        .collect();
    while let Some(last) = chain.last() {
        let next = if last.issuer == last.subject || chain.len() > CHAIN_LENGTH {
            None
        } else {
            pile.iter().find(|c| c.subject == last.issuer)
        };
        match next {
            Some(issuer) => chain.push(issuer),
            None => break,
        }
    }
    chain
}

/// The chip in the leaf's common name: `GH100 A01 GSP FMC LF`, `LS_10 A01 FSP FMC LF`.
fn chip(leaf: &Certificate<'_>) -> String {
    leaf.label()
        .split(' ')
        .next()
        .unwrap_or_default()
        .replace('_', "")
}

/// The serial number in the subject of the boot ROM's certificate: one for each device.
fn serial(rom: &Certificate<'_>) -> Option<String> {
    let mut names = der::only(rom.subject, tag::SEQUENCE).ok()?;
    while !names.is_empty() {
        let mut pair = names.nested(tag::SET).ok()?.nested(tag::SEQUENCE).ok()?;
        if pair.value(tag::OID).ok()? == SERIAL_NUMBER {
            let value = std::str::from_utf8(pair.any().ok()?.value).ok()?;
            return value
                .bytes()
                .all(|b| b.is_ascii_alphanumeric())
                .then(|| value.to_owned());
        }
    }
    None
}

/// The platform device id: the last eight bytes of the serial number.
fn pdi(serial: &str) -> Option<[u8; 8]> {
    crate::encoding::unhex_array(serial.get(serial.len().checked_sub(16)?..)?).ok()
}

fn check_fwid(checks: &mut Checks, leaf: &Certificate<'_>, report: &Report<'_>, kind: Kind) {
    match (certificate_fwid(leaf), report.opaque.fwid(), kind) {
        (Some(expected), Some(found), _) => {
            checks.require("fwid", expected == found, hex(&expected), hex(found));
        }
        (None, Some(found), _) => checks.fail(
            "fwid",
            "a firmware id in the leaf certificate",
            format!("only in the report: {}", hex(found)),
        ),
        // The switches' firmware reports none.
        (_, None, Kind::Switch) => {
            checks.not_checked("fwid", "NVSwitch reports carry none", "");
        }
        (expected, None, Kind::Gpu) => checks.fail(
            "fwid",
            expected.map_or("a firmware id".into(), |e| hex(&e)),
            "none in the report",
        ),
    }
}

fn certificate_fwid(leaf: &Certificate<'_>) -> Option<Vec<u8>> {
    if let Some(value) = leaf.extension(DICE_FWID) {
        // CompositeDeviceID: version, device key, then the firmware id: hash algorithm and digest.
        let mut fields = der::only(value, tag::SEQUENCE).ok()?;
        fields.any().ok()?;
        fields.any().ok()?;
        return fwid(&mut fields.nested(tag::SEQUENCE).ok()?);
    }
    let mut fields = der::only(leaf.extension(DICE_TCB_INFO)?, tag::SEQUENCE).ok()?;
    while !fields.is_empty() {
        let field = fields.any().ok()?;
        if field.tag == tag::context(6) {
            return fwid(&mut Reader::new(field.value).nested(tag::SEQUENCE).ok()?);
        }
    }
    None
}

fn fwid(fields: &mut Reader<'_>) -> Option<Vec<u8>> {
    const OID_SHA384: &[u8] = &[0x60, 0x86, 0x48, 1, 101, 3, 4, 2, 2];
    (fields.value(tag::OID).ok()? == OID_SHA384).then_some(())?;
    fields
        .value(tag::OCTET_STRING)
        .ok()
        .filter(|d| d.len() == 48)
        .map(<[u8]>::to_vec)
}

/// OCSP for every certificate of the chain but its root.
pub(super) fn check_revocation(
    checks: &mut Checks,
    name: &str,
    chain: &[&Certificate<'_>],
    context: &Context<'_>,
) {
    for pair in chain.windows(2) {
        let (certificate, issuer) = (pair[0], pair[1]);
        let responses = context
            .collateral
            .ocsp
            .iter()
            .filter_map(|der| OcspResponse::parse(der).ok());
        let about: Vec<OcspResponse<'_>> = responses
            .filter(|r| r.is_about(certificate, issuer))
            .collect();
        let what = format!("OCSP status good for {}", certificate.label());
        // Of several stored responses one that holds is enough; if none does, the last one says why.
        let results = about
            .iter()
            .map(|r| r.verify(certificate, issuer, None, context.now));
        match results.reduce(|a, b| if a.is_ok() { a } else { b }) {
            Some(result) => {
                if let Some(end) = checks.result(name, what, result) {
                    checks.valid_until(end);
                }
            }
            None if context.policy.limits.require_revocation => {
                checks.fail(name, what, "no response given")
            }
            None => checks.not_checked(name, "no OCSP response given", certificate.label()),
        }
    }
}
