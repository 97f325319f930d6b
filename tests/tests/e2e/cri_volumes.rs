//! Volumes through the CRI: how mounts of the host reach a container and which of them it may write,
//! volumes in memory, the file by which a container says why it ended.

use crate::on_every_cri;

on_every_cri!(
    later_mounts_of_the_host_arrive_where_the_volume_asks,
    a_read_only_volume_leaves_the_mounts_below_it_as_they_are,
    a_volume_in_memory_is_a_tmpfs_of_the_guest_that_containers_share,
    a_message_of_an_unprivileged_container_reaches_the_host,
);

mod bodies {
    use std::{os::unix::fs::PermissionsExt, path::Path};

    use k8s_cri::v1::{ContainerConfig, Int64Value, Mount, MountPropagation};
    use sealpod_tests::{Env, Version, assets, cri::Cri, need, only_sealpod};

    fn mount(host: &Path, container: &str) -> Mount {
        Mount {
            host_path: host.to_string_lossy().into_owned(),
            container_path: container.into(),
            ..Default::default()
        }
    }

    fn run_as(config: &mut ContainerConfig, user: i64) {
        let security = config.linux.as_mut().unwrap().security_context.as_mut();
        security.unwrap().run_as_user = Some(Int64Value { value: user });
    }

    /// `mount` or `umount` on the host's side of the environment.
    fn host(env: &Env, command: &str, args: &[&str]) {
        let _ = env.run(command, args).ok();
    }

    pub(super) fn later_mounts_of_the_host_arrive_where_the_volume_asks(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("volume");
        std::fs::create_dir_all(dir.join("later")).unwrap();
        let path = dir.to_string_lossy().into_owned();
        host(&env, "mount", &["--bind", &path, &path]);
        host(&env, "mount", &["--make-shared", &path]);
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                let with = |at, propagation: MountPropagation| Mount {
                    propagation: propagation.into(),
                    ..mount(&dir, at)
                };
                c.mounts = vec![
                    with("/private", MountPropagation::PropagationPrivate),
                    with("/slave", MountPropagation::PropagationHostToContainer),
                ];
                let security = c.linux.as_mut().unwrap().security_context.as_mut();
                security.unwrap().capabilities = Some(k8s_cri::v1::Capability {
                    add_capabilities: vec!["SYS_ADMIN".into()],
                    ..Default::default()
                });
            })
            .unwrap();
        let later = format!("{path}/later");
        host(&env, "mount", &["-t", "tmpfs", "later", &later]);
        std::fs::write(env.namespaces.path(&format!("{later}/f")), "x").unwrap();
        assert_eq!(cri.sh(&c, "ls /private/later; ls /slave/later"), "f");
        // What the container mounts stays in it.
        cri.sh(
            &c,
            "mkdir /slave/own && mount -t tmpfs own /slave/own && touch /slave/own/g",
        );
        let own = env.namespaces.path(&format!("{path}/own"));
        assert_eq!(std::fs::read_dir(own).unwrap().count(), 0);
        cri.remove_pod(&pod).unwrap();
        host(&env, "umount", &["-l", &later]);
        host(&env, "umount", &["-l", &path]);
        env.assert_clean();
    }

    pub(super) fn a_read_only_volume_leaves_the_mounts_below_it_as_they_are(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("volume");
        std::fs::create_dir_all(dir.join("below")).unwrap();
        let below = dir.join("below").to_string_lossy().into_owned();
        host(&env, "mount", &["-t", "tmpfs", "below", &below]);
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                let readonly = true;
                c.mounts = vec![Mount {
                    readonly,
                    ..mount(&dir, "/v")
                }];
            })
            .unwrap();
        let done = cri.exec_sync(&c, &["touch", "/v/x"], 10).unwrap();
        let stderr = String::from_utf8_lossy(&done.stderr).into_owned();
        assert!(stderr.contains("Read-only file system"), "{stderr}");
        cri.sh(&c, "touch /v/below/x");
        assert!(env.namespaces.path(&format!("{below}/x")).exists());
        cri.remove_pod(&pod).unwrap();
        host(&env, "umount", &["-l", &below]);
        env.assert_clean();
    }

    pub(super) fn a_volume_in_memory_is_a_tmpfs_of_the_guest_that_containers_share(
        version: Version,
    ) {
        need!(assets::complete());
        only_sealpod!();
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        // As a kubelet prepares it: for a file system group, and a part of it for one container.
        let kubelet = env.folder().join("pods/u");
        let volume = kubelet.join("volumes/kubernetes.io~empty-dir/cache");
        let part = kubelet.join("volume-subpaths/cache/c/0");
        for dir in [&volume, &part] {
            std::fs::create_dir_all(dir).unwrap();
        }
        let (at, part_at) = (volume.to_string_lossy(), part.to_string_lossy());
        host(
            &env,
            "mount",
            &["-t", "tmpfs", "-o", "size=4m", "tmpfs", &at],
        );
        host(&env, "chown", &["0:1234", &at]);
        host(&env, "chmod", &["2777", &at]);
        host(&env, "mkdir", &["-m", "0750", &format!("{at}/sub")]);
        host(&env, "mount", &["--bind", &format!("{at}/sub"), &part_at]);
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let with = |name: &str, source: &Path, user: i64| {
            let mounts = vec![mount(source, "/cache")];
            cri.run(&pod, name, |c| {
                run_as(c, user);
                c.mounts = mounts;
            })
            .unwrap()
        };
        let a = with("a", &volume, 1000);
        let stat = "stat -f -c %T /cache; stat -c '%a %u:%g' /cache; df -k /cache | tail -1 | awk '{print $2}'";
        assert_eq!(cri.sh(&a, stat), "tmpfs\n2777 0:1234\n4096");
        cri.sh(&a, "echo one > /cache/f; chmod 0644 /cache/f");
        let c = with("c", &part, 0);
        assert_eq!(
            cri.sh(&c, "stat -c %a /cache; echo part > /cache/g"),
            "2750"
        );
        let b = with("b", &volume, 0);
        assert_eq!(
            cri.sh(&b, "cat /cache/f /cache/sub/g; stat -c %g /cache/f"),
            "one\npart\n1234"
        );
        // It outlives its containers, and nothing of it is on the host.
        cri.stop(&b, 0).unwrap();
        cri.remove(&b).unwrap();
        let b = with("b2", &volume, 0);
        assert_eq!(cri.sh(&b, "cat /cache/f"), "one");
        assert!(!env.namespaces.path(&format!("{at}/f")).exists());
        cri.remove_pod(&pod).unwrap();
        host(&env, "umount", &["-l", &part_at]);
        host(&env, "umount", &["-l", &at]);
        env.assert_clean();
    }

    pub(super) fn a_message_of_an_unprivileged_container_reaches_the_host(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let file = env.folder().join("message");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o666)).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                run_as(c, 1000);
                c.mounts = vec![mount(&file, "/dev/termination-custom-log")];
                let script = "printf DONE > /dev/termination-custom-log";
                c.command = ["sh", "-c", script].map(String::from).into();
            })
            .unwrap();
        let status = cri.wait_exit(&c);
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "DONE");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
