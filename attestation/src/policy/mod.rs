//! The appraisal policy: Rego (`regorus`) over what the verifiers found. It runs after the built-in
//! checks and can only refuse more. A policy is the package `sealpod` with a rule `allow` and,
//! for the reasons, a set `deny` of texts; both are evaluated, and evidence is allowed when `allow`
//! is true and `deny` is empty or absent. Policies read no clock, file or network: only the input.

use std::num::NonZeroU32;
use std::time::Duration;

use regorus::Engine;
use regorus::utils::limits::ExecutionTimerConfig;
use serde_json::Value;

use crate::crypto::sha384;
use crate::encoding::hex;

/// Longest policy.
pub const MAX_POLICY: usize = 256 << 10;
/// Longest time that one evaluation may take.
const TIME_LIMIT: Duration = Duration::from_millis(250);
/// Steps between looks at the clock.
const TIME_STEPS: NonZeroU32 = NonZeroU32::new(1024).expect("not zero");
const DEFAULT: &str = include_str!("default.rego");
const ALLOW: &str = "data.sealpod.allow";
const DENY: &str = "data.sealpod.deny";
/// What regorus says of a rule that a policy does not have; a test holds it to that.
const NO_SUCH_RULE: &str = "not a valid rule path";

/// Why a policy cannot be used, or did not come to a decision.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// Too long.
    #[error("Policy has {0} bytes; at most {MAX_POLICY} are read")]
    Size(usize),
    /// Not Rego.
    #[error("Policy cannot be read: {0}")]
    Syntax(String),
    /// Another package, or no rule.
    #[error("Policy is not a package sealpod with a rule allow")]
    Rule,
    /// It failed while it ran.
    #[error("Policy failed: {0}")]
    Evaluation(String),
}

/// What a policy says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Whether the evidence is allowed.
    pub allow: bool,
    /// Why not.
    pub reasons: Vec<String>,
}

/// A policy, compiled.
#[derive(Clone)]
pub struct Policy {
    engine: Engine,
    digest: [u8; 48],
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Policy(sha384:{})", hex(&self.digest))
    }
}

impl Policy {
    /// The policy that comes with the program: production anchors unless the configuration says
    /// otherwise, no debug, measurement and minimum TCB compared with reference values.
    ///
    /// # Errors
    /// Never: a test compiles it.
    pub fn built_in() -> Result<Self, PolicyError> {
        Self::from_rego(DEFAULT)
    }

    /// A policy from its text.
    ///
    /// # Errors
    /// When it is not Rego, or not a package `sealpod` with a rule `allow`.
    pub fn from_rego(text: &str) -> Result<Self, PolicyError> {
        if text.len() > MAX_POLICY {
            return Err(PolicyError::Size(text.len()));
        }
        let mut engine = Engine::new();
        let package = engine.add_policy("policy.rego".into(), text.into());
        let package = package.map_err(|e| PolicyError::Syntax(one_line(&e.to_string())))?;
        if package != "data.sealpod" {
            return Err(PolicyError::Rule);
        }
        engine.set_execution_timer_config(ExecutionTimerConfig {
            limit: TIME_LIMIT,
            check_interval: TIME_STEPS,
        });
        let policy = Self {
            engine,
            digest: sha384(text.as_bytes()),
        };
        // Compiles all of it now, and finds out whether the rule exists.
        let probe = policy.engine.clone().eval_rule(ALLOW.into());
        probe.map_err(|e| PolicyError::Syntax(one_line(&e.to_string())))?;
        Ok(policy)
    }

    /// SHA-384 of its text.
    pub fn digest(&self) -> &[u8; 48] {
        &self.digest
    }

