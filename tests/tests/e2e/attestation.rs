//! The two gates with real VMs: a device of the host is released to a pod that was affirmed, read from
//! inside it, and taken away when the pod no longer is. The TEE is simulated; everything else is what a
//! node does.

use std::time::{Duration, Instant};

use sealpod_tests::{
    Env, Version, assets,
    attest::{CONTENT, DEVICE, Node},
    need, wait,
};

const POLICY: [&str; 2] = ["--annotation", "io.sealpod.attestation.policy=default"];

pub(crate) fn device() -> String {
    format!("io.sealpod.attestation.devices={DEVICE}")
}

/// What a container prints that asks for the stand-in, and how it ends.
pub(crate) fn read_device(env: &Env, id: &str, more: &[&str]) -> sealpod_tests::env::Done {
    let device = device();
    let mut options = vec!["--annotation", &device];
    options.extend(more);
    let script = format!("head -c {} /dev/gpu0", CONTENT.len());
    env.ctr_run(&options, &env.id(id), &["sh", "-c", &script])
}

fn released(version: Version) {
    need!(assets::complete());
    let env = Env::attesting(version).unwrap();
    let done = read_device(&env, "reader", &[]).ok();
    assert_eq!(done.stdout, CONTENT);
    let audit = env.audit();
    assert!(audit.contains("\"verdict\":\"released\""), "{audit}");
    assert!(audit.contains("\"sim\":true"), "{audit}");

    // Before a release there is no such device in the guest, for no one in it.
    let look = "ls /sys/block; ls /dev; cat /proc/partitions";
    let without = env.ctr_run(&["--privileged"], &env.id("none"), &["sh", "-c", look]);
    assert!(!without.ok().stdout.contains("nvme"));
    env.assert_clean();
}

#[test]
fn a_device_is_released_to_an_affirmed_pod_and_read_from_inside() {
    released(Version::V1_7);
}

#[test]
fn a_device_is_released_by_containerd_2_1() {
    released(Version::V2_1);
}

#[test]
fn a_pod_that_is_not_affirmed_does_not_start_and_is_told_the_check() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    // Another command line is another measurement.
    let other = ["--annotation", "io.sealpod.kernel_params=sealed.not=1"];
    let done = read_device(&env, "measured", &other);
    assert_ne!(done.code, 0);
    assert!(done.text().contains("check measurement"), "{}", done.text());
    // Also where it wants no device.
    let all = [&POLICY[..], &other].concat();
    let done = env.ctr_run(&all, &env.id("policy"), &["echo", "ran"]);
    assert!(done.text().contains("check measurement"), "{}", done.text());
    assert!(!done.stdout.contains("ran"));

    // The last: evidence of another nonce, key or pod, as a replay has it.
    for (defect, check) in [
        ("debug", "policy-debug"),
        ("unknown-root", "vek-chain"),
        ("expired-certificate", "vek-chain"),
        ("wrong-key", "report-signature"),
        ("tampered", "report-signature"),
        ("report-data", "report-data"),
    ] {
        let node = Node {
            defect: defect.into(),
            ..Node::default()
        };
        env.reconfigure(&node).unwrap();
        let done = read_device(&env, defect, &[]);
        assert!(done.text().contains(check), "{defect}: {}", done.text());
        assert!(!done.stdout.contains(CONTENT));
    }
    let down = Node {
        more: format!(
            "verifier = \"https://127.0.0.1:1\"\nverifier_trust = \"{}\"\n",
            env.folder().join("pin").display()
        ),
        ..Node::default()
    };
    std::fs::write(env.folder().join("pin"), "00".repeat(48)).unwrap();
    env.reconfigure(&down).unwrap();
    let done = read_device(&env, "down", &[]);
    assert!(done.text().contains("Cannot connect"), "{}", done.text());

    let audit = env.audit();
    assert!(!audit.contains("\"verdict\":\"released\""), "{audit}");
    env.assert_clean();
}

