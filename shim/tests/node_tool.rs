//! The program `sealpod`, run as a person or a provisioning script runs it.

use std::{
    path::Path,
    process::{Command, Output},
};

fn sealpod(arguments: &[&str], config: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sealpod"))
        .args(arguments)
        .env("SEALPOD_CONFIG", config)
        .output()
        .expect("sealpod runs")
}

#[test]
fn check_names_what_is_missing_and_how_to_get_it() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = dir.path().join("sealpod.toml");
    std::fs::write(&config, "[hypervisor]\nkernel = \"/nonexistent/vmlinux\"\n").expect("write");
    let output = sealpod(&["check", "--json"], &config);
    assert_eq!(output.status.code(), Some(1));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(report["ready"], false);
    let findings = report["findings"].as_array().expect("findings");
    let finding = |name: &str| {
        let found = findings.iter().find(|f| f["name"] == name);
        found.unwrap_or_else(|| panic!("no finding {name}"))
    };
    for name in [
        "configuration",
        "KVM",
        "QEMU",
        "initramfs",
        "virtiofsd",
        "vsock",
        "cgroups",
        "pod network",
        "shim",
        "containerd",
        "containerd's config",
    ] {
        assert!(finding(name)["found"].is_string(), "{name}");
    }
    let kernel = finding("guest kernel");
    assert_eq!(kernel["state"], "missing");
    assert!(
        kernel["found"]
            .as_str()
            .is_some_and(|f| f.contains("/nonexistent/vmlinux"))
    );
    assert!(
        kernel["fix"]
            .as_str()
            .is_some_and(|f| f.contains("hypervisor.kernel"))
    );

    let words = sealpod(&["check"], &config);
    let words = String::from_utf8(words.stdout).expect("text");
    assert!(words.contains("MISSING  guest kernel"), "{words}");
    assert!(
        words.ends_with("until what is MISSING is there.\n"),
        "{words}"
    );
}

#[test]
fn wrong_configuration_is_an_error_that_names_file_and_key() {
    let dir = tempfile::tempdir().expect("tempdir");
    let config = dir.path().join("sealpod.toml");
    std::fs::write(&config, "[runtime]\nstate = \"/run\"\n").expect("write");
    let output = sealpod(&["list"], &config);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).expect("text");
    assert!(error.contains(&config.display().to_string()), "{error}");
    assert!(
        error.contains("unknown field `state`, expected one of `state_dir`"),
        "{error}"
    );
}

#[test]
fn pods_are_listed() {
    let dir = tempfile::tempdir().expect("tempdir");
    let state = dir.path().join("state");
    let config = dir.path().join("sealpod.toml");
    std::fs::write(&config, format!("[runtime]\nstate_dir = {state:?}\n")).expect("write");
    let none = sealpod(&["list"], &config);
    assert!(none.status.success());
    let pod = state.join("0123456789abcdef");
    std::fs::create_dir_all(&pod).expect("mkdir");
    std::fs::write(
        pod.join("pod.json"),
        r#"{"namespace":"k8s.io","id":"web","vm_pid":4711,"memory_mib":586}"#,
    )
    .expect("write");
    let one = sealpod(&["list"], &config);
    let text = String::from_utf8(one.stdout).expect("text");
    let line = text.lines().nth(1).expect("a pod");
    assert!(
        line.starts_with("k8s.io     web") && line.contains("4711") && line.contains("586 MiB"),
        "{text}"
    );
}
