//! The pod's share, served by a real virtiofsd in its jail: alone, and to a guest. Each test runs
//! again in a process with a mount namespace of its own. Skips, loudly, without root or virtiofsd.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealpod_shim::child::Exit;
use sealpod_shim::host_cgroup::Entrance;
use sealpod_shim::ledger::{Ledger, clean};
use sealpod_shim::virtiofs::{Virtiofs, make_share};
use sealpod_shim::vm::{ExitReason, Vm};

use crate::bench::{self, Bench, run};

const INSIDE: &str = "SEALPOD_TEST_INSIDE";

/// virtiofsd from the environment, the cache that `get-virtiofsd.sh` fills, or the system.
pub(crate) fn virtiofsd() -> Option<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let cache = std::env::var("SEALPOD_CACHE").unwrap_or(format!("{home}/.cache/sealpod"));
    let built = std::fs::read_dir(cache).into_iter().flatten().flatten();
    let built = built.map(|e| e.path().join("bin/virtiofsd"));
    let named = std::env::var_os("SEALPOD_VIRTIOFSD").map(PathBuf::from);
    named
        .into_iter()
        .chain(built)
        .chain(["/usr/libexec/virtiofsd".into()])
        .find(|p| p.exists())
}

/// Runs `test` again in a mount namespace of its own; true there.
pub(crate) fn inside(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    if !rustix::process::geteuid().is_root() || virtiofsd().is_none() {
        eprintln!("SKIPPED: needs root and virtiofsd (shim/get-virtiofsd.sh)");
        return false;
    }
    let status = Command::new("unshare")
        .args(["--mount", "--propagation=slave"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--test-threads=1", test])
        .env(INSIDE, "1")
        .status()
        .unwrap();
    assert!(status.success());
    false
}

fn status_field(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

#[tokio::test]
async fn mounts_made_later_reach_the_daemon_and_it_sees_nothing_else() {
    if !inside("share::mounts_made_later_reach_the_daemon_and_it_sees_nothing_else") {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("pod");
    let ledger = Ledger::open(&dir).unwrap();
    let share = make_share(&dir).unwrap();
    let volume = base.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("data"), "x").unwrap();
    for name in ["early", "late", "over"] {
        std::fs::create_dir(share.join(name)).unwrap();
    }
    let text = |p: &Path| p.to_str().unwrap().to_owned();
    run(
        "mount",
        &["--bind", &text(&volume), &text(&share.join("early"))],
    );

    let program = virtiofsd().unwrap();
    let (daemon, client) = Virtiofs::start(&program, &dir, Entrance::default(), &ledger)
        .await
        .unwrap();
    // It changes its root once it has started; then its root is the share.
    let root = PathBuf::from(format!("/proc/{}/root", daemon.pid()));
    let deadline = Instant::now() + Duration::from_secs(20);
    while !root.join("early/data").exists() {
        assert_eq!(
            daemon.watch().exited(),
            None,
            "{:?}",
            daemon.watch().output()
        );
        assert!(Instant::now() < deadline, "it does not serve the share");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    run(
        "mount",
        &["--bind", &text(&volume), &text(&share.join("late"))],
    );
    run(
        "mount",
        &["-t", "tmpfs", "root", &text(&share.join("over"))],
    );
    std::fs::write(share.join("over/etc"), "").unwrap();
    assert!(root.join("late/data").exists() && root.join("over/etc").exists());
    run("umount", &[&text(&share.join("late"))]);
    assert!(!root.join("late/data").exists());

    let mut names: Vec<_> = std::fs::read_dir(&root)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["early", "late", "over"]);
    let points = std::fs::read_to_string(format!("/proc/{}/mountinfo", daemon.pid())).unwrap();
    assert!(
        !points.contains(" /home") && !points.contains(" /var"),
        "{points}"
    );
    assert_eq!(root.metadata().unwrap().uid(), 0);
    assert_eq!(status_field(daemon.pid(), "NoNewPrivs"), "1");
    assert_eq!(status_field(daemon.pid(), "NSpid").split('\t').count(), 2);

    // Its client is the VMM; when that is gone it has nothing left to do.
    drop(client);
    let exit = tokio::time::timeout(Duration::from_secs(10), daemon.watch().wait())
        .await
        .unwrap();
    assert!(matches!(exit, Exit::Code(_)), "{exit}");
    drop(daemon);
    for name in ["early", "over", ""] {
        run("umount", &[&text(&share.join(name))]);
    }
    let report = clean(&dir);
    assert!(report.is_clean(), "{report:?}");
    assert!(volume.join("data").exists());
}

#[tokio::test]
async fn a_killed_daemon_is_seen_and_leaves_nothing() {
    if !inside("share::a_killed_daemon_is_seen_and_leaves_nothing") {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("pod");
    let ledger = Ledger::open(&dir).unwrap();
    let share = make_share(&dir).unwrap();
    let program = virtiofsd().unwrap();
    let (daemon, _client) = Virtiofs::start(&program, &dir, Entrance::default(), &ledger)
        .await
        .unwrap();
    run("kill", &["-9", &daemon.pid().to_string()]);
    assert_eq!(daemon.watch().wait().await, Exit::Signal(libc::SIGKILL));
    assert_eq!(daemon.stop().await, Exit::Signal(libc::SIGKILL));
    run("umount", &[share.to_str().unwrap()]);
    assert!(clean(&dir).is_clean());
}

#[tokio::test]
async fn a_guest_sees_what_the_host_changes_and_the_host_what_the_guest_writes() {
    if !inside("share::a_guest_sees_what_the_host_changes_and_the_host_what_the_guest_writes") {
        return;
    }
    // What a container sees of a ConfigMap: a link to a folder, swapped atomically.
    let script = "mount -t virtiofs sealpod /mnt && echo up
        until [ -e /mnt/late/data ]; do sleep 0.05; done; echo late $(cat /mnt/late/data)
        until grep -q two /mnt/map/current/key; do sleep 0.05; done; echo swapped
        echo guest > /mnt/late/new; chown 12:34 /mnt/late/new; chmod 4755 /mnt/late/new
        mknod /mnt/late/null c 1 3; ln -s nowhere /mnt/late/link; mkfifo /mnt/late/pipe
        echo x > /mnt/late/null || echo nodev
        cat /mnt/../etc/passwd /mnt/escape 2>/dev/null; echo done; sleep 1000";
    let Some(bench) = Bench::with_guest(script) else {
        return;
    };
    let dir = bench.ledger.dir().to_path_buf();
    let share = make_share(&dir).unwrap();
    let volume = bench.file("unused", b"");
    let volume = volume.with_file_name("volume");
    for dir in ["late", "map", "map/one", "map/two"] {
        std::fs::create_dir(share.join(dir)).unwrap();
    }
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("data"), "x").unwrap();
    std::fs::write(share.join("map/one/key"), "one").unwrap();
    std::fs::write(share.join("map/two/key"), "two").unwrap();
    let link = |to: &str, name: &str| {
        std::os::unix::fs::symlink(to, share.join("map").join(name)).unwrap();
    };
    link("one", "current");
    // In the guest it leads nowhere: links are the guest's to follow.
    std::os::unix::fs::symlink("/etc/passwd", share.join("escape")).unwrap();

    let program = virtiofsd().unwrap();
    let (daemon, client) = Virtiofs::start(&program, &dir, Entrance::default(), &bench.ledger)
        .await
        .unwrap();
    let vm: Arc<dyn Vm> = bench.start_guest(|c| c.share = Some(client)).await;
    bench::line(&vm, "up").await;
    let at = share.join("late");
    run(
        "mount",
        &["--bind", volume.to_str().unwrap(), at.to_str().unwrap()],
    );
    bench::line(&vm, "late x").await;
    link("two", "next");
    std::fs::rename(share.join("map/next"), share.join("map/current")).unwrap();
    bench::line(&vm, "swapped").await;
    bench::line(&vm, "done").await;
    assert!(!vm.console_tail().iter().any(|l| l.contains("root:")));
    let new = volume.join("new").metadata().unwrap();
    assert_eq!(
        (new.uid(), new.gid(), new.mode() & 0o7777),
        (12, 34, 0o4755)
    );
    assert_eq!(
        volume.join("null").metadata().unwrap().rdev(),
        rustix::fs::makedev(1, 3)
    );
    assert_eq!(
        std::fs::read_link(volume.join("link")).unwrap(),
        Path::new("nowhere")
    );

    // Without its share a guest is of no use; but it is the pod that ends it.
    daemon.stop().await;
    assert_eq!(daemon.watch().exited(), Some(Exit::Signal(libc::SIGKILL)));
    vm.stop().await;
    assert_eq!(bench::ended(&vm).await.reason, ExitReason::Stopped);
    drop(vm);
    run("umount", &[at.to_str().unwrap()]);
    run("umount", &[share.to_str().unwrap()]);
    bench.finish();
}

/// The test binary runs itself as the shim of a pod with a VM and a share, and is then killed.
#[tokio::test]
async fn when_the_shim_is_killed_everything_goes() {
    const SHIM: &str = "SEALPOD_TEST_SHIM";
    let name = "share::when_the_shim_is_killed_everything_goes";
    let Some(dir) = std::env::var_os(SHIM).map(PathBuf::from) else {
        return as_parent(name, SHIM).await;
    };
    let bench = Bench::with_guest("echo up; sleep 1000").unwrap();
    let ledger = Ledger::open(&dir).unwrap();
    make_share(&dir).unwrap();
    let group = format!("/sealpod-killed-{}/pod", std::process::id());
    let cgroup = sealpod_shim::host_cgroup::HostCgroup::create(&group, "x", &ledger, true).unwrap();
    let program = virtiofsd().unwrap();
    let entrance = cgroup.entrance().unwrap();
    let (daemon, client) = Virtiofs::start(&program, &dir, entrance, &ledger)
        .await
        .unwrap();
    let mut config = bench.config("");
    config.kernel_params.clear();
    config.dir = dir;
    config.share = Some(client);
    config.cgroup = cgroup.entrance().unwrap();
    let vm = crate::bench::driver().start(config, &ledger);
    let vm = vm.await.unwrap();
    bench::line(&vm, "up").await;
    println!("pids={},{}", daemon.pid(), vm.pid());
    std::future::pending::<()>().await;
}

async fn as_parent(name: &str, role: &str) {
    if !rustix::process::geteuid().is_root() || virtiofsd().is_none() {
        eprintln!("SKIPPED: needs root and virtiofsd (shim/get-virtiofsd.sh)");
        return;
    }
    if Bench::with_guest("").is_none() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("pod");
    let mut shim = Command::new("unshare")
        .args(["--mount", "--propagation=slave"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "--test-threads=1", name])
        .env(role, &dir)
        .env("TMPDIR", base.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(shim.stdout.take().unwrap());
    let pids: Vec<u32> = loop {
        let mut line = String::new();
        let read = std::io::BufRead::read_line(&mut out, &mut line).unwrap();
        assert_ne!(read, 0, "the shim ended by itself");
        if let Some((_, pids)) = line.split_once("pids=") {
            break pids.trim().split(',').map(|p| p.parse().unwrap()).collect();
        }
    };
    let cgroups = std::fs::read_to_string(format!("/proc/{}/cgroup", pids[1])).unwrap();
    assert!(cgroups.contains("sealpod-killed"), "{cgroups}");
    shim.kill().unwrap();
    shim.wait().unwrap();
    let report = clean(&dir);
    assert!(report.is_clean(), "{report:?}");
    assert!(!dir.exists());
    for pid in pids {
        // Gone, or a zombie that the machine's init has not come round to.
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(base.path().to_str().unwrap()), "{mounts}");
    for line in cgroups.lines() {
        let path = line.rsplit(':').next().unwrap();
        assert!(
            !Path::new("/sys/fs/cgroup/unified")
                .join(&path[1..])
                .exists()
                || path == "/"
        );
    }
}
