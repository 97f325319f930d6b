//! The pod's share, served by a real virtiofsd in its jail. Runs in a process with a mount namespace
//! of its own. Skips, loudly, without root or virtiofsd.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use sealpod_shim::child::Exit;
use sealpod_shim::ledger::{Ledger, clean};
use sealpod_shim::virtiofs::{Virtiofs, make_share};

const INSIDE: &str = "SEALPOD_TEST_INSIDE";

/// virtiofsd from the environment, the cache that `get-virtiofsd.sh` fills, or the system.
fn virtiofsd() -> Option<PathBuf> {
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
fn inside(test: &str) -> bool {
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

fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

/// The one thread of a process that is named like its program.
fn status_field(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find(|l| l.starts_with(name)).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

#[tokio::test]
async fn mounts_made_later_reach_the_daemon_and_it_sees_nothing_else() {
    if !inside("mounts_made_later_reach_the_daemon_and_it_sees_nothing_else") {
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
    let (daemon, client) = Virtiofs::start(&program, &dir, Vec::new(), &ledger)
        .await
        .unwrap();
    // It changes its root once it has started; then its root is the share.
    let root = PathBuf::from(format!("/proc/{}/root", daemon.pid()));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !root.join("early/data").exists() {
        assert_eq!(
            daemon.watch().exited(),
            None,
            "{:?}",
            daemon.watch().output()
        );
        assert!(
            std::time::Instant::now() < deadline,
            "it does not serve the share"
        );
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }

    run(
        "mount",
        &["--bind", &text(&volume), &text(&share.join("late"))],
    );
    let (lower, upper, work) = ("lower", "upper", "work");
    for name in [lower, upper, work] {
        std::fs::create_dir(base.path().join(name)).unwrap();
    }
    // An overlay on a tmpfs or overlay base is not possible everywhere: a tmpfs stands for it.
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
    let exit = tokio::time::timeout(std::time::Duration::from_secs(10), daemon.watch().wait())
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
    if !inside("a_killed_daemon_is_seen_and_leaves_nothing") {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("pod");
    let ledger = Ledger::open(&dir).unwrap();
    let share = make_share(&dir).unwrap();
    let program = virtiofsd().unwrap();
    let (daemon, _client) = Virtiofs::start(&program, &dir, Vec::new(), &ledger)
        .await
        .unwrap();
    run("kill", &["-9", &daemon.pid().to_string()]);
    assert_eq!(daemon.watch().wait().await, Exit::Signal(libc::SIGKILL));
    assert_eq!(daemon.stop().await, Exit::Signal(libc::SIGKILL));
    run("umount", &[share.to_str().unwrap()]);
    assert!(clean(&dir).is_clean());
}
