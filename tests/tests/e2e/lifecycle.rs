//! A container's life as `ctr` sees it.

use crate::on_every_containerd;

on_every_containerd!(
    run_prints_and_ends_with_the_exit_code,
    the_container_has_a_kernel_of_its_own,
    exec_prints_and_ends_with_its_exit_code,
    a_signal_reaches_the_process_and_is_in_its_status,
    a_paused_container_stands_still_until_resumed,
    kill_all_ends_every_process_of_the_container,
    every_process_is_listed,
    metrics_count_memory_and_processes,
    checkpoint_is_refused_with_a_reason,
    events_come_once_and_in_order,
    a_name_can_be_used_again,
    a_created_container_can_be_deleted_unstarted,
    exec_survives_the_restart_of_containerd,
);

mod bodies {
    use std::{io::BufRead, time::Duration};

    use sealpod_tests::{Env, Version, assets, need, only_sealpod, wait};

    pub(super) fn run_prints_and_ends_with_the_exit_code(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let script = "echo out; echo err >&2; exit 7";
        let done = env.ctr_run(&[], &env.id("a"), &["sh", "-c", script]);
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (7, "out\n"),
            "{}",
            done.text()
        );
        assert_eq!(done.stderr.lines().next(), Some("err"));
        env.assert_clean();
    }

    pub(super) fn the_container_has_a_kernel_of_its_own(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let inside = env
            .ctr_run(
                &[],
                &env.id("a"),
                &["cat", "/proc/sys/kernel/random/boot_id"],
            )
            .ok();
        let outside = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        assert_ne!(inside.stdout, outside);
        assert_eq!(inside.stdout.len(), outside.len());
        env.assert_clean();
    }

    pub(super) fn exec_prints_and_ends_with_its_exit_code(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let done = env.ctr_exec(&id, "e1", &["sh", "-c", "echo out; echo err >&2; exit 9"]);
        assert_eq!(
            (done.code, done.stdout.as_str()),
            (9, "out\n"),
            "{}",
            done.text()
        );
        // The same exec id again: the first is gone.
        let done = env.ctr_exec(&id, "e1", &["true"]);
        assert_eq!(done.code, 0, "{}", done.text());
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn a_signal_reaches_the_process_and_is_in_its_status(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let (handled, killed) = (env.id("handled"), env.id("killed"));
        let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
        let mut child = env.ctr_spawn(&[], &handled, &["sh", "-c", script]);
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let _ = env.ctr(&["task", "kill", "-s", "TERM", &handled]).ok();
        assert_eq!(lines.next().unwrap().unwrap(), "caught");
        assert_eq!(child.wait().unwrap().code(), Some(3));

        let mut child = env.ctr_spawn(&[], &killed, &["sh", "-c", "echo ready; exec sleep 1000"]);
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let _ = env.ctr(&["task", "kill", "-s", "KILL", &killed]).ok();
        assert_eq!(child.wait().unwrap().code(), Some(128 + 9));
        env.assert_clean();
    }

    pub(super) fn a_paused_container_stands_still_until_resumed(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        let script = "i=0; while :; do i=$((i+1)); echo $i; sleep 0.05; done";
        let mut child = env.ctr_spawn(&[], &id, &["sh", "-c", script]);
        let (send, lines) = std::sync::mpsc::channel();
        let out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in std::io::BufReader::new(out).lines().map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        let limit = Duration::from_secs(20) * wait::patience();
        lines.recv_timeout(limit).unwrap();
        let _ = env.ctr(&["task", "pause", &id]).ok();
        assert_eq!(env.ctr_status(&id).as_deref(), Some("PAUSED"));
        // What was under way arrives, then nothing more.
        while lines.recv_timeout(Duration::from_millis(700)).is_ok() {}
        let _ = env.ctr(&["task", "resume", &id]).ok();
        lines.recv_timeout(limit).unwrap();
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        let _ = env.ctr(&["task", "kill", "-s", "KILL", &id]).ok();
        assert_eq!(child.wait().unwrap().code(), Some(137));
        env.assert_clean();
    }

    pub(super) fn kill_all_ends_every_process_of_the_container(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        let script = "sleep 1001 & sleep 1002 & trap '' TERM; wait; wait; wait; exit 5";
        let mut child = env.ctr_spawn(&[], &id, &["sh", "-c", script]);
        wait::until("three processes", Duration::from_secs(20), || {
            let list = env.ctr(&["task", "ps", &id]).stdout;
            (list.lines().count() >= 4).then_some(())
        });
        let _ = env.ctr(&["task", "kill", "--all", "-s", "TERM", &id]).ok();
        // The shell ignores it; its children are gone, so it ends.
        assert_eq!(child.wait().unwrap().code(), Some(5));
        env.assert_clean();
    }

    pub(super) fn every_process_is_listed(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let mut exec = env.spawn(
            "ctr",
            &[
                "task",
                "exec",
                "--exec-id",
                "second",
                &id,
                "sh",
                "-c",
                "echo up; exec cat",
            ],
        );
        let mut lines = std::io::BufReader::new(exec.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "up");
        let list = env.ctr(&["task", "ps", &id]).ok().stdout;
        assert_eq!(list.lines().count(), 3, "{list}");
        assert!(list.contains("second"), "{list}");
        drop(exec.stdin.take());
        assert_eq!(exec.wait().unwrap().code(), Some(0));
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn metrics_count_memory_and_processes(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let table = env.ctr(&["task", "metrics", &id]).ok().stdout;
        let value = |name: &str| -> Option<u64> {
            let line = table
                .lines()
                .find(|l| l.split_whitespace().next() == Some(name))?;
            line.split_whitespace().nth(1)?.parse().ok()
        };
        let memory = value("memory.usage").or(value("memory.usage_in_bytes"));
        assert!(memory.is_some_and(|m| m > 4096), "{table}");
        assert_eq!(value("pids.current"), Some(1), "{table}");
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn checkpoint_is_refused_with_a_reason(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let done = env.ctr(&["task", "checkpoint", &id]);
        assert_ne!(done.code, 0);
        assert!(
            done.text().to_lowercase().contains("checkpoint"),
            "{}",
            done.text()
        );
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn events_come_once_and_in_order(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let mut watch = env.spawn("ctr", &["events"]);
        let events = std::io::BufReader::new(watch.stdout.take().unwrap()).lines();
        let (send, lines) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for line in events.map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        let id = env.id("a");
        // Until the subscription stands, events are lost: make some that do not matter.
        wait::until("subscription", Duration::from_secs(20), || {
            let _ = env.ctr(&["namespace", "label", "default", "touched=1"]);
            lines.try_recv().ok()
        });
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        assert_eq!(env.ctr_exec(&id, "e1", &["true"]).code, 0);
        let _ = env.ctr(&["task", "pause", &id]).ok();
        let _ = env.ctr(&["task", "resume", &id]).ok();
        let _ = env.ctr(&["task", "kill", "-s", "KILL", &id]).ok();
        wait::until("stopped", Duration::from_secs(20), || {
            (env.ctr_status(&id).as_deref() == Some("STOPPED")).then_some(())
        });
        let _ = env.ctr(&["task", "delete", &id]);
        let _ = env.ctr(&["container", "delete", &id]).ok();
        let mut topics = Vec::new();
        loop {
            let line = lines
                .recv_timeout(Duration::from_secs(20) * wait::patience())
                .unwrap();
            if line.contains("/containers/delete") {
                break;
            }
            let topic = line.split_whitespace().find(|w| w.starts_with("/tasks/"));
            topics.extend(topic.map(str::to_owned));
        }
        let _ = watch.kill();
        let _ = watch.wait();
        let expected = [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "paused",
            "resumed",
            "exit",
            "delete",
        ];
        let expected: Vec<String> = expected.iter().map(|t| format!("/tasks/{t}")).collect();
        // Whether the deletion of an exec is announced differs between versions of containerd.
        let mut without_exec_delete = topics.clone();
        if topics.iter().filter(|t| *t == "/tasks/delete").count() == 2 {
            let first = topics.iter().position(|t| t == "/tasks/delete").unwrap();
            without_exec_delete.remove(first);
        }
        assert_eq!(without_exec_delete, expected);
        env.assert_clean();
    }

    pub(super) fn a_name_can_be_used_again(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("again");
        for round in ["one", "two", "three"] {
            let done = env.ctr_run(&[], &id, &["echo", round]).ok();
            assert_eq!(done.stdout.trim(), round);
        }
        env.assert_clean();
    }

    pub(super) fn a_created_container_can_be_deleted_unstarted(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        let args = [
            "container",
            "create",
            "--runtime",
            &assets::runtime(),
            sealpod_tests::image::BUSYBOX,
            &id,
            "true",
        ];
        let _ = env.ctr(&args).ok();
        let _ = env.ctr(&["container", "delete", &id]).ok();
        env.assert_clean();
    }

    pub(super) fn exec_survives_the_restart_of_containerd(version: Version) {
        need!(assets::complete());
        let mut env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        env.containerd.kill();
        env.containerd.start(&env.namespaces).unwrap();
        assert_eq!(env.ctr_status(&id).as_deref(), Some("RUNNING"));
        let done = env.ctr_exec(&id, "e1", &["echo", "alive"]).ok();
        assert_eq!(done.stdout, "alive\n");
        env.ctr_remove(&id);
        env.assert_clean();
    }
}
