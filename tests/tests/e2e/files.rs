//! Files of the host in a container, through `ctr`.

use crate::on_every_containerd;

on_every_containerd!(
    a_bind_mount_is_shared_both_ways,
    a_read_only_mount_is_read_only,
    one_file_can_be_mounted,
    an_atomic_symlink_swap_is_seen,
    a_missing_mount_source_is_named,
    tmpfs_and_shm_have_their_sizes,
    the_root_keeps_files_and_modes,
    a_read_only_root_is_read_only,
    locks_and_links_work_in_a_volume,
);

mod bodies {
    use std::{os::unix::fs::symlink, path::PathBuf};

    use sealpod_tests::{Env, Version, assets, need};

    fn volume(env: &Env) -> PathBuf {
        let dir = env.folder().join("volume");
        std::fs::create_dir(&dir).unwrap();
        dir
    }

    fn bind(source: &std::path::Path, options: &str) -> String {
        format!(
            "type=bind,src={},dst=/mnt,options=rbind:{options}",
            source.display()
        )
    }

    pub(super) fn a_bind_mount_is_shared_both_ways(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let dir = volume(&env);
        std::fs::write(dir.join("from-host"), "hello").unwrap();
        let script = "cat /mnt/from-host && echo -n back > /mnt/from-guest && chmod 640 /mnt/from-guest && chown 1000:2000 /mnt/from-guest";
        let done = env
            .ctr_run(
                &["--mount", &bind(&dir, "rw")],
                &env.id("a"),
                &["sh", "-c", script],
            )
            .ok();
        assert_eq!(done.stdout, "hello");
        use std::os::unix::fs::MetadataExt;
        let file = dir.join("from-guest");
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "back");
        let meta = file.metadata().unwrap();
        assert_eq!(
            (meta.mode() & 0o777, meta.uid(), meta.gid()),
            (0o640, 1000, 2000)
        );
        env.assert_clean();
    }

    pub(super) fn a_read_only_mount_is_read_only(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let dir = volume(&env);
        let done = env.ctr_run(
            &["--mount", &bind(&dir, "ro")],
            &env.id("a"),
            &["touch", "/mnt/x"],
        );
        assert_eq!(done.code, 1);
        assert!(
            done.stderr.contains("Read-only file system"),
            "{}",
            done.text()
        );
        assert!(!dir.join("x").exists());
        env.assert_clean();
    }

    pub(super) fn one_file_can_be_mounted(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let dir = volume(&env);
        std::fs::write(dir.join("key"), "secret").unwrap();
        std::fs::write(dir.join("other"), "not for the container").unwrap();
        let mount = format!(
            "type=bind,src={},dst=/etc/key,options=bind:ro",
            dir.join("key").display()
        );
        let script = "cat /etc/key; ls /etc";
        let done = env
            .ctr_run(&["--mount", &mount], &env.id("a"), &["sh", "-c", script])
            .ok();
        assert!(done.stdout.starts_with("secret"), "{}", done.stdout);
        assert!(!done.stdout.contains("other"), "{}", done.stdout);
        env.assert_clean();
    }

    pub(super) fn an_atomic_symlink_swap_is_seen(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        // As a kubelet updates a ConfigMap: ..data -> a folder, replaced by rename.
        let dir = volume(&env);
        let publish = |version: &str| {
            std::fs::create_dir(dir.join(version)).unwrap();
            std::fs::write(dir.join(version).join("value"), version).unwrap();
            symlink(version, dir.join("..data_tmp")).unwrap();
            std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
        };
        publish("..v1");
        symlink("..data/value", dir.join("value")).unwrap();
        let id = env.id("a");
        env.ctr_start(&["--mount", &bind(&dir, "ro")], &id, &["sleep", "1000"]);
        assert_eq!(
            env.ctr_exec(&id, "e1", &["cat", "/mnt/value"]).ok().stdout,
            "..v1"
        );
        publish("..v2");
        std::fs::remove_dir_all(dir.join("..v1")).unwrap();
        let script = "for i in $(seq 100); do [ \"$(cat /mnt/value 2>/dev/null)\" = ..v2 ] && exit 0; sleep 0.1; done; exit 1";
        assert_eq!(env.ctr_exec(&id, "e2", &["sh", "-c", script]).code, 0);
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn a_missing_mount_source_is_named(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let missing = env.folder().join("not-there");
        let done = env.ctr_run(&["--mount", &bind(&missing, "rw")], &env.id("a"), &["true"]);
        assert_ne!(done.code, 0);
        assert!(done.text().contains("not-there"), "{}", done.text());
        assert!(!missing.exists());
        env.assert_clean();
    }

    pub(super) fn tmpfs_and_shm_have_their_sizes(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let mount = "type=tmpfs,src=tmpfs,dst=/scratch,options=nosuid:size=3m:mode=1777";
        let script = "df -k /scratch | tail -1; df -k /dev/shm | tail -1; stat -c %a /scratch; touch /dev/shm/x";
        let done = env
            .ctr_run(&["--mount", mount], &env.id("a"), &["sh", "-c", script])
            .ok();
        let lines: Vec<&str> = done.stdout.lines().collect();
        assert!(lines[0].contains(" 3072 "), "{}", done.stdout);
        assert!(lines[1].contains(" 65536 "), "{}", done.stdout);
        assert_eq!(lines[2], "1777");
        env.assert_clean();
    }

    pub(super) fn the_root_keeps_files_and_modes(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let script = "umask 027; mkdir -p /data/d && echo text > /data/d/f && ln /data/d/f /data/d/g && mkfifo /data/p && chmod 4755 /data/d/f && rm /bin/tac && mv /www /web";
        assert_eq!(env.ctr_exec(&id, "e1", &["sh", "-c", script]).text(), "");
        let script = "stat -c '%a %h %F' /data/d/f /data/p /data/d; ls /bin/tac /www 2>&1 | wc -l; cat /web/index.html; stat -c %a /tmp";
        let done = env.ctr_exec(&id, "e2", &["sh", "-c", script]).ok();
        let page = sealpod_tests::image::WEB_PAGE;
        assert_eq!(
            done.stdout,
            format!("4755 2 regular file\n640 1 fifo\n750 2 directory\n2\n{page}1777\n")
        );
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn a_read_only_root_is_read_only(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let done = env.ctr_run(
            &["--read-only"],
            &env.id("a"),
            &["sh", "-c", "touch /x; touch /dev/shm/x"],
        );
        assert_eq!(done.code, 0, "{}", done.text());
        assert!(
            done.stderr.contains("/x: Read-only file system"),
            "{}",
            done.text()
        );
        assert_eq!(done.stderr.lines().count(), 1, "{}", done.text());
        env.assert_clean();
    }

    pub(super) fn locks_and_links_work_in_a_volume(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let dir = volume(&env);
        let script = "cd /mnt && echo a > a && ln a b && ln -s a c && mv a d && mkdir e && mv d e/f && cat c 2>/dev/null; cat b e/f; truncate -s 1M big && dd if=/dev/zero of=big bs=4k count=4 seek=10 conv=notrunc 2>/dev/null; stat -c %s big; sync; rm -r e";
        let done = env
            .ctr_run(
                &["--mount", &bind(&dir, "rw")],
                &env.id("a"),
                &["sh", "-c", script],
            )
            .ok();
        assert_eq!(done.stdout, "a\na\n1048576\n");
        assert_eq!(
            std::fs::read_link(dir.join("c")).unwrap().to_str(),
            Some("a")
        );
        assert_eq!(dir.join("big").metadata().unwrap().len(), 1 << 20);
        env.assert_clean();
    }
}
