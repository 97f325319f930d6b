//! Many pods: one after another and at once, with nothing left over.

use std::sync::atomic::{AtomicU32, Ordering};

use sealpod_tests::{Env, Version, assets, need};

/// Pods one after another; `SEALPOD_SOAK` asks for more or fewer.
fn rounds() -> u32 {
    std::env::var("SEALPOD_SOAK")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(100)
}

#[test]
fn a_hundred_pods_one_after_another_leave_nothing() {
    need!(assets::complete());
    let mut env = Env::new(Version::V1_7).unwrap();
    // The first one makes what stays (folders, containerd's own connections).
    let _ = env.ctr_run(&[], &env.id("warm"), &["true"]).ok();
    env.rebase();
    for round in 0..rounds() {
        let done = env.ctr_run(&[], &env.id(&format!("r{round}")), &["echo", "here"]);
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (0, "here\n"),
            "round {round}: {}",
            done.text()
        );
    }
    env.assert_clean();
}

#[test]
fn eight_pods_at_once_leave_nothing() {
    need!(assets::complete());
    for version in [Version::V1_6, Version::V1_7, Version::V2_1] {
        let mut env = Env::new(version).unwrap();
        let _ = env.ctr_run(&[], &env.id("warm"), &["true"]).ok();
        env.rebase();
        let ended = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for n in 0..8 {
                let (env, ended) = (&env, &ended);
                scope.spawn(move || {
                    let id = env.id(&format!("p{n}"));
                    env.ctr_start(&["--cni"], &id, &["sleep", "1000"]);
                    let name = format!("I am {n}\n");
                    let done = env.ctr_exec(&id, "e", &["echo", name.trim()]);
                    assert_eq!((done.code, done.stdout), (0, name), "{}", done.stderr);
                    env.ctr_remove(&id);
                    ended.fetch_add(1, Ordering::Relaxed);
                });
            }
        });
        assert_eq!(ended.load(Ordering::Relaxed), 8);
        env.assert_clean();
    }
}
