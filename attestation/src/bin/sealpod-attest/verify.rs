//! `verify`: evidence and everything that it is compared with, from files and options.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use sealpod_attestation::appraise::Subject;
use sealpod_attestation::policy::Policy;
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::verdict::Tee;
use sealpod_attestation::{
    Check, Collateral, Outcome, Status, Timestamp, TrustAnchors, Verdict, nvidia, snp, tdx,
};

use crate::{Done, input, output};

#[derive(Clone, Copy, ValueEnum)]
enum TeeArg {
    Snp,
    Tdx,
    Nvidia,
}

#[derive(Args)]
pub(crate) struct VerifyArgs {
    /// Evidence: an SNP report, a TDX quote, or GPU evidence (several files for several devices)
    #[arg(required = true)]
    evidence: Vec<PathBuf>,
    /// Kind of evidence; recognised by content if absent
    #[arg(long)]
    tee: Option<TeeArg>,
    /// Certificates of the signing key's chain (PEM, DER, AMD certificate table); file or folder
    #[arg(long)]
    endorsement: Vec<PathBuf>,
    /// TDX collateral, OCSP responses, RIMs, event logs; file or folder
    #[arg(long)]
    collateral: Vec<PathBuf>,
    /// Certificate revocation lists
    #[arg(long)]
    crl: Vec<PathBuf>,
    /// Reference values and limits (JSON), or RIMs
    #[arg(long)]
    reference_values: Vec<PathBuf>,
    /// Policy (Rego) that has to allow it as well; `default` is the one that gates use
    #[arg(long)]
    policy: Option<PathBuf>,
    /// Trust anchors to use instead of the production ones; the verdict is marked as simulated
    #[arg(long)]
    anchors: Option<PathBuf>,
    /// Nonce of the GPU evidence, 32 bytes: hexadecimal or @FILE
    #[arg(long)]
    nonce: Option<String>,
    /// REPORT_DATA, 64 bytes: hexadecimal or @FILE
    #[arg(long)]
    report_data: Option<String>,
    /// HOST_DATA of an SNP report, 32 bytes: hexadecimal or @FILE
    #[arg(long)]
    host_data: Option<String>,
    /// MRCONFIGID of a TDX quote, 48 bytes: hexadecimal or @FILE
    #[arg(long)]
    mr_config_id: Option<String>,
    /// Time of verification, UTC: 2026-11-21T09:00:00Z, a date, or seconds since 1970
    #[arg(long)]
    now: Option<Timestamp>,
    /// Refuse when anything could not be checked for want of something to compare with
    #[arg(long)]
    strict: bool,
    /// Print the verdict as JSON
    #[arg(long)]
    json: bool,
    /// Write the checks as a JUnit file
    #[arg(long)]
    junit: Option<PathBuf>,
}

pub(crate) fn run(args: &VerifyArgs) -> anyhow::Result<Done> {
    let verdict = appraise(args)?;
    if let Some(path) = &args.junit {
        let suite = args.evidence[0].display().to_string();
        std::fs::write(path, output::junit(&verdict, &suite))
            .with_context(|| format!("Cannot write {}", path.display()))?;
    }
    let unreadable = verdict.status == Status::Unreadable;
    if args.json {
        output::print(&(serde_json::to_string_pretty(&verdict)? + "\n"))?;
    } else if !unreadable {
        output::print(&output::table(&verdict))?;
    }
    match verdict.status {
        Status::Accepted => Ok(Done::Accepted),
        Status::Refused => Ok(Done::Refused),
        Status::Unreadable => {
            let why = verdict.failures().next().map(output::explain);
            bail!(
                "{}: {}",
                args.evidence[0].display(),
                why.unwrap_or_default()
            )
        }
    }
}

fn appraise(args: &VerifyArgs) -> anyhow::Result<Verdict> {
    let (pile, references) = gather(args)?;
    let anchors = match &args.anchors {
        Some(path) => TrustAnchors::from_file_text(&text(path)?)
            .with_context(|| format!("{} cannot be used", path.display()))?,
        None => TrustAnchors::production(),
    };
    let now = input::now(args.now);
    let mut evidence = args
        .evidence
        .iter()
        .map(|p| input::read_evidence(p))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let tee = match args.tee {
        Some(TeeArg::Snp) => Tee::Snp,
        Some(TeeArg::Tdx) => Tee::Tdx,
        Some(TeeArg::Nvidia) => Tee::Nvidia,
        None => {
            let unknown = || {
                format!(
                    "{} is no known evidence; name its kind with --tee",
                    args.evidence[0].display()
                )
            };
            input::detect(&evidence[0]).with_context(unknown)?
        }
    };
    misused(args, tee)?;
    let mut names = Vec::new();
    let verdict = match tee {
        Tee::Snp => {
            let mut policy = references.snp_policy()?;
            policy.report_data = input::exact("report-data", args.report_data.as_ref())?;
            policy.host_data =
                input::exact("host-data", args.host_data.as_ref())?.or(policy.host_data);
            snp::verify(&evidence[0], &pile, &policy, &anchors, now)
        }
        Tee::Tdx => {
            let mut policy = references.tdx_policy()?;
            policy.report_data = input::exact("report-data", args.report_data.as_ref())?;
            policy.mr_config_id =
                input::exact("mr-config-id", args.mr_config_id.as_ref())?.or(policy.mr_config_id);
            if tdx::TdReport::parse(&evidence[0]).is_ok() {
                bail!(
                    "{} is a TDREPORT, which only its own machine can check; a quote is needed",
                    args.evidence[0].display()
                );
            }
            tdx::verify(&evidence[0], &pile, &policy, &anchors, now)
        }
        Tee::Nvidia => {
            let mut policy = references.nvidia_policy();
            policy.nonce = input::exact("nonce", args.nonce.as_ref())?;
            let mut devices = Vec::new();
            for (path, bytes) in args.evidence.iter().zip(evidence.drain(..)) {
                devices.extend(input::devices(path, bytes)?);
            }
            names.extend(devices.iter().map(|d| d.name.clone()));
            nvidia::verify(&devices, &pile, &policy, &anchors, now)
        }
    };
    let verdict = if args.strict {
        strict(verdict)
    } else {
        verdict
    };
    match &args.policy {
        Some(path) => apply_policy(args, path, verdict, &names, now),
        None => Ok(verdict),
    }
}

