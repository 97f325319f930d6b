//! The verdict: every check that was made, what it expected, what it found. Verifiers only add
//! checks; whether evidence is accepted is decided here, from the checks alone.

use std::fmt;

use serde::Serialize;
use serde_json::Value;

use crate::time::Timestamp;

/// How one check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// Found is as expected.
    Pass,
    /// Found is not as expected: the evidence is refused.
    Fail,
    /// Nothing was given to compare with.
    NotChecked,
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked, as a stable identifier: `report-signature`.
    pub name: String,
    /// What is accepted.
    pub expected: String,
    /// What the evidence holds.
    pub found: String,
    /// How it ended.
    pub outcome: Outcome,
}

/// The kind of evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tee {
    /// AMD SEV-SNP attestation report.
    Snp,
    /// Intel TDX quote.
    Tdx,
    /// NVIDIA GPU or NVSwitch attestation reports.
    Nvidia,
}

impl fmt::Display for Tee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Snp => "snp",
            Self::Tdx => "tdx",
            Self::Nvidia => "nvidia",
        })
    }
}

/// What became of the evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// No check failed.
    Accepted,
    /// A check failed.
    Refused,
    /// The evidence is not of its format at all.
    Unreadable,
}

/// Everything a verifier has to say about one piece of evidence.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// The kind of evidence.
    pub tee: Tee,
    /// The decision.
    pub status: Status,
    /// Whether the anchors it rests on are simulated.
    pub simulated: bool,
    /// All checks, in the order in which they were made.
    pub checks: Vec<Check>,
    /// What the evidence says, decoded, for a policy to judge.
    pub claims: Value,
    /// The earliest end of what the verdict rests on (collateral, OCSP, RIMs, certificates).
    pub expires: Option<Timestamp>,
}

impl Verdict {
    /// Whether the evidence may be believed. Nothing but this may open a gate.
    pub fn accepted(&self) -> bool {
        self.status == Status::Accepted
    }

    /// Whether everything that can be checked was checked and passed.
    pub fn complete(&self) -> bool {
        self.accepted() && self.checks.iter().all(|c| c.outcome == Outcome::Pass)
    }

    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|c| c.outcome == Outcome::Fail)
    }

    /// The check of this name.
    pub fn check(&self, name: &str) -> Option<&Check> {
        self.checks.iter().find(|c| c.name == name)
    }
}

/// Collects checks while a verifier works.
#[derive(Debug)]
pub struct Checks {
    tee: Tee,
    prefix: String,
    list: Vec<Check>,
    expires: Option<Timestamp>,
    unreadable: bool,
}

impl Checks {
    /// None yet.
    pub fn new(tee: Tee) -> Self {
        Self {
            tee,
            prefix: String::new(),
            list: Vec::new(),
            expires: None,
            unreadable: false,
        }
    }

    /// Names the checks that follow `prefix` + name: which of several devices they are about.
    pub fn set_prefix(&mut self, prefix: impl Into<String>) {
        self.prefix = prefix.into();
    }

    fn push(&mut self, name: &str, expected: String, found: String, outcome: Outcome) {
        self.list.push(Check {
            name: format!("{}{name}", self.prefix),
            expected,
            found,
            outcome,
        });
    }

    /// Adds a check that passes if `ok`; returns `ok`.
    pub fn require(
        &mut self,
        name: &str,
        ok: bool,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> bool {
        self.push(
            name,
            expected.to_string(),
            found.to_string(),
            if ok { Outcome::Pass } else { Outcome::Fail },
        );
        ok
    }

    /// Adds a check that failed.
    pub fn fail(&mut self, name: &str, expected: impl fmt::Display, found: impl fmt::Display) {
        self.require(name, false, expected, found);
    }

    /// Adds a check from a result: its error is what was found.
    pub fn result<T, E: std::error::Error>(
        &mut self,
        name: &str,
        expected: impl fmt::Display,
        result: Result<T, E>,
    ) -> Option<T> {
        match result {
            Ok(value) => {
                self.require(name, true, &expected, &expected);
                Some(value)
            }
            Err(error) => {
                self.fail(name, expected, chain_text(&error));
                None
            }
        }
    }

    /// Notes that there was nothing to compare `found` with.
    pub fn not_checked(
        &mut self,
        name: &str,
        missing: impl fmt::Display,
        found: impl fmt::Display,
    ) {
        self.push(
            name,
            format!("({missing})"),
            found.to_string(),
            Outcome::NotChecked,
        );
    }

    /// Compares with what is expected, where something is.
    pub fn compare<T: PartialEq>(
        &mut self,
        name: &str,
        expected: Option<&T>,
        found: &T,
        text: impl Fn(&T) -> String,
    ) {
        match expected {
            Some(value) => {
                self.require(name, value == found, text(value), text(found));
            }
            None => self.not_checked(name, "no expected value given", text(found)),
        }
    }

    /// Notes that the evidence is not of its format: nothing else can be said about it.
    pub fn unreadable<E: std::error::Error>(
        &mut self,
        name: &str,
        expected: impl fmt::Display,
        error: &E,
    ) {
        self.fail(name, expected, chain_text(error));
        self.unreadable = true;
    }

    /// Notes that what was checked holds until `end`.
    pub fn valid_until(&mut self, end: Timestamp) {
        self.expires = Some(self.expires.map_or(end, |e| e.min(end)));
    }

    /// Whether a check has failed so far.
    pub fn any_failed(&self) -> bool {
        self.list.iter().any(|c| c.outcome == Outcome::Fail)
    }

    /// Decides. Evidence about which nothing was checked is refused.
    pub fn into_verdict(self, simulated: bool, claims: Value) -> Verdict {
        let status = if self.unreadable {
            Status::Unreadable
        } else if self.any_failed() || self.list.is_empty() {
            Status::Refused
        } else {
            Status::Accepted
        };
        Verdict {
            tee: self.tee,
            status,
            simulated,
            checks: self.list,
            claims,
            expires: self.expires,
        }
    }
}

/// An error and its causes in one line.
pub fn chain_text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_check_at_all_is_a_refusal() {
        assert_eq!(
            Checks::new(Tee::Snp)
                .into_verdict(false, Value::Null)
                .status,
            Status::Refused
        );
    }

    #[test]
    fn one_failure_refuses_and_the_earliest_end_counts() {
        let mut checks = Checks::new(Tee::Tdx);
        checks.require("a", true, 1, 1);
        checks.valid_until(Timestamp(20));
        checks.valid_until(Timestamp(10));
        checks.not_checked("b", "nothing given", 2);
        assert!(!checks.any_failed());
        checks.fail("c", "x", "y");
        let verdict = checks.into_verdict(false, Value::Null);
        assert_eq!(
            (verdict.status, verdict.expires),
            (Status::Refused, Some(Timestamp(10)))
        );
        assert_eq!(
            verdict
                .failures()
                .map(|c| c.name.as_str())
                .collect::<Vec<_>>(),
            ["c"]
        );
        assert!(!verdict.complete());
    }
}
