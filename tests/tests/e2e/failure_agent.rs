//! The guest's agent dies at every moment of a pod's life, and the guest with it. It is PID 1 there, which
//! no signal from inside kills: a container that sees the guest's processes and may trace them overwrites
//! the agent's code instead.

use std::{io::Read, time::Duration};

use sealpod_tests::{Env, Version, assets, need, only_sealpod, wait};
use serde_json::{Value, json};

use super::failure::{Moment, NOTICED, Victim};
use crate::on_every_containerd;

/// Waits for the file `/go`, then overwrites the agent.
const KILLER: &str = "until [ -e /go ]; do sleep 0.05; done; \
    range=$(grep r-xp /proc/1/maps | head -n 1 | cut -d ' ' -f 1); \
    from=$((0x${range%-*})); to=$((0x${range#*-})); \
    dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((from/4096)) count=$(((to-from)/4096)) \
    conv=notrunc; exec sleep 1000";

/// Makes it a container that can overwrite the agent.
fn killer(spec: &mut Value) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|n| n["type"] != "pid");
    let process = &mut spec["process"];
    process["args"] = json!(["sh", "-c", KILLER]);
    for set in ["bounding", "effective", "permitted"] {
        let set = process["capabilities"][set].as_array_mut().unwrap();
        set.push("CAP_SYS_PTRACE".into());
    }
}

/// Makes it the sandbox `pod`, or a container of it, in the words of the CRI.
fn belongs(spec: &mut Value, kind: &str, pod: &str) {
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.sandbox-id": pod,
    });
}

fn words(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn survives(version: Version, moment: Moment) {
    need!(assets::complete());
    only_sealpod!();
    let env = Env::new(version).unwrap();
    let (pod, armed, other) = (env.id("pod"), env.id("armed"), env.id("other"));
    let sandbox = env.spec_args("--detach", &pod, |spec| belongs(spec, "sandbox", &pod));
    let _ = env.ctr(&words(&sandbox)).ok();
    let member = env.spec_args("--detach", &armed, |spec| {
        belongs(spec, "container", &pod);
        killer(spec);
    });
    let _ = env.ctr(&words(&member)).ok();
    let idle = env.spec_args("--detach", &other, |spec| {
        belongs(spec, "container", &pod);
        spec["process"]["args"] = json!(["sleep", "1000"]);
    });
    let go = || std::fs::write(env.spec_root().join("go"), "").unwrap();
    let mut client = match moment {
        Moment::Idle => {
            go();
            None
        }
        Moment::Create => {
            go();
            Some(env.spawn("ctr", &words(&idle)))
        }
        Moment::Exec => {
            let mut client = env.spawn("ctr", &["task", "exec", "--exec-id", "e", &armed, "yes"]);
            let mut out = client.stdout.take().unwrap();
            out.read_exact(&mut vec![0; 100_000]).unwrap();
            go();
            std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
            Some(client)
        }
        Moment::Delete => {
            let _ = env.ctr(&words(&idle)).ok();
            let _ = env.ctr(&["task", "kill", "-s", "KILL", &other]).ok();
            wait::until("the task has ended", NOTICED, || {
                (env.ctr_status(&other).as_deref() == Some("STOPPED")).then_some(())
            });
            go();
            Some(env.spawn("ctr", &["task", "delete", &other]))
        }
    };
    wait::until("the guest has ended", NOTICED, || {
        Victim::Vm.processes(&env).is_empty().then_some(())
    });
    if let Some(client) = &mut client {
        wait::until("the client ends", Duration::from_secs(60), || {
            client.try_wait().unwrap()
        });
    }
    for id in [&armed, &other, &pod] {
        wait::until("containerd reports the end", NOTICED, || {
            let status = env.ctr_status(id);
            (status.is_none() || status.as_deref() == Some("STOPPED")).then_some(())
        });
    }
    for id in [&armed, &other, &pod] {
        env.ctr_remove(id);
    }
    env.assert_clean();
    let again = env.ctr_run(&[], &pod, &["echo", "again"]);
    assert_eq!(again.ok().stdout, "again\n");
}

on_every_containerd!(
    agent_killed_idle,
    agent_killed_during_create,
    agent_killed_during_exec,
    agent_killed_during_delete,
);

/// The names by which the tests above are known.
mod bodies {
    use super::{Moment, Version, survives};

    pub(super) fn agent_killed_idle(version: Version) {
        survives(version, Moment::Idle);
    }

    pub(super) fn agent_killed_during_create(version: Version) {
        survives(version, Moment::Create);
    }

    pub(super) fn agent_killed_during_exec(version: Version) {
        survives(version, Moment::Exec);
    }

    pub(super) fn agent_killed_during_delete(version: Version) {
        survives(version, Moment::Delete);
    }
}