    /// Decides about an input.
    ///
    /// # Errors
    /// When the policy fails or takes too long; then nothing is allowed.
    pub fn evaluate(&self, input: &Value) -> Result<Decision, PolicyError> {
        let failed = |e: &dyn std::fmt::Display| PolicyError::Evaluation(one_line(&e.to_string()));
        let mut engine = self.engine.clone();
        engine.set_input(regorus::Value::from(input.clone()));
        let allow = engine.eval_rule(ALLOW.into()).map_err(|e| failed(&e))?;
        let mut reasons: Vec<String> = Vec::new();
        match engine.eval_rule(DENY.into()) {
            // No reason.
            Ok(regorus::Value::Undefined) => {}
            Ok(regorus::Value::Set(deny)) => {
                for reason in deny.iter() {
                    reasons.push(reason.as_string().map_or_else(
                        |_| one_line(&reason.to_string()),
                        |text| one_line(text.as_ref()),
                    ));
                }
            }
            Ok(_) => return Err(failed(&"deny is not a set")),
            // A policy without a set of reasons is fine; one whose reasons fail is not.
            Err(error) if error.to_string() == NO_SUCH_RULE => {}
            Err(error) => return Err(failed(&error)),
        }
        let allow = allow == regorus::Value::from(true) && reasons.is_empty();
        if !allow && reasons.is_empty() {
            reasons.push("the policy does not allow it and gives no reason".into());
        }
        Ok(Decision { allow, reasons })
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .take(400)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn good() -> Value {
        json!({
            "simulated": false, "allow_simulated": false,
            "cpu": {
                "tee": "snp", "claims": {"policy": {"debug": false}},
                "checks": {"report-data": "pass", "host-data": "pass", "measurement": "pass", "tcb-minimum": "pass"},
            },
            "gpus": [],
        })
    }

    fn decide(change: impl Fn(&mut Value)) -> Decision {
        let mut input = good();
        change(&mut input);
        Policy::built_in().unwrap().evaluate(&input).unwrap()
    }

    #[test]
    fn the_default_policy_allows_production_evidence_with_all_reference_values() {
        let decision = decide(|_| {});
        assert!(decision.allow, "{decision:?}");
        let named = decide(|i| {
            i["simulated"] = true.into();
            i["allow_simulated"] = true.into();
        });
        assert!(named.allow, "{named:?}");
        let gpu = decide(|i| {
            i["gpus"] = json!([{"device_id": "g", "checks": {
                "nonce": "pass", "report-signature": "pass", "chain": "pass", "measurements": "pass"}}]);
        });
        assert!(gpu.allow, "{gpu:?}");
    }

    #[test]
    fn the_default_policy_says_why_it_refuses() {
        let refused = |change: &dyn Fn(&mut Value), reason: &str| {
            let decision = decide(change);
            assert!(
                !decision.allow && decision.reasons.iter().any(|r| r.contains(reason)),
                "{reason}: {decision:?}"
            );
        };
        refused(&|i| i["simulated"] = true.into(), "simulated anchors");
        refused(
            &|i| i["cpu"]["claims"]["policy"]["debug"] = true.into(),
            "debug",
        );
        refused(
            &|i| i["cpu"]["checks"]["measurement"] = "not-checked".into(),
            "measurement",
        );
        refused(
            &|i| {
                drop(
                    i["cpu"]["checks"]
                        .as_object_mut()
                        .unwrap()
                        .remove("tcb-minimum"),
                )
            },
            "tcb-minimum",
        );
        refused(&|i| i["cpu"]["tee"] = "sev".into(), "sev");
        // Whatever is missing is not as it should be.
        refused(&|i| i["cpu"] = Value::Null, "no rule");
        refused(
            &|i| drop(i.as_object_mut().unwrap().remove("cpu")),
            "no rule",
        );
        refused(&|i| i["cpu"]["checks"] = Value::Null, "measurement");
        refused(&|i| i["cpu"]["claims"] = Value::Null, "debug");
        refused(&|i| i["simulated"] = Value::Null, "simulated anchors");
        refused(
            &|i| drop(i.as_object_mut().unwrap().remove("gpus")),
            "no list of devices",
        );
        refused(
            &|i| i["gpus"] = json!([{"device_id": "g1", "checks": {"nonce": "pass"}}]),
            "g1",
        );
    }

    #[test]
    fn policies_that_are_not_policies_are_refused() {
        for text in [
            "",
            "package other\nallow := true",
            "package sealpod\nallow if {",
            "package sealpod\nx := 1",
            "package sealpod\nallow := http.send({})",
        ] {
            assert!(Policy::from_rego(text).is_err(), "{text}");
        }
        assert!(matches!(
            Policy::from_rego(&"#".repeat(MAX_POLICY + 1)),
            Err(PolicyError::Size(_))
        ));
    }

    #[test]
    fn a_policy_of_ones_own_decides_and_endless_ones_are_stopped() {
        let policy =
            Policy::from_rego("package sealpod\nimport rego.v1\nallow if input.x == 1").unwrap();
        assert!(policy.evaluate(&json!({"x": 1})).unwrap().allow);
        let no = policy.evaluate(&json!({"x": 2})).unwrap();
        assert!(!no.allow && no.reasons.len() == 1);
        let both = "package sealpod\nimport rego.v1\nallow := true\ndeny contains \"never\"";
        assert_eq!(
            Policy::from_rego(both)
                .unwrap()
                .evaluate(&json!({}))
                .unwrap(),
            Decision {
                allow: false,
                reasons: vec!["never".into()]
            }
        );
        // Reasons that cannot be found out, and reasons that are none, allow nothing.
        for deny in [
            "deny contains x if some x in numbers.range(1, to_number(input.n))",
            "deny := [\"a list\"]",
        ] {
            let text = format!("package sealpod\nimport rego.v1\nallow := true\n{deny}");
            let result = Policy::from_rego(&text)
                .unwrap()
                .evaluate(&json!({"n": "x"}));
            assert!(result.is_err(), "{deny}: {result:?}");
        }
        let text = "package sealpod\nimport rego.v1\nallow if {\n\tsome a in numbers.range(1, input.n)\n\tsome b in numbers.range(1, input.n)\n\tsome c in numbers.range(1, input.n)\n\ta + b + c == 0\n}";
        let endless = Policy::from_rego(text).unwrap();
        assert!(endless.evaluate(&json!({"n": 3000})).is_err());
    }
}
