//! The SEV-SNP verifier: one path through the whole checklist, from the bytes of a report and its
//! endorsements to a verdict. Signatures first; what an unsigned report says is not looked at.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checks;
use super::report::{Report, SigningKey};
use super::vek::Vek;
use super::{Product, Tcb};
use crate::anchors::{TrustAnchors, pin_of};
use crate::collateral::Collateral;
use crate::encoding::hex;
use crate::time::Timestamp;
use crate::verdict::{Checks, Tee, Verdict};
use crate::x509::{self, Certificate, Crl};

/// What a report is compared with. Whatever is `None` or empty is reported as not checked.
#[derive(Clone, Debug, Default)]
pub struct SnpPolicy {
    /// REPORT_DATA, exactly.
    pub report_data: Option<[u8; 64]>,
    /// HOST_DATA, exactly.
    pub host_data: Option<[u8; 32]>,
    /// Reference values for MEASUREMENT; one must be met.
    pub measurements: Vec<[u8; 48]>,
    /// Digest of the ID block's signing key.
    pub id_key_digest: Option<[u8; 48]>,
    /// Digest of the author key.
    pub author_key_digest: Option<[u8; 48]>,
    /// Chips that are allowed; all if empty.
    pub chip_ids: Vec<[u8; 64]>,
    /// The rest: limits that a file can set.
    pub limits: SnpLimits,
}

/// Limits of what is accepted, as a file can set them. The defaults are the strict ones.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SnpLimits {
    /// Lowest security patch levels of the reported and of the launch TCB.
    pub minimum_tcb: Option<Tcb>,
    /// Lowest guest SVN.
    pub minimum_guest_svn: u32,
    /// Lowest ABI version (major, minor) the policy must ask for.
    pub minimum_abi: (u8, u8),
    /// Lowest firmware version: major, minor, build.
    pub minimum_firmware: (u8, u8, u8),
    /// VMPL, exactly.
    pub vmpl: Option<u32>,
    /// Accept a guest the host may debug. For tests of the harness only.
    pub allow_debug: bool,
    /// Accept a guest with a migration agent.
    pub allow_migration_agent: bool,
    /// Accept firmware that is not committed yet.
    pub allow_provisional_firmware: bool,
    /// Refuse guests that allow simultaneous multithreading.
    pub forbid_smt: bool,
    /// Refuse guests that allow CXL.
    pub forbid_cxl: bool,
    /// Refuse guests that may span sockets.
    pub require_single_socket: bool,
    /// Refuse guests that do without AES-256 XTS.
    pub require_aes_256_xts: bool,
    /// Refuse guests that do without ciphertext hiding.
    pub require_ciphertext_hiding: bool,
    /// Refuse guests that allow power reporting.
    pub require_rapl_disabled: bool,
    /// Refuse guests whose pages may be swapped.
    pub require_page_swap_disabled: bool,
    /// Refuse machines whose memory was not checked for aliases.
    pub require_alias_check: bool,
    /// Mitigation bits that must be set at launch and now (report version 5).
    pub required_mitigations: u64,
    /// Refuse when no CRL was given.
    pub require_revocation: bool,
}

/// Verifies a report with the certificates and CRLs of `collateral` at the time `now`.
pub fn verify(
    report: &[u8],
    collateral: &Collateral,
    policy: &SnpPolicy,
    anchors: &TrustAnchors,
    now: Timestamp,
) -> Verdict {
    let mut checks = Checks::new(Tee::Snp);
    let report = match Report::parse(report) {
        Ok(report) => report,
        Err(error) => {
            checks.unreadable("report-format", "an SNP report of version 2 to 5", &error);
            return checks.into_verdict(anchors.simulated, Value::Null);
        }
    };
    checks.require(
        "report-format",
        true,
        "version 2 to 5",
        format!("version {}", report.version),
    );
    let product = authenticate(&mut checks, &report, collateral, policy, anchors, now);
    if let Some(product) = product {
        checks::tcb(&mut checks, &report, product, &policy.limits);
    }
    checks::guest_policy(&mut checks, &report, &policy.limits);
    checks::platform(&mut checks, &report, &policy.limits);
    checks::identity(&mut checks, &report, policy);
    checks.into_verdict(
        anchors.simulated,
        report.claims(product.or(report.product())),
    )
}

