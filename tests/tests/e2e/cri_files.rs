//! Volumes of pods through the CRI.

use crate::on_every_cri;

on_every_cri!(
    a_config_map_update_is_seen_while_the_pod_runs,
    a_sub_path_shows_one_file_or_folder,
    an_empty_dir_is_shared_between_containers,
    a_read_only_volume_is_read_only,
    a_raw_block_device_can_be_read_and_written,
    a_propagated_mount_of_the_host_is_seen,
);

mod bodies {
    use std::{os::unix::fs::symlink, path::Path, process::Command};

    use k8s_cri::v1::{Device, LinuxContainerResources, Mount, MountPropagation};
    use sealpod_tests::{Env, Version, assets, cri::Cri, need};

    fn mount(host: &Path, container: &str, readonly: bool) -> Mount {
        Mount {
            host_path: host.to_string_lossy().into_owned(),
            container_path: container.into(),
            readonly,
            ..Default::default()
        }
    }

    pub(super) fn a_config_map_update_is_seen_while_the_pod_runs(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("config-map");
        std::fs::create_dir(&dir).unwrap();
        let publish = |version: &str| {
            std::fs::create_dir(dir.join(version)).unwrap();
            std::fs::write(dir.join(version).join("key"), version).unwrap();
            symlink(version, dir.join("..data_tmp")).unwrap();
            std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        };
        publish("..v1");
        symlink("..data/key", dir.join("key")).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| c.mounts = vec![mount(&dir, "/config", true)])
            .unwrap();
        assert_eq!(cri.sh(&c, "cat /config/key"), "..v1");
        for version in ["..v2", "..v3"] {
            let old = std::fs::read_link(dir.join("..data")).unwrap();
            publish(version);
            std::fs::remove_dir_all(dir.join(old)).unwrap();
            cri.sh(&c, &format!("for i in $(seq 150); do [ \"$(cat /config/key 2>/dev/null)\" = {version} ] && exit 0; sleep 0.1; done; exit 1"));
        }
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_sub_path_shows_one_file_or_folder(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("volume");
        std::fs::create_dir_all(dir.join("sub/deeper")).unwrap();
        std::fs::write(dir.join("sub/file"), "one file").unwrap();
        std::fs::write(dir.join("hidden"), "hidden").unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.mounts = vec![
                    mount(&dir.join("sub"), "/folder", false),
                    mount(&dir.join("sub/file"), "/etc/file", true),
                ];
            })
            .unwrap();
        assert_eq!(
            cri.sh(
                &c,
                "cat /etc/file; ls /folder | tr '\\n' ' '; echo x > /folder/deeper/new"
            ),
            "one filedeeper file"
        );
        assert_eq!(
            std::fs::read_to_string(dir.join("sub/deeper/new")).unwrap(),
            "x\n"
        );
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn an_empty_dir_is_shared_between_containers(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("empty");
        std::fs::create_dir(&dir).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let a = cri
            .run(&pod, "a", |c| {
                c.mounts = vec![mount(&dir, "/shared", false)]
            })
            .unwrap();
        let b = cri
            .run(&pod, "b", |c| {
                c.mounts = vec![mount(&dir, "/shared", false)]
            })
            .unwrap();
        cri.sh(
            &a,
            "mkfifo /shared/pipe; echo one > /shared/f; chmod 0700 /shared/f",
        );
        assert_eq!(
            cri.sh(&b, "cat /shared/f; rm /shared/f; stat -c %F /shared/pipe"),
            "one\nfifo"
        );
        cri.sh(&a, "test ! -e /shared/f");
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    pub(super) fn a_read_only_volume_is_read_only(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("volume");
        std::fs::create_dir(&dir).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| c.mounts = vec![mount(&dir, "/v", true)])
            .unwrap();
        assert_eq!(
            cri.exec_sync(&c, &["touch", "/v/x"], 10).unwrap().exit_code,
            1
        );
        assert!(!dir.join("x").exists());
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }

    /// A loop device over a file; detached when dropped.
    struct Loop(String);

    impl Loop {
        fn attach(file: &Path) -> Self {
            let done = Command::new("losetup")
                .args(["--find", "--show"])
                .arg(file)
                .output()
                .unwrap();
            assert!(
                done.status.success(),
                "{}",
                String::from_utf8_lossy(&done.stderr)
            );
            Self(String::from_utf8_lossy(&done.stdout).trim().to_owned())
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }

    pub(super) fn a_raw_block_device_can_be_read_and_written(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let file = env.folder().join("disk");
        let mut content = vec![0; 4 << 20];
        content[..5].copy_from_slice(b"begin");
        std::fs::write(&file, &content).unwrap();
        let device = Loop::attach(&file);
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                c.devices = vec![Device {
                    host_path: device.0.clone(),
                    container_path: "/dev/xvdz".into(),
                    permissions: "rwm".into(),
                }];
            })
            .unwrap();
        assert_eq!(
            cri.sh(&c, "head -c 5 /dev/xvdz; stat -c ' %F' /dev/xvdz"),
            "begin block special file"
        );
        cri.sh(
            &c,
            "printf written | dd of=/dev/xvdz bs=1 seek=1048576 conv=fsync 2>/dev/null",
        );
        let limits = LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        };
        cri.update(&c, limits).unwrap();
        assert_eq!(cri.sh(&c, "head -c 5 /dev/xvdz"), "begin");
        cri.remove_pod(&pod).unwrap();
        drop(device);
        let after = std::fs::read(&file).unwrap();
        assert_eq!(&after[1 << 20..][..7], b"written");
        env.assert_clean();
    }

    pub(super) fn a_propagated_mount_of_the_host_is_seen(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let cri = Cri::connect(&mut env).unwrap();
        let dir = env.folder().join("parent");
        std::fs::create_dir_all(dir.join("child")).unwrap();
        let pod = cri.run_pod("p", |_| {}).unwrap();
        let c = cri
            .run(&pod, "c", |c| {
                let mut m = mount(&dir, "/v", false);
                m.propagation = MountPropagation::PropagationHostToContainer.into();
                c.mounts = vec![m];
            })
            .unwrap();
        let child = dir.join("child").to_string_lossy().into_owned();
        let _ = env.run("mount", &["-t", "tmpfs", "later", &child]).ok();
        std::fs::write(env.namespaces.path(&format!("{child}/f")), "mounted later").unwrap();
        assert_eq!(cri.sh(&c, "cat /v/child/f"), "mounted later");
        let _ = env.run("umount", &["-l", &child]).ok();
        cri.remove_pod(&pod).unwrap();
        env.assert_clean();
    }
}