/// Adds what the policy says as one more check. Evidence that is refused already is not its business.
fn apply_policy(
    args: &VerifyArgs,
    path: &Path,
    mut verdict: Verdict,
    names: &[String],
    now: Timestamp,
) -> anyhow::Result<Verdict> {
    let policy = if path == Path::new("default") {
        Policy::built_in()?
    } else {
        Policy::from_rego(&text(path)?)
            .with_context(|| format!("{} cannot be used", path.display()))?
    };
    if !verdict.accepted() {
        return Ok(verdict);
    }
    let devices = names.iter().map(String::as_str).collect();
    let of_gpus = verdict.tee == Tee::Nvidia;
    let subject = Subject {
        now: u64::try_from(now.0).unwrap_or(0),
        allow_simulated: args.anchors.is_some(),
        cpu: (!of_gpus).then_some(&verdict),
        gpus: of_gpus.then_some((&verdict, devices)),
        ..Subject::default()
    };
    let (allow, found) = match policy.evaluate(&subject.to_json()) {
        Ok(decision) => (decision.allow, decision.reasons.join("; ")),
        Err(error) => (false, error.to_string()),
    };
    verdict.checks.push(Check {
        name: "policy".into(),
        expected: "allow".into(),
        found: if allow { "allow".into() } else { found },
        outcome: if allow { Outcome::Pass } else { Outcome::Fail },
    });
    if !allow {
        verdict.status = Status::Refused;
    }
    Ok(verdict)
}

/// Options that mean nothing for this kind of evidence are errors: nobody should believe that
/// something was compared.
fn misused(args: &VerifyArgs, tee: Tee) -> anyhow::Result<()> {
    let wrong = |option: &str, given: bool, allowed: &[Tee]| {
        if given && !allowed.contains(&tee) {
            bail!("--{option} does not apply to {tee} evidence");
        }
        Ok(())
    };
    wrong("nonce", args.nonce.is_some(), &[Tee::Nvidia])?;
    wrong(
        "report-data",
        args.report_data.is_some(),
        &[Tee::Snp, Tee::Tdx],
    )?;
    wrong("host-data", args.host_data.is_some(), &[Tee::Snp])?;
    wrong("mr-config-id", args.mr_config_id.is_some(), &[Tee::Tdx])?;
    if args.evidence.len() > 1 && tee != Tee::Nvidia {
        bail!(
            "{} evidence files; only GPU evidence is verified several at a time",
            args.evidence.len()
        );
    }
    Ok(())
}

/// Everything beside the evidence. Reference values are JSON with one of their keys at the top.
fn gather(args: &VerifyArgs) -> anyhow::Result<(Collateral, ReferenceValues)> {
    let mut pile = Collateral::default();
    let mut references = None;
    for path in args
        .endorsement
        .iter()
        .chain(&args.collateral)
        .chain(&args.crl)
    {
        input::add_collateral(&mut pile, path)?;
    }
    for path in &args.reference_values {
        if path.is_file() && text(path).is_ok_and(|t| t.trim_start().starts_with('{')) {
            if references.is_some() {
                bail!(
                    "{}: only one file of reference values can be given",
                    path.display()
                );
            }
            references = Some(
                ReferenceValues::parse(&text(path)?)
                    .with_context(|| format!("{} cannot be used", path.display()))?,
            );
        } else {
            input::add_collateral(&mut pile, path)?;
        }
    }
    Ok((pile, references.unwrap_or_default()))
}

fn text(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(input::read(path)?).with_context(|| format!("{} is not text", path.display()))
}

fn strict(mut verdict: Verdict) -> Verdict {
    for check in &mut verdict.checks {
        if check.outcome == Outcome::NotChecked {
            check.outcome = Outcome::Fail;
            if verdict.status == Status::Accepted {
                verdict.status = Status::Refused;
            }
        }
    }
    verdict
}
