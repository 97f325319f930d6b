//! What an OCI specification asks for and a container has to find, through `ctr run` options.

use crate::on_every_containerd;

on_every_containerd!(
    user_environment_and_folder_are_as_asked,
    the_host_name_is_as_asked,
    capabilities_are_as_asked,
    limits_are_in_the_containers_cgroup,
    a_container_in_a_user_namespace_has_its_files,
    the_default_seccomp_profile_refuses,
    masked_paths_are_empty_and_proc_sys_is_read_only,
    a_container_over_its_memory_limit_is_killed,
    init_is_pid_1_and_orphans_are_reaped,
    devices_are_the_standard_ones,
    the_clock_is_the_hosts,
);

mod bodies {
    use std::time::Duration;

    use sealpod_tests::{Env, Version, assets, need, wait};
    use serde_json::json;

    fn sh(env: &Env, options: &[&str], script: &str) -> String {
        env.ctr_run(options, &env.id("a"), &["sh", "-c", script])
            .ok()
            .stdout
    }

    pub(super) fn user_environment_and_folder_are_as_asked(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let out = env.ctr_run_spec(|spec| {
            let process = &mut spec["process"];
            process["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [2000, 3000] });
            process["env"]
                .as_array_mut()
                .unwrap()
                .push(json!("COLOUR=blue two"));
            process["cwd"] = json!("/www");
            let script = "id -u; id -g; echo $COLOUR; pwd; id -G; touch /root/x 2>&1; true";
            process["args"] = json!(["sh", "-c", script]);
        });
        let out = out.ok().stdout;
        assert!(
            out.starts_with("1000\n1000\nblue two\n/www\n1000 2000 3000\n"),
            "{out}"
        );
        assert!(out.contains("Permission denied"), "{out}");
        env.assert_clean();
    }

    pub(super) fn the_host_name_is_as_asked(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let done = env.ctr_run_spec(|spec| {
            spec["hostname"] = json!("sealed-host");
            let script = "hostname; cat /proc/sys/kernel/hostname";
            spec["process"]["args"] = json!(["sh", "-c", script]);
        });
        assert_eq!(done.ok().stdout, "sealed-host\nsealed-host\n");
        env.assert_clean();
    }

    pub(super) fn capabilities_are_as_asked(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let read = "grep CapEff /proc/self/status | cut -f 2";
        let mask =
            |options: &[&str]| u64::from_str_radix(sh(&env, options, read).trim(), 16).unwrap();
        // containerd's default set, by the numbers of linux/capability.h.
        let default = mask(&[]);
        let all: u64 = [0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31]
            .iter()
            .map(|bit| 1 << bit)
            .sum();
        assert_eq!(default, all, "{default:x}");
        assert_eq!(mask(&["--cap-add", "CAP_SYS_ADMIN"]), all | 1 << 21);
        assert_eq!(mask(&["--cap-drop", "CAP_CHOWN"]), all & !1);
        env.assert_clean();
    }

    pub(super) fn limits_are_in_the_containers_cgroup(version: Version) {
        need!(assets::complete());
        sealpod_tests::only_sealpod!();
        let env = Env::new(version).unwrap();
        let options = [
            "--memory-limit",
            "67108864",
            "--cpu-quota",
            "50000",
            "--cpu-period",
            "100000",
        ];
        let mut all = vec![
            "--mount",
            "type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro",
        ];
        all.extend(options);
        let read = "cd /sys/fs/cgroup && cat memory.max cpu.max /proc/self/cgroup";
        let out = sh(&env, &all, read);
        assert_eq!(out, "67108864\n50000 100000\n0::/\n");
        env.assert_clean();
    }

    pub(super) fn a_container_in_a_user_namespace_has_its_files(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let maps = ["--uidmap", "0:1000:10000", "--gidmap", "0:2000:10000"];
        let script =
            "id -u; stat -c %u:%g /; echo x > /x && cat /x; tr -s ' ' < /proc/self/uid_map";
        assert_eq!(sh(&env, &maps, script), "0\n0:0\nx\n 0 1000 10000\n");
        env.assert_clean();
    }

    pub(super) fn the_default_seccomp_profile_refuses(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let read = "grep -E '^Seccomp:' /proc/self/status | cut -f 2; unshare -U true 2>&1";
        let with = env.ctr_run(&["--seccomp"], &env.id("a"), &["sh", "-c", read]);
        assert!(with.stdout.starts_with("2\n"), "{}", with.text());
        assert!(
            with.stdout.contains("Operation not permitted"),
            "{}",
            with.text()
        );
        assert_eq!(
            sh(
                &env,
                &[],
                "grep -E '^Seccomp:' /proc/self/status | cut -f 2"
            ),
            "0\n"
        );
        env.assert_clean();
    }

    pub(super) fn masked_paths_are_empty_and_proc_sys_is_read_only(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script = "cat /proc/kcore /proc/timer_list 2>/dev/null | wc -c; echo 1 > /proc/sys/vm/swappiness; echo $?; grep -c NoNewPrivs:.1 /proc/self/status";
        let done = env.ctr_run(&[], &env.id("a"), &["sh", "-c", script]);
        assert!(done.stdout.starts_with("0\n1\n1"), "{}", done.text());
        assert!(
            done.stderr.contains("Read-only file system"),
            "{}",
            done.text()
        );
        env.assert_clean();
    }

    pub(super) fn a_container_over_its_memory_limit_is_killed(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let mut watch = env.spawn("ctr", &["events"]);
        let events = watch.stdout.take().unwrap();
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            use std::io::BufRead;
            for line in std::io::BufReader::new(events)
                .lines()
                .map_while(Result::ok)
            {
                let _ = send.send(line);
            }
        });
        let limit = ["--memory-limit", "33554432"];
        let done = env.ctr_run(&limit, &env.id("a"), &["tail", "/dev/zero"]);
        assert_eq!(done.code, 137, "{}", done.text());
        let mut seen = Vec::new();
        let told = loop {
            match lines.recv_timeout(Duration::from_secs(5) * wait::patience()) {
                Ok(line) if line.contains("/tasks/oom") => break true,
                Ok(line) => seen.push(line),
                Err(_) => break false,
            }
        };
        assert!(told, "no OOM event among: {seen:#?}");
        let _ = watch.kill();
        let _ = watch.wait();
        env.assert_clean();
    }

    pub(super) fn init_is_pid_1_and_orphans_are_reaped(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script =
            "echo $$; (sleep 0.1 & exec true) & wait; sleep 0.5; ls -d /proc/[0-9]* | wc -l";
        let out = sh(&env, &[], script);
        assert!(out.starts_with("1\n"), "{out}");
        env.assert_clean();
    }

    pub(super) fn devices_are_the_standard_ones(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script = "ls /dev | sort | tr '\\n' ' '; head -c 4 /dev/urandom | wc -c; echo x > /dev/null; stat -c '%t %T %a' /dev/null; readlink /dev/stdout; readlink /dev/ptmx";
        let out = sh(&env, &[], script);
        let names = out.lines().next().unwrap();
        for device in [
            "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
            "stdout", "tty", "urandom", "zero",
        ] {
            assert!(
                names.split(' ').any(|n| n == device),
                "{device} is not in {names}"
            );
        }
        assert!(
            out.ends_with("4\n1 3 666\n/proc/self/fd/1\npts/ptmx\n"),
            "{out}"
        );
        env.assert_clean();
    }

    pub(super) fn the_clock_is_the_hosts(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let inside: u64 = sh(&env, &[], "date +%s").trim().parse().unwrap();
        let outside = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs();
        assert!(
            outside.abs_diff(inside) <= 5,
            "inside {inside}, outside {outside}"
        );
        env.assert_clean();
    }
}
