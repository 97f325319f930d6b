//! The host gate against an agent that is measured, expected and a liar: evidence that does not answer the
//! question opens nothing, and an agent that skips its own gate gets and keeps no device. The agent is
//! `tests/hostile-agent`.

use std::time::Duration;

use sealpod_tests::{
    Env, Version, assets,
    attest::{CONTENT, Node},
    need, wait,
};

use crate::attestation::{device, read_device};

const PATIENCE: Duration = Duration::from_secs(30);

/// A node whose pods have the hostile agent, which is expected to break the rules in this way.
fn node(way: &str) -> (Node, Vec<String>) {
    let node = Node {
        initramfs: Some(assets::hostile_initramfs().expect("checked before")),
        ..Node::default()
    };
    (node, vec![format!("hostile.agent={way}")])
}

/// The options of a pod of such a node.
fn options(words: &[String]) -> [String; 2] {
    let words = words.join(" ");
    [
        "--annotation".into(),
        format!("io.sealpod.kernel_params={words}"),
    ]
}

/// Has the node expect exactly such pods.
fn expect(env: &Env, node: &Node, words: &[String]) {
    env.reconfigure(node).unwrap();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    env.expect(&words).unwrap();
}

fn wait_for_status(env: &Env, id: &str, wanted: &str) {
    wait::until(wanted, PATIENCE, || {
        (env.ctr_status(id).as_deref() == Some(wanted)).then_some(())
    });
}

/// Nobody on the host or in a guest has the device any more.
fn wait_for_device(env: &Env) {
    wait::until("the device is back", PATIENCE, || {
        let busy = env.run("flock", &["-n", "content.img", "true"]);
        (busy.code == 0).then_some(())
    });
}

#[test]
fn evidence_that_answers_another_question_opens_nothing_though_its_measurement_is_expected() {
    need!(assets::complete());
    need!(assets::hostile_initramfs());
    let env = Env::attesting(Version::V1_7).unwrap();
    for way in ["stale-nonce", "other-pod", "other-key"] {
        let (node, words) = node(way);
        expect(&env, &node, &words);
        let [option, value] = options(&words);
        let done = read_device(&env, way, &[&option, &value]);
        assert_ne!(done.code, 0, "{way}");
        assert!(
            done.text().contains("check report-data"),
            "{way}: {}",
            done.text()
        );
        assert!(!done.stdout.contains(CONTENT), "{way}");
        wait_for_device(&env);
    }
    assert!(
        !env.audit().contains("\"verdict\":\"released\""),
        "{}",
        env.audit()
    );
    // One that breaks no rule is an agent like any other.
    let (node, words) = node("not");
    expect(&env, &node, &words);
    let [option, value] = options(&words);
    let done = read_device(&env, "honest", &[&option, &value]).ok();
    assert_eq!(done.stdout, CONTENT);
    env.assert_clean();
}

#[test]
fn replayed_evidence_renews_no_lease() {
    need!(assets::complete());
    need!(assets::hostile_initramfs());
    let env = Env::attesting(Version::V1_7).unwrap();
    let (mut node, words) = node("replay");
    node.lease_seconds = 2;
    expect(&env, &node, &words);
    let ([option, value], device, id) = (options(&words), device(), env.id("replay"));
    // The first answer is true.
    env.ctr_start(
        &["--annotation", &device, &option, &value],
        &id,
        &["sleep", "600"],
    );
    wait_for_status(&env, &id, "STOPPED");
    wait_for_device(&env);
    let audit = env.audit();
    for part in [
        "\"verdict\":\"released\"",
        "\"event\":\"revocation\"",
        "report-data",
    ] {
        assert!(audit.contains(part), "{part} is not in {audit}");
    }
    assert!(!audit.contains("\"event\":\"lease\""), "renewed: {audit}");
    env.ctr_remove(&id);
    env.assert_clean();
}

#[test]
fn an_agent_that_skips_its_gate_gets_no_device_before_the_token_and_keeps_none_after_its_lease() {
    need!(assets::complete());
    need!(assets::hostile_initramfs());
    let env = Env::attesting(Version::V1_7).unwrap();
    let (mut node, words) = node("open-gate");
    node.defect = "debug".into();
    expect(&env, &node, &words);
    let [option, value] = options(&words);
    let done = read_device(&env, "skips", &[&option, &value, "--privileged"]);
    assert!(done.text().contains("policy-debug"), "{}", done.text());
    assert!(!done.stdout.contains(CONTENT));
    wait_for_device(&env);

    // It is affirmed, gets the device, and says that it has given it back when it has not.
    node.defect.clear();
    node.lease_seconds = 2;
    expect(&env, &node, &words);
    let (device, id) = (device(), env.id("keeps"));
    env.ctr_start(
        &["--annotation", &device, &option, &value],
        &id,
        &["sleep", "600"],
    );
    env.expect(&["something.else=1"]).unwrap();
    wait_for_status(&env, &id, "STOPPED");
    wait_for_device(&env);
    assert!(env.audit().contains("\"event\":\"revocation\""));
    env.ctr_remove(&id);
    env.assert_clean();
}
