//! Tests on the real cgroup hierarchies of the machine. Need root, and say so when they skip.

use super::*;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use nix::sched::{CloneFlags, unshare};

use crate::child;

fn root_or_skip() -> bool {
    let ok = rustix::process::geteuid().is_root() && !hierarchies().is_empty();
    if !ok {
        eprintln!("SKIPPED: needs root and a mounted cgroup hierarchy");
    }
    ok
}

fn ledger() -> (tempfile::TempDir, Ledger) {
    let base = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&base.path().join("pod")).unwrap();
    (base, ledger)
}

#[test]
fn hybrid_mounts_are_found_once_each() {
    let text = "\
30 23 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/unified rw shared:4 - cgroup2 cgroup2 rw
33 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
34 30 0:29 / /mnt/elsewhere rw - cgroup cgroup rw,cpuset
junk
";
    assert_eq!(
        parse_mountinfo(text),
        [
            Path::new("/sys/fs/cgroup/cpu,cpuacct"),
            Path::new("/sys/fs/cgroup/unified")
        ]
    );
}

#[test]
fn a_pods_cgroup_holds_its_processes_and_goes_with_them_and_its_empty_parents() {
    if !root_or_skip() {
        return;
    }
    let (_base, ledger) = ledger();
    let top = format!("sealpod-test-{}", std::process::id());
    let a = HostCgroup::create(&format!("/{top}/x/a"), "a", &ledger, true).unwrap();
    let b = HostCgroup::create(&format!("/{top}/x/b"), "b", &ledger, true).unwrap();
    assert!(a.degraded().is_empty());
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    join(a.dirs(), child.id()).unwrap();
    for dir in a.dirs() {
        let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), child.id().to_string(), "{}", dir.display());
    }
    a.remove().unwrap();
    a.remove().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(a.dirs().iter().all(|d| !d.exists()));
    assert!(b.dirs().iter().all(|d| d.exists()));
    b.remove().unwrap();
    for root in hierarchies() {
        assert!(!root.join(&top).exists(), "{}", root.display());
    }
}

#[test]
fn a_parent_that_was_there_before_stays() {
    if !root_or_skip() {
        return;
    }
    let (_base, ledger) = ledger();
    let top = format!("sealpod-kept-{}", std::process::id());
    let kept: Vec<PathBuf> = hierarchies().iter().map(|r| r.join(&top)).collect();
    for dir in &kept {
        std::fs::create_dir(dir).unwrap();
    }
    let a = HostCgroup::create(&format!("/{top}/a"), "a", &ledger, true).unwrap();
    a.remove().unwrap();
    for dir in &kept {
        assert!(dir.exists(), "{}", dir.display());
        std::fs::remove_dir(dir).unwrap();
    }
}

#[test]
fn a_process_that_keeps_forking_is_killed_with_all_its_children() {
    if !root_or_skip() {
        return;
    }
    let (base, ledger) = ledger();
    let top = format!("sealpod-fork-{}", std::process::id());
    let a = HostCgroup::create(&format!("/{top}/a"), "a", &ledger, true).unwrap();
    // Joins before it forks, and forks until it is killed.
    let script = "read go; while true; do sleep 100 & sleep 0.01; done";
    let mut child = Command::new("sh")
        .args(["-c", script])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    join(a.dirs(), child.id()).unwrap();
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    while std::fs::read_to_string(a.dirs()[0].join("cgroup.procs"))
        .unwrap()
        .lines()
        .count()
        < 4
    {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // As `delete` does after the shim was killed: from the ledger alone.
    let report = crate::ledger::clean(&base.path().join("pod"));
    assert!(report.is_clean(), "{report:?}");
    child.wait().unwrap();
    assert!(a.dirs().iter().all(|d| !d.exists()));
}

/// A child of the shim's that stays.
async fn child(entrance: Entrance, ledger: &Ledger) -> child::Child {
    let mut command = child::Command::new("test", Path::new("/bin/sh"));
    command.args(["-c", "exec sleep 1000"]);
    command.cgroup(entrance);
    child::spawn(command, ledger).await.unwrap()
}

#[tokio::test]
async fn a_child_is_in_its_cgroup_before_its_program_runs() {
    if !root_or_skip() {
        return;
    }
    let (_base, ledger) = ledger();
    let top = format!("sealpod-test-child-{}", std::process::id());
    let cgroup = HostCgroup::create(&format!("/{top}"), "a", &ledger, true).unwrap();
    let child = child(cgroup.entrance().unwrap(), &ledger).await;
    for dir in cgroup.dirs() {
        let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), child.pid().to_string(), "{}", dir.display());
    }
    drop(child);
    cgroup.remove().unwrap();
}

/// Also where the machine itself has cgroup v1.
#[tokio::test]
async fn a_child_is_made_in_a_cgroup_of_v2() {
    let base = tempfile::tempdir().unwrap();
    let point = base.path();
    let mount = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).arg(point).status();
        done.is_ok_and(|status| status.success())
    };
    if !mount("mount", &["-t", "cgroup2", "none"]) {
        eprintln!("SKIPPED: needs root and cgroup v2");
        return;
    }
    let (_base, ledger) = ledger();
    let dir = point.join(format!("sealpod-test-born-{}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    let entrance = Entrance::of(std::slice::from_ref(&dir)).unwrap();
    assert!(matches!(entrance, Entrance::Born(_)));
    let copy = entrance.try_clone().unwrap();
    for entrance in [entrance, copy] {
        let child = child(entrance, &ledger).await;
        let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        assert_eq!(procs.trim(), child.pid().to_string());
        drop(child);
    }
    remove(&dir).unwrap();
    // One that is gone takes nobody in, and says so.
    std::fs::create_dir(&dir).unwrap();
    let gone = Entrance::of(std::slice::from_ref(&dir)).unwrap();
    std::fs::remove_dir(&dir).unwrap();
    let mut command = child::Command::new("test", Path::new("/bin/true"));
    command.cgroup(gone);
    let refused = child::spawn(command, &ledger).await.unwrap_err();
    assert!(refused.to_string().contains("cgroup"), "{refused}");
    assert!(mount("umount", &[]));
}

/// In a process of its own: all of it moves, and what else is in the cgroup is killed.
#[test]
fn threads_of_the_caller_that_are_ending_do_not_keep_its_cgroup() {
    const INSIDE: &str = "SEALPOD_TEST_INSIDE";
    const NAME: &str =
        "host_cgroup::tests::threads_of_the_caller_that_are_ending_do_not_keep_its_cgroup";
    if !root_or_skip() {
        return;
    }
    if std::env::var_os(INSIDE).is_none() {
        let mut again = Command::new(std::env::current_exe().unwrap());
        let status = again.args(["--exact", NAME]).env(INSIDE, "1").status();
        assert!(status.unwrap().success());
        return;
    }
    let (_base, ledger) = ledger();
    let path = format!("/sealpod-test-threads-{}", std::process::id());
    for round in 0..20 {
        let cgroup = HostCgroup::create(&path, "a", &ledger, true).unwrap();
        join(cgroup.dirs(), 0).unwrap();
        let (alive, ended) = std::sync::mpsc::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // The last one in a mount namespace takes its time to end.
            tell.send(unshare(CloneFlags::CLONE_NEWNS)).unwrap();
            let _ = ended.recv();
        });
        told.recv().unwrap().unwrap();
        drop(alive);
        cgroup
            .remove()
            .unwrap_or_else(|e| panic!("round {round}: {e}"));
    }
}
