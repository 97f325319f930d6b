//! What a policy sees (docs/attestation.md describes it): the same for a bundle that a verifier
//! appraises and for files on a command line.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::verdict::{Outcome, Verdict};

/// What a policy is asked about.
#[derive(Clone, Debug, Default)]
pub struct Subject<'a> {
    /// The pod's uid; empty where there is no pod.
    pub pod_uid: &'a str,
    /// Who will use the result.
    pub audience: &'a str,
    /// Seconds since 1970.
    pub now: u64,
    /// Whether the configuration names anchors from a file.
    pub allow_simulated: bool,
    /// The CPU's verdict.
    pub cpu: Option<&'a Verdict>,
    /// The verdict about all devices, and their names in its order.
    pub gpus: Option<(&'a Verdict, Vec<&'a str>)>,
    /// The entries of the init-data.
    pub init_data: BTreeMap<String, String>,
}

impl Subject<'_> {
    /// The input document.
    pub fn to_json(&self) -> Value {
        let mut gpus = Vec::new();
        if let Some((verdict, names)) = &self.gpus {
            for (n, name) in names.iter().enumerate() {
                // Of several devices, each one's checks carry its number.
                let prefix = if names.len() > 1 {
                    format!("{n}/")
                } else {
                    String::new()
                };
                gpus.push(json!({
                    "device_id": name,
                    "claims": verdict.claims["devices"][n],
                    "checks": outcomes(verdict, &prefix),
                }));
            }
        }
        let verdicts = self.cpu.into_iter().chain(self.gpus.as_ref().map(|g| g.0));
        let mut input = json!({
            "version": 1,
            "now": self.now,
            "pod": { "uid": self.pod_uid },
            "audience": self.audience,
            "simulated": verdicts.into_iter().any(|v| v.simulated),
            "allow_simulated": self.allow_simulated,
            "gpus": gpus,
            "init_data": self.init_data,
        });
        if let Some(verdict) = self.cpu {
            input["cpu"] = json!({
                "tee": verdict.tee,
                "claims": verdict.claims,
                "checks": outcomes(verdict, ""),
            });
        }
        input
    }
}

/// Check → `pass`, `fail` or `not-checked`.
fn outcomes(verdict: &Verdict, prefix: &str) -> Map<String, Value> {
    let mut map = Map::new();
    for check in &verdict.checks {
        if let Some(name) = check.name.strip_prefix(prefix) {
            let text = match check.outcome {
                Outcome::Pass => "pass",
                Outcome::Fail => "fail",
                Outcome::NotChecked => "not-checked",
            };
            // One name can stand for several certificates; the worst outcome is the one that counts.
            let worse = |old: &Value| old == "fail" || (old == "not-checked" && text == "pass");
            if !map.get(name).is_some_and(worse) {
                map.insert(name.to_owned(), text.into());
            }
        }
    }
    map
}
