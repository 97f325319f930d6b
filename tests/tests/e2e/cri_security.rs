//! Security contexts of pods and containers through the CRI.

use crate::on_every_cri;

on_every_cri!(
    user_and_groups_are_as_asked,
    capabilities_are_added_and_dropped,
    the_default_seccomp_profile_is_on_where_asked,
    no_new_privileges_is_kept,
    pod_sysctls_are_set,
    a_privileged_container_can_mount,
    the_root_is_read_only_where_asked,
);

mod bodies {
    use k8s_cri::v1::{
        Capability, ContainerConfig, Int64Value, LinuxContainerSecurityContext, SecurityProfile,
        security_profile::ProfileType,
    };
    use sealpod_tests::{Env, Version, assets, cri::Cri, need};

    fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
        config
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap()
    }

    pub(super) fn user_and_groups_are_as_asked(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                let s = security(c);
                s.run_as_user = Some(Int64Value { value: 1000 });
                s.run_as_group = Some(Int64Value { value: 3000 });
                s.supplemental_groups = vec![5000, 6000];
            })
            .unwrap();
        let out = cri.sh(&c, "id -u; id -g; id -G");
        assert!(out.starts_with("1000\n3000\n"), "{out}");
        for group in ["5000", "6000", "3000"] {
            assert!(
                out.lines().nth(2).unwrap().split(' ').any(|g| g == group),
                "{out}"
            );
        }
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn capabilities_are_added_and_dropped(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let mask = |name: &str, add: &[&str], drop: &[&str]| {
            let c = cri
                .run(&pod, name, |c| {
                    security(c).capabilities = Some(Capability {
                        add_capabilities: add.iter().map(|&s| s.into()).collect(),
                        drop_capabilities: drop.iter().map(|&s| s.into()).collect(),
                        ..Default::default()
                    });
                })
                .unwrap();
            let text = cri.sh(&c, "grep CapBnd /proc/self/status | cut -f 2");
            u64::from_str_radix(&text, 16).unwrap()
        };
        assert_eq!(mask("none", &[], &["ALL"]), 0);
        assert_eq!(mask("one", &["NET_BIND_SERVICE"], &["ALL"]), 1 << 10);
        assert_eq!(mask("admin", &["NET_ADMIN"], &[]) & (1 << 12), 1 << 12);
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn the_default_seccomp_profile_is_on_where_asked(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let profile = |kind: ProfileType| {
            Some(SecurityProfile {
                profile_type: kind.into(),
                localhost_ref: String::new(),
            })
        };
        let on = cri
            .run(&pod, "on", |c| {
                security(c).seccomp = profile(ProfileType::RuntimeDefault)
            })
            .unwrap();
        let off = cri
            .run(&pod, "off", |c| {
                security(c).seccomp = profile(ProfileType::Unconfined)
            })
            .unwrap();
        let read = "grep -E '^Seccomp:' /proc/self/status | cut -f 2";
        assert_eq!(
            (cri.sh(&on, read), cri.sh(&off, read)),
            ("2".into(), "0".into())
        );
        assert_eq!(
            cri.exec_sync(&on, &["unshare", "-U", "true"], 10)
                .unwrap()
                .exit_code,
            1
        );
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn no_new_privileges_is_kept(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        for (name, wanted) in [("yes", true), ("no", false)] {
            let c = cri
                .run(&pod, name, |c| security(c).no_new_privs = wanted)
                .unwrap();
            let read = "grep NoNewPrivs /proc/self/status | cut -f 2";
            assert_eq!(cri.sh(&c, read), if wanted { "1" } else { "0" });
        }
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn pod_sysctls_are_set(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri
            .run_pod("p", |p| {
                let sysctls = &mut p.linux.as_mut().unwrap().sysctls;
                sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "23".into());
                sysctls.insert("kernel.shm_rmid_forced".into(), "1".into());
            })
            .unwrap();
        let c = cri.run(&pod, "c", |_| {}).unwrap();
        let read =
            "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced";
        assert_eq!(cri.sh(&c, read), "23\n1");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_privileged_container_can_mount(version: Version) {
        need!(assets::complete());
        // With runc, a privileged container gets the machine's own devices and rights.
        sealpod_tests::only_sealpod!();
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri
            .run_pod("p", |p| {
                p.linux
                    .as_mut()
                    .unwrap()
                    .security_context
                    .as_mut()
                    .unwrap()
                    .privileged = true;
            })
            .unwrap();
        let c = cri
            .run(&pod, "c", |c| security(c).privileged = true)
            .unwrap();
        assert_eq!(
            cri.sh(&c, "mount -t tmpfs t /tmp && echo x > /tmp/x && cat /tmp/x"),
            "x"
        );
        cri.sh(&c, "echo 1 > /proc/sys/net/ipv4/ip_forward");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn the_root_is_read_only_where_asked(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| security(c).readonly_rootfs = true)
            .unwrap();
        let done = cri.exec_sync(&c, &["touch", "/x"], 10).unwrap();
        assert_eq!(done.exit_code, 1);
        assert!(
            String::from_utf8_lossy(&done.stderr).contains("Read-only"),
            "{done:?}"
        );
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
