//! What a container can and cannot do.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use sealpod_protocol::streams::Stdio;

use super::Outcome;
use super::guest::{Guest, spec};
use crate::ensure;

/// Output of container `c1`, run to its end.
async fn output(guest: &Guest, spec: &serde_json::Value) -> Result<String, super::Failure> {
    guest.create(spec).await?;
    guest.start_container("c1").await?;
    let out = guest.read_all("c1", "", Stdio::Stdout).await?;
    let err = guest.read_all("c1", "", Stdio::Stderr).await?;
    guest.wait("c1", "").await?;
    guest.delete("c1").await?;
    Ok(out + &err)
}

pub(crate) async fn an_exec_is_as_confined_as_its_container(guest: &Guest) -> Outcome {
    for privileges in [true, false] {
        let mut spec = spec(&["/bin/sleep", "1000"]);
        spec["process"]["noNewPrivileges"] = privileges.into();
        spec["linux"]["seccomp"] = serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
            "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]});
        guest.create(&spec).await?;
        guest.start_container("c1").await?;
        let own = fs::read_to_string(format!("/proc/{}/status", guest.pid))?;
        ensure!(
            own.contains("Seccomp:\t0"),
            "the agent is under the container's filter"
        );
        spec["process"]["args"] = serde_json::json!([
            "/bin/sh",
            "-c",
            "cat /proc/self/status /proc/1/status; /bin/busybox mkdir /tmp/x"
        ]);
        let (_, text) = guest.exec("e1", &spec["process"]).await?;
        for line in [
            "Seccomp:\t2",
            "CapEff:\t00000000000004e1",
            "CapBnd:\t00000000000004e1",
        ] {
            let mut line = line.to_owned();
            if line.starts_with("Cap") {
                // CHOWN 0, KILL 5, SETGID 6, SETUID 7, NET_BIND_SERVICE 10
                line.truncate(line.find('\t').unwrap_or_default());
                line.push_str("\t00000000000004e1");
            }
            ensure!(
                text.matches(&line).count() == 2,
                "{line:?} is not twice in {text}"
            );
        }
        ensure!(
            text.contains("Operation not supported"),
            "mkdir was allowed: {text}"
        );
        let nnp = format!("NoNewPrivs:\t{}", u8::from(privileges));
        ensure!(text.matches(&nnp).count() == 2, "{nnp} {text}");
        guest.delete("c1").await?;
    }
    Ok(())
}

pub(crate) async fn users_groups_limits_and_umask_are_those_of_the_specification(
    guest: &Guest,
) -> Outcome {
    let mut spec = spec(&[
        "/bin/sh",
        "-c",
        "id -u; id -g; id -G; umask; ulimit -n; echo $HOME; cat /proc/self/oom_score_adj; hostname; \
         echo ok > /dev/stdout",
    ]);
    spec["hostname"] = "box".into();
    spec["process"]["user"] =
        serde_json::json!({"uid": 33, "gid": 34, "additionalGids": [40, 41], "umask": 0o27});
    spec["process"]["rlimits"] =
        serde_json::json!([{"type": "RLIMIT_NOFILE", "soft": 123, "hard": 456}]);
    spec["process"]["oomScoreAdj"] = 500.into();
    let text = output(guest, &spec).await?;
    let lines: Vec<_> = text.lines().collect();
    ensure!(
        lines
            == [
                "33", "34", "34 40 41", "0027", "123", "/srv", "500", "box", "ok"
            ],
        "{lines:?}"
    );
    Ok(())
}

pub(crate) async fn mounts_devices_and_protected_paths_are_as_specified(guest: &Guest) -> Outcome {
    let file = guest.share().join("c1/file");
    fs::write(&file, "content\n")?;
    let script = "cat /etc/mounted; ls -l /dev/fuse /dev/null | cut -c1; cat /data/sub/x; \
        touch /readonly && echo root-is-writable; echo 1 > /proc/sys/vm/swappiness && echo sysctl-is-writable; \
        head -c1 /proc/interrupts | wc -c; ls /proc/irq | wc -l; touch /data/x && echo volume-is-writable; \
        cat /proc/sys/net/ipv4/ip_forward; grep -c '^1$' /sys/fs/cgroup/cgroup.procs; grep ^0: /proc/self/cgroup; \
        ls -l /dev/ptmx /dev/fd | wc -l; head -c1 /dev/fuse 2>&1; pwd";
    let mut spec = spec(&["/bin/sh", "-c", script]);
    let root = guest.share().join("c1/rootfs");
    for name in ["cut", "wc"] {
        symlink("busybox", root.join("bin").join(name))?;
    }
    fs::create_dir_all(guest.share().join("c1/volume/sub"))?;
    fs::write(guest.share().join("c1/volume/sub/x"), "sub\n")?;
    spec["linux"]["maskedPaths"] = serde_json::json!(["/proc/interrupts", "/proc/irq", "/no/such"]);
    spec["root"]["readonly"] = true.into();
    spec["process"]["cwd"] = "/made/for/it".into();
    spec["linux"]["sysctl"] = serde_json::json!({"net.ipv4.ip_forward": "1"});
    spec["linux"]["devices"] = serde_json::json!([
        {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438}]);
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.extend([
            serde_json::json!({"destination": "/etc/mounted", "type": "bind",
                "source": "/run/sealpod/share/c1/file", "options": ["rbind", "ro"]}),
            serde_json::json!({"destination": "/data", "type": "bind",
                "source": "/run/sealpod/share/c1/volume", "options": ["rbind", "rro", "rslave"]}),
        ]);
    }
    let text = output(guest, &spec).await?;
    ensure!(!text.contains("writable"), "{text}");
    let words: Vec<_> = text.lines().filter(|l| !l.contains("Read-only")).collect();
    let expected = [
        "content",
        "c",
        "c",
        "sub",
        "0",
        "0",
        "1",
        "1",
        "0::/",
        "2",
        "head: /dev/fuse: Operation not permitted",
        "/made/for/it",
    ];
    ensure!(words == expected, "{words:#?}");
    Ok(())
}

