//! Judging evidence: the verifiers, then the policy. Who brought it, and how it is bound to nonce and
//! key, is the caller's: it says what each binding has to be.

use super::input::Subject;
use super::{Inputs, Refusal, VerifierError, refused};
use crate::collateral::Collateral;
use crate::encoding::hex;
use crate::evidence::Tee;
use crate::init_data::{self, InitData};
use crate::nvidia::{self, Device};
use crate::policy::PolicyError;
use crate::time::Timestamp;
use crate::verdict::Verdict;
use crate::{snp, tdx};

/// Evidence, and what it has to be bound to.
#[derive(Debug)]
pub(super) struct Bound<'a> {
    pub(super) tee: Tee,
    /// Report or quote.
    pub(super) report: &'a [u8],
    /// Certificates that came along, DER.
    pub(super) certificates: Vec<Vec<u8>>,
    pub(super) event_log: &'a [u8],
    /// By their names in the guest.
    pub(super) devices: Vec<Device>,
    pub(super) init_data: &'a [u8],
    /// What REPORT_DATA has to be.
    pub(super) report_data: [u8; 64],
    /// What the devices' nonce has to be.
    pub(super) device_nonce: [u8; 32],
    /// The pod; empty for a key broker's client.
    pub(super) pod_uid: &'a str,
    pub(super) audience: &'a str,
}

/// What was found out about it.
pub(super) struct Findings {
    pub(super) cpu: Verdict,
    pub(super) gpus: Option<Verdict>,
    init_data: InitData,
}

impl Findings {
    pub(super) fn all(&self) -> impl Iterator<Item = &Verdict> {
        std::iter::once(&self.cpu).chain(&self.gpus)
    }
}

/// Judges evidence.
///
/// # Errors
/// The first check that fails, or the policy's reasons.
pub(super) fn judge(
    inputs: &Inputs,
    bound: &Bound<'_>,
    now: u64,
) -> Result<Findings, VerifierError> {
    let findings = verify(inputs, bound, now)?;
    if let Some(check) = findings.all().flat_map(Verdict::failures).next() {
        return Err(Refusal::new(&check.name, &check.expected, &check.found).into());
    }
    if !findings.all().all(Verdict::accepted) {
        return Err(Refusal::new("verdict", "accepted", "not accepted").into());
    }
    let names = bound.devices.iter().map(|d| d.name.as_str());
    let subject = Subject {
        pod_uid: bound.pod_uid,
        audience: bound.audience,
        now,
        allow_simulated: inputs.allow_simulated,
        cpu: Some(&findings.cpu),
        gpus: findings.gpus.as_ref().map(|v| (v, names.collect())),
        init_data: findings.init_data.data.clone(),
    };
    let input = subject.to_json();
    let decision = inputs.policy.evaluate(&input).map_err(|e| match e {
        PolicyError::Evaluation(why) => Refusal::new("policy", "a decision", why),
        other => Refusal::new("policy", "a decision", other.to_string()),
    })?;
    if !decision.allow {
        return Err(Refusal::new("policy", "allow", decision.reasons.join("; ")).into());
    }
    Ok(findings)
}

fn verify(inputs: &Inputs, bound: &Bound<'_>, now: u64) -> Result<Findings, VerifierError> {
    let now = Timestamp(i64::try_from(now).unwrap_or(i64::MAX));
    let init_data = if bound.init_data.is_empty() {
        InitData::default()
    } else {
        InitData::parse(bound.init_data)
            .map_err(|e| refused("init-data", "init-data of version 0.1.0", &e))?
    };
    let cpu = match bound.tee {
        Tee::Snp => verify_snp(inputs, bound, now)?,
        Tee::Tdx => verify_tdx(inputs, bound, now)?,
    };
    let gpus = (!bound.devices.is_empty()).then(|| verify_gpus(inputs, bound, now));
    Ok(Findings {
        cpu,
        gpus,
        init_data,
    })
}

fn verify_snp(
    inputs: &Inputs,
    bound: &Bound<'_>,
    now: Timestamp,
) -> Result<Verdict, VerifierError> {
    let mut policy = inputs.references.snp_policy()?;
    let host_data = init_data::host_data(bound.init_data);
    same("host-data", policy.host_data.as_ref(), &host_data)?;
    policy.host_data = Some(host_data);
    policy.report_data = Some(bound.report_data);
    let given = &inputs.collateral;
    let pile = Collateral {
        certificates: [&given.certificates[..], &bound.certificates].concat(),
        crls: given.crls.clone(),
        ..Collateral::default()
    };
    let anchors = &inputs.anchors;
    Ok(snp::verify(bound.report, &pile, &policy, anchors, now))
}

fn verify_tdx(
    inputs: &Inputs,
    bound: &Bound<'_>,
    now: Timestamp,
) -> Result<Verdict, VerifierError> {
    let mut policy = inputs.references.tdx_policy()?;
    let id = init_data::mr_config_id(bound.init_data);
    same("mr-config-id", policy.mr_config_id.as_ref(), &id)?;
    policy.mr_config_id = Some(id);
    policy.report_data = Some(bound.report_data);
    let mut pile = Collateral {
        bundles: inputs.collateral.bundles.clone(),
        ..Collateral::default()
    };
    if !bound.event_log.is_empty() {
        pile.event_logs.push(bound.event_log.to_vec());
    }
    let anchors = &inputs.anchors;
    Ok(tdx::verify(bound.report, &pile, &policy, anchors, now))
}

fn verify_gpus(inputs: &Inputs, bound: &Bound<'_>, now: Timestamp) -> Verdict {
    let mut policy = inputs.references.nvidia_policy();
    policy.nonce = Some(bound.device_nonce);
    let (pile, anchors) = (&inputs.collateral, &inputs.anchors);
    nvidia::verify(&bound.devices, pile, &policy, anchors, now)
}

/// A reference value for what the init-data decides has to agree with it.
fn same<const N: usize>(
    check: &str,
    reference: Option<&[u8; N]>,
    computed: &[u8; N],
) -> Result<(), Refusal> {
    match reference {
        Some(value) if value != computed => {
            let found = format!("{} (digest of the init-data)", hex(computed));
            Err(Refusal::new(check, hex(value), found))
        }
        _ => Ok(()),
    }
}

pub(super) fn tee_name(tee: Tee) -> &'static str {
    match tee {
        Tee::Snp => "snp",
        Tee::Tdx => "tdx",
    }
}
