//! Tasks as containerd's own client suite looks at them: pids, the order of exits, what is left of a
//! container that has ended.

use crate::on_every_containerd;

on_every_containerd!(
    the_task_is_the_first_of_its_processes,
    the_vm_goes_with_its_only_container,
    an_exec_is_told_before_the_container_that_took_it_along,
);

mod bodies {
    use std::{io::BufRead, time::Duration};

    use sealpod_tests::{Env, Version, assets, need, only_sealpod, wait};

    const SOON: Duration = Duration::from_secs(20);

    fn second_column(table: &str) -> Vec<String> {
        let lines = table.lines().skip(1);
        let column = |n: usize| {
            move |line: &str| {
                line.split_whitespace()
                    .nth(n)
                    .unwrap_or_default()
                    .to_owned()
            }
        };
        lines.map(column(1)).collect()
    }

    pub(super) fn the_task_is_the_first_of_its_processes(version: Version) {
        need!(assets::complete());
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sh", "-c", "sleep 1000; true"]);
        let task = second_column(&env.ctr(&["task", "ls"]).ok().stdout);
        let list = wait::until("two processes", SOON, || {
            let list = env.ctr(&["task", "ps", &id]).ok().stdout;
            let pids = list.lines().skip(1);
            let first = |line: &str| {
                line.split_whitespace()
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            };
            let pids: Vec<_> = pids.map(first).collect();
            (pids.len() == 2).then_some(pids)
        });
        assert_eq!(Some(&list[0]), task.first());
        env.ctr_remove(&id);
        env.assert_clean();
    }

    pub(super) fn the_vm_goes_with_its_only_container(version: Version) {
        need!(assets::complete());
        only_sealpod!();
        let env = Env::new(version).unwrap();
        let id = env.id("a");
        env.ctr_start(&[], &id, &["sh", "-c", "read line; exit 7"]);
        let pid = second_column(&env.ctr(&["task", "ls"]).ok().stdout).remove(0);
        let process = env.namespaces.path(&format!("/proc/{pid}"));
        assert!(process.exists());
        let _ = env.ctr(&["task", "kill", "-s", "KILL", &id]).ok();
        wait::until("VM and file server are gone", SOON, || {
            (!process.exists() && env.processes("virtiofsd").is_empty()).then_some(())
        });
        assert_eq!(env.ctr_status(&id).as_deref(), Some("STOPPED"));
        let deleted = env.ctr(&["task", "delete", &id]);
        assert!(deleted.text().contains("137"), "{}", deleted.text());
        let _ = env.ctr(&["container", "delete", &id]).ok();
        env.assert_clean();
    }

    pub(super) fn an_exec_is_told_before_the_container_that_took_it_along(version: Version) {
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
        env.ctr_start(&[], &id, &["sleep", "1000"]);
        let command = ["task", "exec", "--exec-id", "taken-along", &id];
        let script = ["sh", "-c", "echo up; exec sleep 1000"];
        let mut exec = env.spawn("ctr", &[&command[..], &script[..]].concat());
        let mut out = std::io::BufReader::new(exec.stdout.take().unwrap()).lines();
        assert_eq!(out.next().unwrap().unwrap(), "up");
        let _ = env.ctr(&["task", "kill", "-s", "KILL", &id]).ok();
        let mut exits = Vec::new();
        while exits.len() < 2 {
            let line = lines.recv_timeout(SOON).unwrap();
            if line.contains("/tasks/exit") {
                exits.push(line);
            }
        }
        assert!(exits[0].contains("taken-along"), "{exits:#?}");
        let _ = watch.kill();
        let _ = watch.wait();
        let _ = exec.wait();
        env.ctr_remove(&id);
        env.assert_clean();
    }
}
