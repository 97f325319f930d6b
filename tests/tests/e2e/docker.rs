//! Docker with the runtime under test.

use sealpod_tests::{Env, Version, assets, docker::Docker, need, only_sealpod};

#[test]
fn docker_run_and_exec_work() {
    need!(assets::complete());
    let env = Env::new(Version::V2_1).unwrap();
    let docker = Docker::start(&env).unwrap();
    let done = docker.run(&["--rm"], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (7, "out\n"),
        "{}",
        done.text()
    );
    assert!(done.stderr.contains("err\n"), "{}", done.text());

    let started = docker
        .run(
            &["--detach", "--name", "dock", "--hostname", "inside"],
            &["sleep", "1000"],
        )
        .ok();
    assert_eq!(started.stdout.trim().len(), 64, "{}", started.text());
    let done = docker.docker(&["exec", "dock", "sh", "-c", "hostname; exit 3"]);
    assert_eq!(
        (done.code, done.stdout.as_str()),
        (3, "inside\n"),
        "{}",
        done.text()
    );
    let missing = docker.docker(&["exec", "dock", "no-such-program"]);
    assert_eq!(missing.code, 127, "{}", missing.text());
    assert!(
        missing
            .text()
            .contains("executable file not found in $PATH"),
        "{}",
        missing.text()
    );
    let inspect = docker
        .docker(&["inspect", "-f", "{{.State.Status}}", "dock"])
        .ok();
    assert_eq!(inspect.stdout.trim(), "running");
    let _ = docker.docker(&["rm", "--force", "dock"]).ok();
    let missing = docker.run(&["--rm"], &["no-such-program"]);
    assert_eq!(missing.code, 127, "{}", missing.text());
}

#[test]
fn docker_volumes_limits_and_logs_work() {
    need!(assets::complete());
    only_sealpod!();
    let env = Env::new(Version::V2_1).unwrap();
    let docker = Docker::start(&env).unwrap();
    let dir = env.folder().join("volume");
    std::fs::create_dir(&dir).unwrap();
    let volume = format!("{}:/v", dir.display());
    let limits = ["-m", "64m", "--cpus", "0.5", "--shm-size", "16m"];
    let options = [&["--name", "dock", "-v", &volume][..], &limits].concat();
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; echo x > /v/x; df -k /dev/shm | awk 'NR == 2 {print $2}'";
    let expected = "67108864\n50000 100000\n16384\n";
    let done = docker.run(&options, &["sh", "-c", script]).ok();
    assert_eq!(done.stdout, expected);
    assert_eq!(std::fs::read_to_string(dir.join("x")).unwrap(), "x\n");
    assert_eq!(docker.docker(&["logs", "dock"]).ok().stdout, done.stdout);
    let done = docker.docker(&["start", "-a", "dock"]).ok();
    assert_eq!(done.stdout, expected);
    let _ = docker.docker(&["rm", "dock"]).ok();
    let done = docker
        .run(
            &["--rm", "--read-only", "--user", "1000", "--cap-drop", "ALL"],
            &["id", "-u"],
        )
        .ok();
    assert_eq!(done.stdout, "1000\n");
}
