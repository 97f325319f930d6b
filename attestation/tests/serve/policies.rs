//! The example policies in `configs/policies` decide what they say they do.

use sealpod_attestation::appraise::Subject;
use sealpod_attestation::evidence::Tee;
use sealpod_attestation::policy::Policy;
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::simulate::TdxClaims;
use sealpod_attestation::{Collateral, Timestamp, TrustAnchors, snp, tdx};
use serde_json::{Value, json};

use crate::lab::{GOOD, ca, cpu, now};

const STRICT: &str = include_str!("../../../configs/policies/strict.rego");
const BY_WORKLOAD: &str = include_str!("../../../configs/policies/by-workload.rego");

/// What a policy sees of good evidence with reference values for everything.
fn input(tee: Tee) -> Value {
    let minted = cpu(tee, [0; 64], b"", None);
    let mut pile = Collateral::default();
    for (_, bytes) in &minted.collateral {
        pile.add(bytes).unwrap();
    }
    let anchors = TrustAnchors::from_file_text(&ca().anchors_file()).unwrap();
    let time = Timestamp(now() as i64);
    let references = r#"{"snp":{"limits":{"minimum_tcb":{"snp":8}}}}"#;
    let references = ReferenceValues::parse(references).unwrap();
    let verdict = match tee {
        Tee::Snp => {
            pile.add(&minted.endorsements).unwrap();
            let mut policy = references.snp_policy().unwrap();
            policy.report_data = Some([0; 64]);
            policy.host_data = Some([0; 32]);
            policy.measurements = vec![GOOD];
            snp::verify(&minted.report, &pile, &policy, &anchors, time)
        }
        Tee::Tdx => {
            let mut policy = references.tdx_policy().unwrap();
            policy.report_data = Some([0; 64]);
            policy.mr_config_id = Some([0; 48]);
            policy.mr_td = vec![GOOD];
            let registers = TdxClaims::default().registers();
            policy.rtmr = registers.map(|r| vec![r]);
            tdx::verify(&minted.report, &pile, &policy, &anchors, time)
        }
    };
    assert!(
        verdict.accepted(),
        "{:?}",
        verdict.failures().collect::<Vec<_>>()
    );
    let subject = Subject {
        pod_uid: "pod",
        audience: "gate",
        now: now(),
        allow_simulated: true,
        cpu: Some(&verdict),
        ..Subject::default()
    };
    subject.to_json()
}

fn reasons(policy: &str, input: &Value) -> String {
    let decision = Policy::from_rego(policy).unwrap().evaluate(input).unwrap();
    assert_eq!(decision.allow, decision.reasons.is_empty());
    decision.reasons.join("; ")
}

#[test]
fn the_strict_policy_wants_real_hardware_and_every_check() {
    for tee in [Tee::Snp, Tee::Tdx] {
        let mut input = input(tee);
        assert_eq!(reasons(STRICT, &input), "only real hardware", "{tee:?}");
        input["simulated"] = false.into();
        assert_eq!(reasons(STRICT, &input), "", "{tee:?}");
        input["cpu"]["checks"]["report-data"] = "not-checked".into();
        assert!(reasons(STRICT, &input).contains("report-data"));
        input["gpus"] = json!([{ "device_id": "0000:01:00.0", "checks": {} }]);
        assert!(reasons(STRICT, &input).contains("device 0000:01:00.0: chain"));
    }
}

#[test]
fn the_policy_by_workload_reads_the_init_data() {
    for tee in [Tee::Snp, Tee::Tdx] {
        let mut input = input(tee);
        assert!(reasons(BY_WORKLOAD, &input).contains("no team"));
        input["init_data"] = json!({ "team": "web" });
        assert_eq!(reasons(BY_WORKLOAD, &input), "", "{tee:?}");
        input["gpus"] = json!([{ "device_id": "0000:01:00.0", "checks": {} }]);
        assert!(reasons(BY_WORKLOAD, &input).contains("0 devices"));
        input["init_data"] = json!({ "team": "research" });
        assert_eq!(reasons(BY_WORKLOAD, &input), "");
        input["allow_simulated"] = false.into();
        assert!(reasons(BY_WORKLOAD, &input).contains("simulated"));
    }
}
