//! Tests of the ledger, with real processes, folders and mounts.

use super::*;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

fn pod() -> (tempfile::TempDir, PathBuf) {
    let base = tempfile::tempdir().unwrap();
    let dir = base.path().join("pod");
    (base, dir)
}

fn held(dir: &Path) -> Vec<Resource> {
    let all = read(dir).unwrap().entries;
    all.into_iter()
        .filter(|e| !e.released)
        .map(|e| e.resource)
        .collect()
}

fn path(dir: &Path, name: &str) -> Resource {
    Resource::Path {
        path: dir.join(name),
    }
}

#[test]
fn what_was_released_is_not_held_and_numbers_go_on_after_reopening() {
    let (_base, dir) = pod();
    let ledger = Ledger::open(&dir).unwrap();
    let a = ledger.record(path(&dir, "a")).unwrap();
    let b = ledger.record(path(&dir, "b")).unwrap();
    ledger.release(a).unwrap();
    drop(ledger);
    let ledger = Ledger::open(&dir).unwrap();
    let c = ledger.record(path(&dir, "c")).unwrap();
    assert!(c > b);
    assert_eq!(held(&dir), [path(&dir, "b"), path(&dir, "c")]);
}

#[test]
fn torn_records_cost_nothing_but_themselves() {
    let (_base, dir) = pod();
    let ledger = Ledger::open(&dir).unwrap();
    ledger.record(path(&dir, "a")).unwrap();
    std::fs::write(dir.join("b"), "").unwrap();
    let mut raw = OpenOptions::new()
        .append(true)
        .open(dir.join(FILE_NAME))
        .unwrap();
    raw.write_all(b"\n{\"op\":\"taken\",\"id\":9,\"reso")
        .unwrap();
    ledger.record(path(&dir, "b")).unwrap();
    raw.write_all(b"\xff\xfe{{{").unwrap();
    assert_eq!(held(&dir), [path(&dir, "a"), path(&dir, "b")]);
    let report = clean(&dir);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(report.torn, 2);
    assert!(!dir.exists());
}

#[test]
fn cleaning_kills_the_recorded_process_and_may_be_repeated() {
    let (_base, dir) = pod();
    let ledger = Ledger::open(&dir).unwrap();
    let id = ledger
        .record(Resource::Process {
            name: "sleeper".into(),
        })
        .unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    ledger.started(id, child.id()).unwrap();
    let report = clean(&dir);
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    assert!(clean(&dir).is_clean());
}

#[test]
fn a_process_that_reused_the_pid_is_left_alone() {
    let (_base, dir) = pod();
    let ledger = Ledger::open(&dir).unwrap();
    let id = ledger
        .record(Resource::Process { name: "old".into() })
        .unwrap();
    let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
    ledger
        .append(&Record::Started {
            id,
            pid: child.id(),
            start_time: start_time(child.id()).unwrap() - 1,
        })
        .unwrap();
    assert!(clean(&dir).is_clean());
    assert!(child.try_wait().unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn records_that_point_elsewhere_are_refused_and_the_folder_stays() {
    let (base, dir) = pod();
    let precious = base.path().join("precious");
    std::fs::write(&precious, "x").unwrap();
    let ledger = Ledger::open(&dir).unwrap();
    for resource in [
        Resource::Path {
            path: precious.clone(),
        },
        Resource::Path {
            path: dir.join("../precious"),
        },
        Resource::Mount {
            target: "/proc".into(),
        },
        Resource::Cgroup {
            paths: vec!["/sys/fs/cgroup".into()],
        },
    ] {
        ledger.record(resource).unwrap();
    }
    let report = clean(&dir);
    assert_eq!(report.failed.len(), 4, "{report:?}");
    assert!(precious.exists() && dir.exists());
}

#[test]
fn a_folder_that_others_may_write_to_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let (_base, dir) = pod();
    drop(Ledger::open(&dir).unwrap());
    std::fs::set_permissions(&dir, std::fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(
        Ledger::open(&dir),
        Err(LedgerError::Folder { .. })
    ));
    assert!(!clean(&dir).is_clean());
}

#[test]
fn links_in_the_folder_are_removed_and_not_followed() {
    let (base, dir) = pod();
    let outside = base.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("file"), "x").unwrap();
    drop(Ledger::open(&dir).unwrap());
    std::fs::create_dir(dir.join("share")).unwrap();
    std::os::unix::fs::symlink(&outside, dir.join("share/link")).unwrap();
    assert!(clean(&dir).is_clean());
    assert!(!dir.exists() && outside.join("file").exists());
}

