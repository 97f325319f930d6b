//! What a container may not do and what it may, case by case as the CRI validation suite asks; how an end
//! by the out-of-memory killer is told; what is counted.

use crate::on_every_cri;

on_every_cri!(
    a_container_over_its_limit_has_ended_as_oom_killed,
    paths_profiles_and_set_user_ids_are_as_the_validation_suite_asks,
    a_privileged_container_manages_its_network_and_an_ordinary_one_does_not,
    a_pod_and_its_containers_are_counted,
    a_renamed_log_is_opened_anew,
);

mod bodies {
    use std::{path::Path, time::Duration};

    use k8s_cri::v1::{
        self as api, ContainerConfig, Int64Value, LinuxContainerResources,
        LinuxContainerSecurityContext, SecurityProfile, security_profile::ProfileType,
    };
    use sealpod_tests::{Env, Version, assets, cri::Cri, need, only_sealpod, wait};

    fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
        let linux = config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap()
    }

    pub(super) fn a_container_over_its_limit_has_ended_as_oom_killed(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                let script = "dd if=/dev/zero of=/dev/null bs=20M";
                c.command = ["sh", "-c", script].map(String::from).into();
                c.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
                    memory_limit_in_bytes: 15 << 20,
                    memory_swap_limit_in_bytes: 15 << 20,
                    ..Default::default()
                });
            })
            .unwrap();
        let status = cri.wait_exit(&c);
        assert_eq!(
            (status.exit_code, status.reason.as_str()),
            (137, "OOMKilled")
        );
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    fn local_profile(dir: &Path, denied: &str) -> Option<SecurityProfile> {
        let path = dir.join(format!("{denied}.json"));
        let rule = serde_json::json!({"names": [denied], "action": "SCMP_ACT_ERRNO"});
        let profile = serde_json::json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]});
        std::fs::write(&path, profile.to_string()).unwrap();
        Some(SecurityProfile {
            profile_type: ProfileType::Localhost.into(),
            localhost_ref: path.to_string_lossy().into_owned(),
        })
    }

    pub(super) fn paths_profiles_and_set_user_ids_are_as_the_validation_suite_asks(
        version: Version,
    ) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri
            .run_pod("p", |p| {
                let sysctls = &mut p.linux.as_mut().unwrap().sysctls;
                sysctls.insert("fs.mqueue.msg_max".into(), "100".into());
            })
            .unwrap();
        let refused = |id: &str, command: &[&str]| {
            let done = cri.exec_sync(id, command, 20).unwrap();
            assert_ne!(done.exit_code, 0, "{command:?}");
            String::from_utf8_lossy(&done.stderr).into_owned()
        };

        let paths = cri
            .run(&pod, "paths", |c| {
                security(c).masked_paths = vec!["/etc/group".into(), "/home".into()];
                security(c).readonly_paths = vec!["/tmp".into()];
                security(c).seccomp = local_profile(env.folder(), "chmod");
            })
            .unwrap();
        assert_eq!(cri.sh(&paths, "cat /etc/group; ls -A /home"), "");
        assert_eq!(cri.sh(&paths, "cat /proc/sys/fs/mqueue/msg_max"), "100");
        assert_eq!(
            refused(&paths, &["touch", "/tmp/test"]),
            "touch: /tmp/test: Read-only file system\n"
        );
        let chmod = refused(&paths, &["chmod", "400", "/"]);
        assert!(chmod.contains("Operation not permitted"), "{chmod}");

        let host_name = |name: &str, denied: &str| {
            let id = cri.run(&pod, name, |c| {
                security(c).seccomp = local_profile(env.folder(), denied);
                security(c).capabilities = Some(api::Capability {
                    add_capabilities: vec!["SYS_ADMIN".into()],
                    ..Default::default()
                });
            });
            let done = cri.exec_sync(&id.unwrap(), &["hostname", "p"], 20);
            done.unwrap().exit_code == 0
        };
        assert!(host_name("other-profile", "mkdirat"));
        assert!(!host_name("profile", "sethostname"));

        for (name, kept, uid) in [("may-rise", false, "0"), ("may-not-rise", true, "65534")] {
            let id = cri
                .run(&pod, name, |c| security(c).no_new_privs = kept)
                .unwrap();
            cri.sh(&id, "mkdir /s; cp /bin/busybox /s/; chmod 4755 /s/busybox");
            // The process of a program that has changed its user cannot be dumped, and is root's.
            let rise = "su nobody -c '/s/busybox stat -c %u /proc/self/status'";
            assert_eq!(cri.sh(&id, rise), uid, "{name}");
        }
        let named = cri
            .run(&pod, "named", |c| {
                security(c).run_as_username = "nobody".into()
            })
            .unwrap();
        assert_eq!(cri.sh(&named, "id -nu"), "nobody");
        let group_only = cri.create(&pod, "group-only", |c| {
            security(c).run_as_group = Some(Int64Value { value: 1002 });
        });
        assert!(group_only.is_err());
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_privileged_container_manages_its_network_and_an_ordinary_one_does_not(
        version: Version,
    ) {
        need!(assets::complete());
        only_sealpod!();
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri
            .run_pod("p", |p| {
                let security = p.linux.as_mut().unwrap().security_context.as_mut();
                security.unwrap().privileged = true;
            })
            .unwrap();
        let bridge = |name: &str, change: &dyn Fn(&mut LinuxContainerSecurityContext)| {
            let id = cri.run(&pod, name, |c| change(security(c))).unwrap();
            let command = format!("brctl addbr {name} && ip link add {name}0 type dummy");
            let done = cri.exec_sync(&id, &["sh", "-c", &command], 20).unwrap();
            (done.exit_code == 0, id)
        };
        let (may, privileged) = bridge("privileged", &|s| s.privileged = true);
        assert!(may);
        let may = bridge("capable", &|s| {
            s.capabilities = Some(api::Capability {
                add_capabilities: vec!["NET_ADMIN".into()],
                ..Default::default()
            });
        });
        assert!(may.0);
        assert!(!bridge("ordinary", &|_| {}).0);
        // The kernel's own trees can be written and are whole.
        cri.sh(
            &privileged,
            "mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x",
        );
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_pod_and_its_containers_are_counted(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        cri.sh(&c, "head -c 1000000 /dev/urandom > /written");
        let stats = wait::until("the snapshot is measured", Duration::from_secs(30), || {
            let stats = cri.stats(&c).unwrap();
            let layer = stats.writable_layer.as_ref()?.used_bytes.as_ref()?.value;
            (layer >= 1_000_000).then_some(stats)
        });
        let memory = stats.memory.unwrap();
        assert!(memory.usage_bytes.unwrap().value > 0);
        assert!(memory.working_set_bytes.unwrap().value > 0);
        let request = api::ListPodSandboxStatsRequest { filter: None };
        let all = cri
            .call(async |client| client.list_pod_sandbox_stats(request).await)
            .unwrap()
            .stats;
        let [one] = all.as_slice() else {
            panic!("statistics of one pod, not of {}", all.len());
        };
        let linux = one.linux.as_ref().unwrap();
        assert_eq!(linux.containers.len(), 1);
        assert!(
            linux
                .cpu
                .as_ref()
                .unwrap()
                .usage_core_nano_seconds
                .unwrap()
                .value
                > 0
        );
        assert!(linux.memory.as_ref().unwrap().usage_bytes.unwrap().value > 0);
        // A sandbox container counts for the whole pod; with the Sandbox API there is none.
        if version != Version::V2_1Sandbox {
            let metrics = ["task", "metrics", &pod.id];
            let metrics = env.ctr_in(sealpod_tests::cri::NAMESPACE, &metrics).ok();
            assert!(metrics.stdout.contains("memory"), "{}", metrics.text());
        }
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_renamed_log_is_opened_anew(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                let script = "while :; do echo line; sleep 0.2; done";
                c.command = ["sh", "-c", script].map(String::from).into();
            })
            .unwrap();
        let some = |what: &str| {
            wait::until(what, Duration::from_secs(20), || {
                (!cri.log(&pod, "c").is_empty()).then_some(())
            });
        };
        some("a first line");
        let log = Path::new(&pod.config.log_directory).join("c.log");
        std::fs::rename(&log, log.with_extension("old")).unwrap();
        let request = api::ReopenContainerLogRequest {
            container_id: c.clone(),
        };
        cri.call(async |client| client.reopen_container_log(request).await)
            .unwrap();
        some("a line in the new file");
        // Stopping what is not started, and removing what runs, work as well.
        let created = cri.create(&pod, "created", |_| {}).unwrap();
        cri.stop(&created, 5).unwrap();
        cri.remove(&created).unwrap();
        cri.remove(&c).unwrap();
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