#[test]
fn a_lease_is_renewed_and_its_loss_takes_the_device_away() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    let refs = std::fs::read(env.folder().join("refs.json")).unwrap();
    for on_loss in ["kill", "freeze"] {
        let node = Node {
            lease_seconds: 2,
            on_loss: on_loss.into(),
            ..Node::default()
        };
        std::fs::write(env.folder().join("refs.json"), &refs).unwrap();
        env.reconfigure(&node).unwrap();
        let (id, device) = (env.id(on_loss), device());
        env.ctr_start(&["--annotation", &device], &id, &["sleep", "600"]);
        let patience = Duration::from_secs(30);
        wait::until("a renewal", patience, || {
            let audit = env.audit();
            (audit.matches("\"event\":\"lease\"").count() > 0).then_some(())
        });
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        env.expect(&["something.else=1"]).unwrap();
        let wanted = if on_loss == "kill" {
            "STOPPED"
        } else {
            "PAUSED"
        };
        wait::until(wanted, patience, || {
            (env.ctr_status(&id).as_deref() == Some(wanted)).then_some(())
        });
        let began = Instant::now();
        wait::until("the device is back", patience, || {
            let busy = env.run("flock", &["-n", "content.img", "true"]);
            (busy.code == 0).then_some(())
        });
        eprintln!("{on_loss}: the device is back after {:?}", began.elapsed());
        assert_eq!(env.ctr_status(&id).as_deref(), Some(wanted));
        assert!(env.audit().contains("\"event\":\"revocation\""));
        env.ctr_remove(&id);
        for log in env.audit_logs() {
            std::fs::remove_file(log).unwrap();
        }
    }
    env.assert_clean();
}

#[test]
fn a_pod_without_a_device_is_renewed_too_and_ends_or_stands_still_when_it_is_refused() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    for (on_loss, wanted) in [("kill", "STOPPED"), ("freeze", "PAUSED")] {
        let node = Node {
            lease_seconds: 2,
            on_loss: on_loss.into(),
            ..Node::default()
        };
        env.reconfigure(&node).unwrap();
        env.expect_pod_without_devices(&[]).unwrap();
        let id = env.id(&format!("policy-{on_loss}"));
        env.ctr_start(&POLICY, &id, &["sleep", "600"]);
        let patience = Duration::from_secs(30);
        wait::until("a renewal", patience, || {
            env.audit().contains("\"event\":\"lease\"").then_some(())
        });
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        env.expect_pod_without_devices(&["something.else=1"])
            .unwrap();
        wait::until(wanted, patience, || {
            (env.ctr_status(&id).as_deref() == Some(wanted)).then_some(())
        });
        assert!(env.audit().contains("\"event\":\"revocation\""));
        env.ctr_remove(&id);
        for log in env.audit_logs() {
            std::fs::remove_file(log).unwrap();
        }
    }
    env.assert_clean();
}

/// A specification of the Container Device Interface whose device is made of the stand-in's content.
fn write_cdi(env: &Env) {
    let at = |name: &str| env.folder().join(name);
    let text = format!(
        "cdiVersion: 0.6.0\nkind: sealpod.io/cdi\ndevices:\n    - name: gpu1\n      containerEdits:\n\
         \x20       env:\n            - CDI_GPU=gpu1\n        deviceNodes:\n            - path: /dev/cdi-gpu\n\
         \x20             hostPath: {}\n              permissions: r\n",
        at("content.img").display()
    );
    std::fs::write(at("cdi.yaml"), text).unwrap();
    let device = format!(
        "[attestation.devices.\"sealpod.io/cdi=gpu1\"]\nkind = \"cdi\"\nspec = \"{}\"\n",
        at("cdi.yaml").display()
    );
    std::fs::create_dir_all(at("sealpod.toml.d")).unwrap();
    std::fs::write(at("sealpod.toml.d/cdi.toml"), device).unwrap();
}

