//! What the host has yet to read for a container that has ended. The guest's kernel may not let go of its
//! root before the answers are there (`guest-kernel/patches`).

use std::{fs, time::Duration};

use k8s_cri::v1::{ContainerConfig, Mount, PodSandboxConfig};
use sealpod_tests::{
    Env, Version, assets, cri::Cri, namespaces::Process, need, only_sealpod, wait,
};

/// Of the program, bytes: it has ended long before as much is read.
const SIZE: u64 = 256 << 20;

/// Bytes that a process has read (`proc_pid_io(5)`).
fn read_by(env: &Env, process: &Process) -> u64 {
    let file = env.namespaces.path(&format!("/proc/{}/io", process.pid));
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("rchar: "));
    line.unwrap().parse().unwrap()
}

fn privileged_pod(config: &mut PodSandboxConfig) {
    let security = config.linux.as_mut().unwrap().security_context.as_mut();
    security.unwrap().privileged = true;
}

fn privileged(config: &mut ContainerConfig) {
    let security = config.linux.as_mut().unwrap().security_context.as_mut();
    security.unwrap().privileged = true;
}

#[test]
fn a_container_that_ends_while_its_program_is_read_takes_nobody_along() {
    need!(assets::complete());
    only_sealpod!();
    let mut env = Env::new(Version::V1_7).unwrap();
    let cri = Cri::connect(&mut env).unwrap();
    // In the guest's memory: what waits there for its turn keeps nothing of the container's root in use.
    let memory = env.folder().join("volumes/kubernetes.io~empty-dir/mem");
    fs::create_dir_all(&memory).unwrap();
    let at = memory.to_string_lossy();
    let _ = env.run("mount", &["-t", "tmpfs", "tmpfs", &at]).ok();
    let with_memory = |c: &mut ContainerConfig| {
        c.mounts = vec![Mount {
            host_path: at.clone().into_owned(),
            container_path: "/mem".into(),
            ..Default::default()
        }];
    };
    let pod = cri.run_pod("p", privileged_pod).unwrap();
    let other = cri
        .run(&pod, "other", |c| {
            privileged(c);
            with_memory(c);
        })
        .unwrap();
    cri.sh(&other, "mkfifo /mem/ready /mem/go");
    let script = format!(
        "cp /bin/busybox /mem/busybox; cp /bin/busybox /busybox-big; truncate -s {SIZE} /busybox-big
        echo > /mem/ready; exec /mem/busybox sh -c 'read x < /mem/go; exec /busybox-big true'"
    );
    let server = env.processes("virtiofsd").remove(0);
    // How much is outstanding at an end is not the same each time.
    for name in ["one", "two", "three"] {
        let short = cri
            .run(&pod, name, |c| {
                with_memory(c);
                c.command = ["sh", "-c", &script].map(String::from).into();
            })
            .unwrap();
        // Once nothing of the program is in memory, the first page of it that is missing asks for most of it.
        cri.sh(
            &other,
            &format!(
                "read x < /mem/ready; echo 3 > /proc/sys/vm/drop_caches
                for f in /sys/class/bdi/*/read_ahead_kb; do echo {} > $f; done",
                SIZE >> 10
            ),
        );
        let before = read_by(&env, &server);
        cri.sh(&other, "echo > /mem/go");
        assert_eq!(cri.wait_exit(&short).exit_code, 0);
        cri.remove(&short).unwrap();
        // Far more than it needs to end.
        wait::until("it is read", Duration::from_secs(10), || {
            (read_by(&env, &server) - before > SIZE / 2).then_some(())
        });
    }
    let new = cri.run(&pod, "new", |_| {}).unwrap();
    for id in [&other, &new] {
        assert_eq!(cri.sh(id, "echo lives"), "lives");
    }
    cri.remove_pod(&pod).unwrap();
    let _ = env.run("umount", &["-l", &at]).ok();
    env.assert_clean();
}
