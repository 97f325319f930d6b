//! Whose processes a container sees: its own, its pod's, another container's, all of the guest's.

use crate::on_every_cri;

on_every_cri!(
    a_container_joins_the_processes_of_the_one_that_is_named,
    host_processes_are_those_of_the_guest,
);

mod bodies {
    use std::time::Duration;

    use k8s_cri::v1::{ContainerConfig, NamespaceMode};
    use sealpod_tests::{
        Env, Version, assets,
        cri::{Cri, NAMESPACE},
        need, only_sealpod, wait,
    };

    fn sleep(config: &mut ContainerConfig, seconds: &str) {
        config.command = vec!["sleep".into(), seconds.into()];
    }

    /// As a debug container that `kubectl debug --target` adds.
    pub(super) fn a_container_joins_the_processes_of_the_one_that_is_named(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let a = cri.run(&pod, "a", |c| sleep(c, "1111")).unwrap();
        let b = cri.run(&pod, "b", |c| sleep(c, "2222")).unwrap();
        let mut joined = Vec::new();
        for (target, sees, sees_not) in [(&a, "1111", "2222"), (&b, "2222", "1111")] {
            let debug = cri
                .run(&pod, &format!("debug-{sees}"), |c| {
                    sleep(c, "3333");
                    let security = c.linux.as_mut().unwrap().security_context.as_mut();
                    let options = security.unwrap().namespace_options.as_mut().unwrap();
                    options.pid = NamespaceMode::Target.into();
                    options.target_id = target.clone();
                })
                .unwrap();
            let ps = cri.sh(&debug, "ps");
            assert!(ps.contains(sees) && !ps.contains(sees_not), "{ps}");
            let first = cri.sh(&debug, "cat /proc/1/cmdline | tr '\\0' ' '");
            assert_eq!(first.trim(), format!("sleep {sees}"));
            joined.push(debug);
        }
        // Each is a number of its own on the host, and each leads to the pod's network.
        let pids = [&a, &b, &joined[0], &joined[1]].map(|id| env.ctr_pid(NAMESPACE, id).unwrap());
        let found = pids.map(|pid| env.network_of(pid).unwrap());
        for (n, (names, netns)) in found.iter().enumerate() {
            assert!(names.contains(&"eth0".to_owned()), "{names:?}");
            assert_eq!(netns, &found[0].1);
            assert!(!pids[..n].contains(&pids[n]), "{pids:?}");
        }
        // With the container that they belong to, the processes end; the others go on.
        cri.stop(&a, 0).unwrap();
        assert_eq!(cri.wait_exit(&joined[0]).exit_code, 137);
        assert!(cri.sh(&joined[1], "ps").contains("2222"));
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn host_processes_are_those_of_the_guest(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri
            .run_pod("p", |p| {
                let security = p.linux.as_mut().unwrap().security_context.as_mut();
                let options = security.unwrap().namespace_options.as_mut().unwrap();
                options.pid = NamespaceMode::Node.into();
            })
            .unwrap();
        let a = cri.run(&pod, "a", |c| sleep(c, "1111")).unwrap();
        let b = cri.run(&pod, "b", |_| {}).unwrap();
        let pids = cri.sh(&b, "pidof sleep");
        assert_eq!(pids.split(' ').count(), 2, "{pids}");
        assert_ne!(cri.sh(&b, "cat /proc/1/comm"), "sleep");
        assert!(!cri.sh(&b, "ps").contains("containerd"));
        // Without a namespace that dies with it, a container still takes its processes along.
        cri.sh(&a, "sleep 4444 > /dev/null 2>&1 &");
        cri.stop(&a, 0).unwrap();
        wait::until("its processes are gone", Duration::from_secs(10), || {
            (!cri.sh(&b, "ps").contains("4444")).then_some(())
        });
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