pub(crate) async fn links_in_an_image_cannot_lead_a_mount_out_of_it(guest: &Guest) -> Outcome {
    let outside = guest.share().join("outside");
    fs::create_dir(&outside)?;
    let root = guest.share().join("c1/rootfs");
    symlink("/run/sealpod/share/outside", root.join("absolute"))?;
    symlink(
        "../../../../../../run/sealpod/share/outside",
        root.join("relative"),
    )?;
    let mut spec = spec(&[
        "/bin/sh",
        "-c",
        "ls /run/sealpod/share/outside/a /run/sealpod/share/outside/r",
    ]);
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        for (destination, source) in [
            ("/absolute/a", "c1/rootfs/etc"),
            ("/relative/r", "c1/rootfs/etc"),
        ] {
            mounts.push(
                serde_json::json!({"destination": destination, "type": "bind",
                "source": format!("/run/sealpod/share/{source}"), "options": ["bind"]}),
            );
        }
    }
    fs::create_dir_all(root.join("run/sealpod/share/outside"))?;
    let text = output(guest, &spec).await?;
    ensure!(text.matches("passwd").count() == 2, "{text}");
    ensure!(
        fs::read_dir(&outside)?.next().is_none(),
        "something was made outside the root"
    );
    Ok(())
}

pub(crate) async fn a_user_namespace_maps_root_to_another_user(guest: &Guest) -> Outcome {
    let mut spec = spec(&[
        "/bin/sh",
        "-c",
        "id -u; cat /proc/self/uid_map; touch /tmp/mine; echo > /dev/null; ls /dev/pts",
    ]);
    let map = serde_json::json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    (spec["linux"]["uidMappings"], spec["linux"]["gidMappings"]) = (map.clone(), map);
    spec["linux"]["namespaces"] =
        serde_json::json!([{"type": "pid"}, {"type": "user"}, {"type": "mount"}, {"type": "ipc"}]);
    let root = guest.share().join("c1/rootfs");
    for path in [
        &root,
        &root.join("tmp"),
        &root.join("etc"),
        &root.join("proc"),
    ] {
        std::os::unix::fs::chown(path, Some(100_000), Some(100_000))?;
    }
    fs::create_dir_all(root.join("dev"))?;
    fs::create_dir_all(root.join("sys/fs/cgroup"))?;
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(guest.share().join(".."), open)?;
    let text = output(guest, &spec).await?;
    ensure!(text.starts_with("0\n") && text.contains("100000"), "{text}");
    ensure!(text.contains("ptmx"), "{text}");
    ensure!(
        fs::metadata(root.join("tmp/mine"))?.uid() == 100_000,
        "file of another user"
    );

    guest
        .create(&{
            spec["process"]["args"] = serde_json::json!(["/bin/sleep", "1000"]);
            spec
        })
        .await?;
    guest.start_container("c1").await?;
    let (status, text) = guest.sh("e1", "id -u; echo > /dev/null").await?;
    ensure!((status, text.as_str()) == (0, "0\n"), "{status} {text}");
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn start_hooks_run_in_the_container_before_its_program(guest: &Guest) -> Outcome {
    let mut spec = spec(&["/bin/cat", "/tmp/state"]);
    spec["hooks"] = serde_json::json!({"startContainer": [
        {"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state"], "env": ["PATH=/bin"], "timeout": 10}]});
    let text = output(guest, &spec).await?;
    let state: serde_json::Value = serde_json::from_str(&text)?;
    ensure!(state["id"] == "c1" && state["pid"] == 1, "{text}");

    spec["hooks"] = serde_json::json!({"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", "exit 9"]}]});
    guest.create(&spec).await?;
    let error = guest
        .start_container("c1")
        .await
        .err()
        .ok_or("a failed hook was ignored")?;
    ensure!(error.to_string().contains("hook /bin/sh"), "{error}");
    guest.delete("c1").await?;

    spec["hooks"] = serde_json::json!({"prestart": [{"path": "/bin/sh"}]});
    let error = guest
        .create(&spec)
        .await
        .err()
        .ok_or("a host hook was accepted")?;
    ensure!(error.to_string().contains("prestart"), "{error}");
    Ok(())
}
