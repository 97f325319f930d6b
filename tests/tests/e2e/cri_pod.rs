//! Pods and their containers through the CRI, as a kubelet drives it.

use crate::on_every_cri;

on_every_cri!(
    containers_of_a_pod_share_network_and_ipc,
    a_pod_has_its_name_and_resolver,
    exec_sync_gives_output_and_exit_code,
    exec_sync_past_its_limit_is_ended,
    a_container_of_a_living_pod_can_be_replaced,
    logs_hold_both_streams,
    stats_count_cpu_and_memory,
    an_update_changes_the_limits,
    stop_waits_for_the_grace_period,
    processes_are_shared_where_the_pod_asks,
    processes_are_private_by_default,
    two_pods_are_two_machines,
    a_removed_pod_leaves_nothing,
    a_pod_is_stopped_with_its_containers_running,
);

mod bodies {
    use std::time::{Duration, Instant};

    use k8s_cri::v1::{LinuxContainerResources, NamespaceMode};
    use sealpod_tests::{Env, Version, assets, cri::Cri, need, wait};

    pub(super) fn containers_of_a_pod_share_network_and_ipc(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("shared", |_| {}).unwrap();
        let server = cri
            .run(&pod, "server", |c| {
                c.command = ["httpd", "-f", "-p", "127.0.0.1:8080", "-h", "/www"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        let client = cri.run(&pod, "client", |_| {}).unwrap();
        let page = wait::until(
            "page over the shared loopback",
            Duration::from_secs(20),
            || {
                let done = cri
                    .exec_sync(
                        &client,
                        &["wget", "-q", "-O", "-", "http://127.0.0.1:8080/"],
                        10,
                    )
                    .ok()?;
                (done.exit_code == 0).then(|| String::from_utf8_lossy(&done.stdout).into_owned())
            },
        );
        assert_eq!(page, sealpod_tests::image::WEB_PAGE);
        cri.sh(&server, "echo shared > /dev/shm/note");
        assert_eq!(cri.sh(&client, "cat /dev/shm/note"), "shared");
        for kind in ["ipc", "net", "uts"] {
            let read = format!("readlink /proc/self/ns/{kind}");
            assert_eq!(cri.sh(&server, &read), cri.sh(&client, &read));
        }
        assert_ne!(
            cri.sh(&server, "readlink /proc/self/ns/mnt"),
            cri.sh(&client, "readlink /proc/self/ns/mnt")
        );
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_pod_has_its_name_and_resolver(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("named", |_| {}).unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        assert_eq!(cri.sh(&c, "hostname"), "named");
        let resolver = cri.sh(&c, "cat /etc/resolv.conf");
        assert!(
            resolver.contains("192.0.2.53") && resolver.contains("sealpod.test"),
            "{resolver}"
        );
        let ip = cri.pod_ip(&pod).unwrap();
        let addresses = cri.sh(&c, "ip -4 -o addr show eth0");
        assert!(addresses.contains(&ip), "{ip} is not in {addresses}");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn exec_sync_gives_output_and_exit_code(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        let done = cri
            .exec_sync(&c, &["sh", "-c", "echo out; echo err >&2; exit 42"], 10)
            .unwrap();
        assert_eq!(done.exit_code, 42);
        assert_eq!(
            (done.stdout.as_slice(), done.stderr.as_slice()),
            (&b"out\n"[..], &b"err\n"[..])
        );
        // As a kubelet's probes do: many, one after another.
        for _ in 0..20 {
            assert_eq!(cri.exec_sync(&c, &["true"], 10).unwrap().exit_code, 0);
            assert_eq!(cri.exec_sync(&c, &["false"], 10).unwrap().exit_code, 1);
        }
        let missing = cri.exec_sync(&c, &["no-such-program"], 10).unwrap_err();
        assert!(missing.message().contains("no-such-program"), "{missing}");
        assert!(missing.message().contains("not found"), "{missing}");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn exec_sync_past_its_limit_is_ended(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        let begin = Instant::now();
        let error = cri.exec_sync(&c, &["sleep", "1234"], 1).unwrap_err();
        assert_eq!(error.code(), tonic_code_deadline(), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(15) * wait::patience());
        wait::until("the process is gone", Duration::from_secs(10), || {
            (!cri.sh(&c, "ps").contains("1234")).then_some(())
        });
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    fn tonic_code_deadline() -> tonic::Code {
        tonic::Code::DeadlineExceeded
    }

    pub(super) fn a_container_of_a_living_pod_can_be_replaced(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let other = cri.run(&pod, "other", |_| {}).unwrap();
        let boot = cri.sh(&other, "cat /proc/sys/kernel/random/boot_id");
        for attempt in 0..3 {
            let c = cri
                .run(&pod, "c", |c| {
                    c.metadata.as_mut().unwrap().attempt = attempt;
                    c.command = ["sh", "-c", "test ! -e /mark && touch /mark && exit 3"]
                        .map(String::from)
                        .into();
                })
                .unwrap();
            let status = cri.wait_exit(&c);
            assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"));
            cri.remove(&c).unwrap();
        }
        assert_eq!(cri.sh(&other, "cat /proc/sys/kernel/random/boot_id"), boot);
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn logs_hold_both_streams(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.command = ["sh", "-c", "seq 200; echo err >&2"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        assert_eq!(cri.wait_exit(&c).exit_code, 0);
        let lines = wait::until("log complete", Duration::from_secs(10), || {
            let lines = cri.log(&pod, "c");
            (lines.len() >= 201).then_some(lines)
        });
        let out: Vec<_> = lines
            .iter()
            .filter(|(s, _)| s == "stdout")
            .map(|(_, t)| t.as_str())
            .collect();
        assert_eq!(out, (1..=200).map(|i| i.to_string()).collect::<Vec<_>>());
        assert!(lines.contains(&("stderr".into(), "err".into())));
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn stats_count_cpu_and_memory(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.command = ["sh", "-c", "while :; do :; done"].map(String::from).into();
            })
            .unwrap();
        let cpu = || {
            let stats = cri.stats(&c).unwrap();
            assert!(stats.memory.unwrap().working_set_bytes.unwrap().value > 0);
            stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value
        };
        let first = cpu();
        wait::until("CPU time grows", Duration::from_secs(20), || {
            (cpu() > first + 100_000_000).then_some(())
        });
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn an_update_changes_the_limits(version: Version) {
        need!(assets::complete());
        sealpod_tests::only_sealpod!();
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let limits = |mib: i64, quota| LinuxContainerResources {
            memory_limit_in_bytes: mib << 20,
            cpu_quota: quota,
            cpu_period: 100_000,
            // The host's numbers: the guest has not as many.
            cpuset_cpus: "1".into(),
            ..Default::default()
        };
        let c = cri
            .run(&pod, "c", |c| {
                c.linux.as_mut().unwrap().resources = Some(limits(64, 50_000))
            })
            .unwrap();
        let read = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max";
        assert_eq!(cri.sh(&c, read), format!("{}\n50000 100000", 64 << 20));
        cri.update(&c, limits(96, 70_000)).unwrap();
        assert_eq!(cri.sh(&c, read), format!("{}\n70000 100000", 96 << 20));
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn stop_waits_for_the_grace_period(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let script = "trap 'sleep 0.3; exit 11' TERM; echo ready; while :; do sleep 0.1; done";
        let polite = cri
            .run(&pod, "polite", |c| {
                c.command = ["sh", "-c", script].map(String::from).into()
            })
            .unwrap();
        wait::until("handler set", Duration::from_secs(20), || {
            cri.log(&pod, "polite")
                .iter()
                .any(|(_, t)| t == "ready")
                .then_some(())
        });
        cri.stop(&polite, 20).unwrap();
        assert_eq!(cri.status(&polite).unwrap().exit_code, 11);
        let deaf = cri
            .run(&pod, "deaf", |c| {
                c.command = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        cri.stop(&deaf, 1).unwrap();
        assert_eq!(cri.status(&deaf).unwrap().exit_code, 137);
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn processes_are_shared_where_the_pod_asks(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri
            .run_pod("p", |p| {
                let linux = p.linux.as_mut().unwrap();
                let options = linux
                    .security_context
                    .as_mut()
                    .unwrap()
                    .namespace_options
                    .as_mut()
                    .unwrap();
                options.pid = NamespaceMode::Pod.into();
            })
            .unwrap();
        let _a = cri
            .run(&pod, "a", |c| {
                c.command = ["sleep", "4321"].map(String::from).into()
            })
            .unwrap();
        let b = cri.run(&pod, "b", |_| {}).unwrap();
        let ps = cri.sh(&b, "ps");
        assert!(ps.contains("sleep 4321"), "{ps}");
        let first = cri.sh(&b, "cat /proc/1/cmdline | tr '\\0' ' '");
        assert!(!first.contains("sleep 1000"), "{first}");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn processes_are_private_by_default(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let _a = cri
            .run(&pod, "a", |c| {
                c.command = ["sleep", "4321"].map(String::from).into()
            })
            .unwrap();
        let b = cri.run(&pod, "b", |_| {}).unwrap();
        let ps = cri.sh(&b, "ps");
        assert!(!ps.contains("4321"), "{ps}");
        assert_eq!(cri.sh(&b, "cat /proc/1/comm"), "sleep");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn two_pods_are_two_machines(version: Version) {
        need!(assets::complete());
        sealpod_tests::only_sealpod!();
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let (one, two) = (
            cri.run_pod("one", |_| {}).unwrap(),
            cri.run_pod("two", |_| {}).unwrap(),
        );
        let server = cri
            .run(&one, "server", |c| {
                c.command = ["httpd", "-f", "-p", "80", "-h", "/www"]
                    .map(String::from)
                    .into();
            })
            .unwrap();
        let client = cri.run(&two, "client", |_| {}).unwrap();
        let boot = "cat /proc/sys/kernel/random/boot_id";
        assert_ne!(cri.sh(&server, boot), cri.sh(&client, boot));
        let ip = cri.pod_ip(&one).unwrap();
        assert_eq!(
            cri.sh(&client, &format!("wget -q -O - http://{ip}/")) + "\n",
            sealpod_tests::image::WEB_PAGE
        );
        cri.remove_pod(&one).unwrap();
        cri.remove_pod(&two).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_removed_pod_leaves_nothing(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        // A pod without containers, and one whose container was never started.
        let pod = cri.run_pod("empty", |_| {}).unwrap();
        cri.remove_pod(&pod).unwrap();
        let pod = cri.run_pod("unstarted", |_| {}).unwrap();
        let c = cri.create(&pod, "c", |_| {}).unwrap();
        cri.remove(&c).unwrap();
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_pod_is_stopped_with_its_containers_running(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        for name in ["a", "b", "c"] {
            cri.run(&pod, name, |_| {}).unwrap();
        }
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
