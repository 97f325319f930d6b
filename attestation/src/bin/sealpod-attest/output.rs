//! Printing verdicts: a table for people, JSON and JUnit for machines. Everything printed that came
//! from evidence is escaped.

use std::fmt::Write as _;
use std::io::Write as _;

use sealpod_attestation::{Check, Outcome, Status, Verdict};

const WIDTH: usize = 72;

/// Prints to standard output. A reader that closed the pipe has seen enough: no error.
pub(crate) fn print(text: &str) -> std::io::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// The table of checks and the decision.
pub(crate) fn table(verdict: &Verdict) -> String {
    let mut out = String::new();
    let name = verdict
        .checks
        .iter()
        .map(|c| c.name.len())
        .max()
        .unwrap_or(0);
    for check in &verdict.checks {
        let mark = match check.outcome {
            Outcome::Pass => "ok  ",
            Outcome::Fail => "FAIL",
            Outcome::NotChecked => "-   ",
        };
        let (expected, found) = (clean(&check.expected), clean(&check.found));
        match check.outcome {
            Outcome::Fail => {
                let _ = writeln!(out, "{mark} {:<name$}  expected {expected}", check.name);
                let _ = writeln!(out, "     {:<name$}  found    {found}", "");
            }
            Outcome::Pass if expected == found => {
                let _ = writeln!(out, "{mark} {:<name$}  {}", check.name, cut(&found));
            }
            _ => {
                let _ = writeln!(
                    out,
                    "{mark} {:<name$}  {} | {}",
                    check.name,
                    cut(&expected),
                    cut(&found)
                );
            }
        }
    }
    let decision = match verdict.status {
        Status::Accepted => "ACCEPTED",
        Status::Refused => "REFUSED",
        Status::Unreadable => "UNREADABLE",
    };
    let unchecked = verdict
        .checks
        .iter()
        .filter(|c| c.outcome == Outcome::NotChecked)
        .count();
    let failed = verdict.failures().count();
    let _ = write!(
        out,
        "{decision}: {} {} checks, {failed} failed, {unchecked} not checked",
        verdict.tee,
        verdict.checks.len()
    );
    if let Some(end) = verdict.expires {
        let _ = write!(out, ", rests on collateral until {end}");
    }
    if verdict.simulated {
        let _ = write!(out, "; SIMULATED trust anchors");
    }
    out.push('\n');
    out
}

/// One test case for each check.
pub(crate) fn junit(verdict: &Verdict, suite: &str) -> String {
    let failures = verdict.failures().count();
    let skipped = verdict
        .checks
        .iter()
        .filter(|c| c.outcome == Outcome::NotChecked)
        .count();
    let mut out = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let total = verdict.checks.len();
    let _ = writeln!(
        out,
        "<testsuite name=\"{}\" tests=\"{total}\" failures=\"{failures}\" skipped=\"{skipped}\">",
        xml(suite)
    );
    for check in &verdict.checks {
        let _ = write!(
            out,
            "  <testcase classname=\"attestation.{}\" name=\"{}\"",
            verdict.tee,
            xml(&check.name)
        );
        let _ = match check.outcome {
            Outcome::Pass => writeln!(out, "/>"),
            Outcome::NotChecked => writeln!(
                out,
                "><skipped message=\"{}\"/></testcase>",
                xml(&check.expected)
            ),
            Outcome::Fail => writeln!(
                out,
                "><failure message=\"{}\"/></testcase>",
                xml(&explain(check))
            ),
        };
    }
    out + "</testsuite>\n"
}

/// A check in one line.
pub(crate) fn explain(check: &Check) -> String {
    let (expected, found) = (clean(&check.expected), clean(&check.found));
    format!("expected {expected}, found {found}")
}

fn xml(text: &str) -> String {
    clean(text)
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

/// Control characters would let evidence write to the terminal.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn cut(text: &str) -> String {
    if text.chars().count() <= WIDTH {
        text.to_owned()
    } else {
        text.chars().take(WIDTH - 1).chain(['…']).collect()
    }
}