/// Needs root; runs on a thread with a mount namespace of its own.
#[test]
fn a_volume_still_mounted_in_the_folder_survives_and_a_recorded_mount_goes() {
    use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root");
        return;
    }
    std::thread::spawn(|| {
        #[expect(unsafe_code, reason = "unshare is unsafe for CLONE_FILES only")]
        // SAFETY: no file descriptor table is unshared; the thread ends with this test.
        unsafe {
            unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS).unwrap();
        }
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        let (base, dir) = pod();
        let volume = base.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("data"), "x").unwrap();
        let ledger = Ledger::open(&dir).unwrap();
        let target = dir.join("mnt");
        std::fs::create_dir(&target).unwrap();
        mount_bind(&volume, &target).unwrap();
        let report = clean(&dir);
        assert!(!report.is_clean(), "{report:?}");
        assert!(volume.join("data").exists() && target.join("data").exists());

        std::fs::create_dir_all(&dir).unwrap();
        let ledger2 = Ledger::open(&dir).unwrap();
        drop(ledger);
        ledger2
            .record(Resource::Mount {
                target: target.clone(),
            })
            .unwrap();
        let report = clean(&dir);
        assert!(report.is_clean(), "{report:?}");
        assert!(volume.join("data").exists() && !dir.exists());
    })
    .join()
    .unwrap();
}

/// Needs root and the `ip` and `tc` programs; the namespace is that of a process made for it.
#[test]
fn a_qdisc_and_a_link_in_another_namespace_are_removed() {
    let have = |program: &str| Command::new(program).arg("-V").output().is_ok();
    if !rustix::process::geteuid().is_root() || !have("ip") || !have("tc") {
        eprintln!("SKIPPED: needs root, ip and tc");
        return;
    }
    let (_base, dir) = pod();
    let ledger = Ledger::open(&dir).unwrap();
    let script = "ip link add spare type veth peer name other && \
        ip link add eth0 type veth peer name eth1 && \
        tc qdisc add dev eth0 ingress && echo ready && exec sleep 1000";
    let mut holder = Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0u8; 5];
    holder
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut ready)
        .unwrap();
    let netns = PathBuf::from(format!("/proc/{}/ns/net", holder.id()));
    let state = || {
        let target = format!("--net={}", netns.display());
        let show = "ip -o link; tc qdisc show dev eth0";
        let out = Command::new("nsenter")
            .args([&target, "sh", "-c", show])
            .output();
        String::from_utf8(out.unwrap().stdout).unwrap()
    };
    assert!(state().contains("spare") && state().contains("ingress"));
    let link = |name: &str| Resource::Link {
        netns: netns.clone(),
        name: name.into(),
    };
    for resource in [
        link("spare"),
        link("gone"),
        Resource::Qdisc {
            netns: netns.clone(),
            ifname: "eth0".into(),
        },
        Resource::Qdisc {
            netns: netns.clone(),
            ifname: "lo".into(),
        },
        Resource::Link {
            netns: "/nonexistent".into(),
            name: "eth0".into(),
        },
    ] {
        ledger.record(resource).unwrap();
    }
    let report = clean(&dir);
    assert!(report.is_clean(), "{report:?}");
    let after = state();
    assert!(
        !after.contains("spare") && !after.contains("ingress"),
        "{after}"
    );
    assert!(after.contains("eth0"), "{after}");
    holder.kill().unwrap();
    holder.wait().unwrap();
}