/// Chain, signature, and that the key is this chip's at the reported TCB. Returns the product.
fn authenticate(
    checks: &mut Checks,
    report: &Report<'_>,
    collateral: &Collateral,
    policy: &SnpPolicy,
    anchors: &TrustAnchors,
    now: Timestamp,
) -> Option<Product> {
    let kind = report.key_info.signing_key();
    let kind_text = kind.map_or_else(
        || format!("unknown (KEY_INFO 0x{:x})", report.key_info.0),
        |k| format!("{k:?}"),
    );
    checks.require(
        "signing-key",
        kind.is_some() && report.key_info.reserved() == 0,
        "Vcek or Vlek",
        kind_text,
    );
    checks.require(
        "mask-chip-key",
        !report.key_info.mask_chip_key(),
        false,
        report.key_info.mask_chip_key(),
    );
    let kind = kind?;

    let certificates = checks.result(
        "endorsement-format",
        "X.509 certificates",
        x509::parse_all(&collateral.certificates),
    )?;
    let candidates: Vec<&Certificate<'_>> = certificates
        .iter()
        .filter(|c| c.common_name() == Some(vek_name(kind)))
        .collect();
    // A chip has a certificate for each TCB, and one TCB can have several: the report's signature
    // says which key it is.
    let signed = |c: &&&Certificate<'_>| c.key.verify_fixed(report.signed(), &report.signature);
    let Some(vek_cert) = candidates.iter().find(signed) else {
        checks.fail(
            "report-signature",
            format!("signed by a given {}", vek_name(kind)),
            format!("not by any of {} given", candidates.len()),
        );
        return None;
    };
    checks.require(
        "report-signature",
        true,
        format!("signed by a given {}", vek_name(kind)),
        "verified",
    );
    let vek = checks.result(
        "vek-extensions",
        "AMD endorsement key extensions",
        Vek::from_certificate(vek_cert),
    )?;

    let product = report.product();
    match report.cpuid {
        Some((family, model, _)) => {
            let found = product.map_or_else(
                || format!("unknown family 0x{family:x} model 0x{model:x}"),
                |p| p.to_string(),
            );
            checks.require("product", product == Some(vek.product), vek.product, found);
        }
        None => {
            checks.require(
                "product",
                true,
                vek.product,
                format!("{} (from the VEK)", vek.product),
            );
        }
    }
    check_chain(checks, vek_cert, &vek, &certificates, anchors, now)?;
    check_crl(
        checks,
        vek_cert,
        &vek,
        &certificates,
        collateral,
        policy,
        anchors,
        now,
    );

    let reported = Tcb::from_bytes(report.reported_tcb, vek.product);
    let found = reported.map_or_else(|| hex(&report.reported_tcb), |t| t.to_string());
    checks.require("vek-tcb", reported == Some(vek.tcb), vek.tcb, found);
    match vek.kind {
        SigningKey::Vcek => {
            let expected = hex(vek.hwid.as_deref().unwrap_or_default());
            checks.require(
                "chip-id",
                vek.is_of_chip(&report.chip_id),
                expected,
                hex(&report.chip_id),
            );
        }
        SigningKey::Vlek => {
            let csp = vek.csp_id.as_deref().unwrap_or_default();
            let ok = vek.hwid.is_none();
            checks.require(
                "chip-id",
                ok,
                "no chip in a VLEK",
                format!("provider {csp}"),
            );
        }
    }
    Some(vek.product)
}

fn vek_name(kind: SigningKey) -> &'static str {
    match kind {
        SigningKey::Vcek => "SEV-VCEK",
        SigningKey::Vlek => "SEV-VLEK",
    }
}

fn issuer_name(vek: &Vek) -> String {
    match vek.kind {
        SigningKey::Vcek => format!("SEV-{}", vek.product),
        SigningKey::Vlek => format!("SEV-VLEK-{}", vek.product),
    }
}

/// ARK → ASK or ASVK → VEK, with the names of this product and this kind of key.
fn check_chain(
    checks: &mut Checks,
    vek_cert: &Certificate<'_>,
    vek: &Vek,
    certificates: &[Certificate<'_>],
    anchors: &TrustAnchors,
    now: Timestamp,
) -> Option<()> {
    let (root_name, middle_name) = (format!("ARK-{}", vek.product), issuer_name(vek));
    let named = |name: &str| {
        certificates
            .iter()
            .filter(|c| c.common_name() == Some(name))
            .collect::<Vec<_>>()
    };
    let pins = anchors.amd_pins(vek.product);
    // Of several certificates of one name, the pinned root and the one that signed are meant.
    let roots = named(&root_name);
    let root = roots
        .iter()
        .find(|c| pins.contains(&pin_of(c)))
        .or(roots.first());
    let middles = named(&middle_name);
    let middle = middles
        .iter()
        .find(|c| vek_cert.signed_by(c))
        .or(middles.first());
    let expected = format!(
        "{root_name} (pinned) > {middle_name} > {}",
        vek_name(vek.kind)
    );
    let (Some(root), Some(middle)) = (root, middle) else {
        let missing = if root.is_none() {
            root_name
        } else {
            middle_name
        };
        checks.fail(
            "vek-chain",
            expected,
            format!("no certificate {missing} given"),
        );
        return None;
    };
    let end = checks.result(
        "vek-chain",
        expected,
        x509::verify_chain(&[vek_cert, middle, root], &pins, now),
    )?;
    checks.valid_until(end);
    Some(())
}

#[expect(
    clippy::too_many_arguments,
    reason = "the inputs of the verifier, once more"
)]
fn check_crl(
    checks: &mut Checks,
    vek_cert: &Certificate<'_>,
    vek: &Vek,
    certificates: &[Certificate<'_>],
    collateral: &Collateral,
    policy: &SnpPolicy,
    anchors: &TrustAnchors,
    now: Timestamp,
) {
    let pins = anchors.amd_pins(vek.product);
    let Some(root) = certificates.iter().find(|c| pins.contains(&pin_of(c))) else {
        return;
    };
    let crls: Vec<Crl<'_>> = collateral
        .crls
        .iter()
        .filter_map(|der| Crl::parse(der).ok())
        .filter(|c| c.issuer == root.subject)
        .collect();
    // Several may lie in a store; the newest counts.
    let Some(crl) = crls.iter().max_by_key(|c| c.this_update) else {
        if policy.limits.require_revocation {
            checks.fail(
                "revocation",
                format!("a CRL of {}", root.label()),
                "none given",
            );
        } else {
            checks.not_checked(
                "revocation",
                format!("no CRL of {} given", root.label()),
                "",
            );
        }
        return;
    };
    let result = crl.verify(root, now).and_then(|()| {
        // The ARK lists what it issued: the ASK and the ASVK.
        certificates
            .iter()
            .filter(|c| c.issuer == root.subject && vek_cert.issuer == c.subject)
            .try_for_each(|c| crl.admits(c))
    });
    if checks
        .result(
            "revocation",
            format!("current CRL of {} without the signing key", root.label()),
            result,
        )
        .is_some()
    {
        checks.valid_until(crl.next_update);
    }
}