#[test]
fn a_device_by_cdi_is_withheld_until_the_token_and_taken_away_after() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    write_cdi(&env);
    let asks = [
        "--annotation",
        "io.sealpod.attestation.devices=sealpod.io/cdi=gpu1",
    ];
    let script = format!("echo $CDI_GPU; head -c {} /dev/cdi-gpu", CONTENT.len());
    let other = ["--annotation", "io.sealpod.kernel_params=sealed.not=1"];
    let refused = [&asks[..], &other].concat();
    let done = env.ctr_run(&refused, &env.id("refused"), &["sh", "-c", &script]);
    assert!(done.text().contains("check measurement"), "{}", done.text());
    assert!(!done.stdout.contains(CONTENT) && !done.stdout.contains("gpu1"));

    let done = env.ctr_run(&asks, &env.id("cdi"), &["sh", "-c", &script]);
    assert_eq!(done.ok().stdout, format!("gpu1\n{CONTENT}"));

    let node = Node {
        lease_seconds: 2,
        on_loss: "freeze".into(),
        ..Node::default()
    };
    env.reconfigure(&node).unwrap();
    let id = env.id("lost");
    env.ctr_start(&asks, &id, &["sleep", "600"]);
    env.expect(&["something.else=1"]).unwrap();
    let patience = Duration::from_secs(30);
    wait::until("PAUSED", patience, || {
        (env.ctr_status(&id).as_deref() == Some("PAUSED")).then_some(())
    });
    wait::until("the device is back", patience, || {
        let busy = env.run("flock", &["-n", "content.img", "true"]);
        (busy.code == 0).then_some(())
    });
    env.ctr_remove(&id);
    env.assert_clean();
}

#[test]
fn the_audit_log_of_a_pod_verifies_and_a_changed_line_is_found() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    let _ = read_device(&env, "a", &[]).ok();
    let log = env.audit_logs().pop().expect("a log");
    let path = log.to_string_lossy().into_owned();
    let key = env.verifier_key();
    let verify = ["audit", "verify", "--key", &key, &path];
    let _ = env.run("sealpod-attest", &verify).ok();
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::write(&log, text.replacen("released", "withheld", 1)).unwrap();
    let done = env.run("sealpod-attest", &verify);
    assert_ne!(done.code, 0, "{}", done.text());
}

#[test]
fn a_device_is_released_to_a_simulated_td_and_only_to_the_one_that_is_expected() {
    need!(assets::complete());
    let env = Env::attesting(Version::V1_7).unwrap();
    let td = Node {
        tee: "tdx".into(),
        ..Node::default()
    };
    env.reconfigure(&td).unwrap();
    let done = read_device(&env, "td", &[]).ok();
    assert_eq!(done.stdout, CONTENT);
    let audit = env.audit();
    assert!(audit.contains("\"verdict\":\"released\""), "{audit}");
    // Another command line is another RTMR2.
    let other = ["--annotation", "io.sealpod.kernel_params=sealed.not=1"];
    let done = read_device(&env, "measured", &other);
    assert!(done.text().contains("check rtmr2"), "{}", done.text());
    let debug = Node {
        defect: "debug".into(),
        ..td.clone()
    };
    env.reconfigure(&debug).unwrap();
    let done = read_device(&env, "debug", &[]);
    assert!(done.text().contains("td-debug"), "{}", done.text());
    // The evidence is good, what it is judged by is out of date.
    env.reconfigure(&td).unwrap();
    let at = |name: &str| env.folder().join(name).to_string_lossy().into_owned();
    let (ca, out) = (at("ca"), at("minted"));
    let minted = ["simulate", "tdx", "--ca", &ca, "--output", &out];
    let expired = [&minted[..], &["--defect", "expired-collateral"]].concat();
    let _ = env.run("sealpod-attest", &expired).ok();
    let done = read_device(&env, "expired", &[]);
    assert!(done.text().contains("check tcb-info"), "{}", done.text());
    assert!(!done.stdout.contains(CONTENT));
    env.assert_clean();
}
