//! Containers from their making to their end.

use std::fs;
use std::time::Instant;

use sealpod_protocol::agent::{HelloRequest, UpdateRequest};
use sealpod_protocol::streams::Stdio;
use ttrpc::Code;

use super::guest::{Guest, container, exec_request, process, soon, spec};
use super::{Failure, Outcome};
use crate::ensure;

/// The code and text of an error.
fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Result<(Code, String), Failure> {
    match result {
        Err(ttrpc::Error::RpcStatus(s)) => Ok((s.code(), s.message)),
        other => Err(format!("expected a refusal, got {other:?}").into()),
    }
}

pub(crate) async fn a_container_runs_to_its_exit_code_and_leaves_nothing(guest: &Guest) -> Outcome {
    let pid = guest
        .create(&spec(&["/bin/sh", "-c", "echo out; echo err >&2; exit 7"]))
        .await?;
    ensure!(pid > 1, "pid {pid}");
    let started = guest.start_container("c1").await;
    started?;
    let out = guest.read_all("c1", "", Stdio::Stdout).await?;
    let err = guest.read_all("c1", "", Stdio::Stderr).await?;
    ensure!(
        (out.as_str(), err.as_str()) == ("out\n", "err\n"),
        "{out:?} {err:?}"
    );
    for _ in 0..2 {
        let ended = guest.wait("c1", "").await?;
        let told = (ended.exit_status, ended.stdout_bytes, ended.stderr_bytes);
        ensure!(told == (7, 4, 4), "{told:?}");
        ensure!(ended.exited_at_unix_ns > 0, "no time");
    }
    guest.delete("c1").await?;
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn a_killed_container_reports_the_signal(guest: &Guest) -> Outcome {
    guest.create(&spec(&["/bin/sleep", "1000"])).await?;
    guest.start_container("c1").await?;
    guest.kill("", 9, false).await?;
    ensure!(
        guest.wait("c1", "").await?.exit_status == 137,
        "not SIGKILL"
    );
    let (code, text) = refusal(guest.kill("", 15, false).await)?;
    ensure!(code == Code::NOT_FOUND, "{code:?}");
    ensure!(text == "process already finished: not found", "{text}");
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn requests_in_the_wrong_state_get_the_code_that_containerd_expects(
    guest: &Guest,
) -> Outcome {
    let expect = |got: (Code, String), code: Code, part: &str| -> Outcome {
        ensure!(
            got.0 == code && got.1.contains(part),
            "{got:?}, not {code:?} {part:?}"
        );
        Ok(())
    };
    let version = HelloRequest {
        protocol_version: 99,
        ..Default::default()
    };
    expect(
        refusal(guest.agent.hello(soon(), &version).await)?,
        Code::FAILED_PRECONDITION,
        &format!(
            "version {}, the shim 99",
            sealpod_protocol::PROTOCOL_VERSION
        ),
    )?;
    expect(
        refusal(guest.start_container("c1").await)?,
        Code::NOT_FOUND,
        "c1",
    )?;
    expect(
        refusal(guest.start_container("../c1").await)?,
        Code::INVALID_ARGUMENT,
        "../c1",
    )?;
    expect(refusal(guest.wait("c1", "").await)?, Code::NOT_FOUND, "c1")?;

    let sleeper = spec(&["/bin/sleep", "1000"]);
    guest.create(&sleeper).await?;
    expect(
        refusal(guest.create(&sleeper).await)?,
        Code::ALREADY_EXISTS,
        "c1",
    )?;
    expect(
        refusal(guest.agent.pause(soon(), &container("c1")).await)?,
        Code::FAILED_PRECONDITION,
        "run",
    )?;
    guest.start_container("c1").await?;
    expect(
        refusal(guest.start_container("c1").await)?,
        Code::FAILED_PRECONDITION,
        "already running",
    )?;
    expect(
        refusal(guest.agent.resume(soon(), &container("c1")).await)?,
        Code::FAILED_PRECONDITION,
        "not paused",
    )?;
    let exec = exec_request("e1", &sleeper["process"]);
    guest.agent.exec(soon(), &exec).await?;
    expect(
        refusal(guest.agent.exec(soon(), &exec).await)?,
        Code::ALREADY_EXISTS,
        "e1",
    )?;
    let running = guest
        .agent
        .delete_process(soon(), &process("c1", "e1"))
        .await;
    expect(refusal(running)?, Code::FAILED_PRECONDITION, "running")?;
    expect(
        refusal(guest.kill("no-such", 9, false).await)?,
        Code::NOT_FOUND,
        "no-such",
    )?;
    expect(
        refusal(guest.kill("e1", 65, false).await)?,
        Code::INVALID_ARGUMENT,
        "65",
    )?;

    guest.kill("", 9, false).await?;
    guest.wait("c1", "").await?;
    expect(
        refusal(guest.start_container("c1").await)?,
        Code::FAILED_PRECONDITION,
        "has stopped",
    )?;
    let late = guest
        .agent
        .exec(soon(), &exec_request("e2", &sleeper["process"]))
        .await;
    expect(
        refusal(late)?,
        Code::FAILED_PRECONDITION,
        "cannot exec in a stopped container",
    )?;
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn missing_programs_are_reported_in_the_words_of_runc(guest: &Guest) -> Outcome {
    let cases = [
        (
            "no-such",
            "exec: \"no-such\": executable file not found in $PATH",
        ),
        (
            "/no/such",
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
        ("/etc", "exec: \"/etc\": is a directory"),
    ];
    for (program, words) in cases {
        let (_, text) = refusal(guest.create(&spec(&[program])).await)?;
        ensure!(
            text == format!("unable to start container process: {words}"),
            "{text}"
        );
    }
    let mut nowhere = spec(&["/bin/true"]);
    nowhere["process"]["cwd"] = "/etc/passwd".into();
    let (_, text) = refusal(guest.create(&nowhere).await)?;
    ensure!(
        text.contains("chdir to cwd (\"/etc/passwd\") set in config.json failed: not a directory"),
        "{text}"
    );

    guest.create(&spec(&["/bin/sleep", "1000"])).await?;
    guest.start_container("c1").await?;
    for (program, words) in cases {
        let request = exec_request("e1", &spec(&[program])["process"]);
        let (code, text) = refusal(guest.agent.exec(soon(), &request).await)?;
        ensure!(
            code == Code::UNKNOWN && text.ends_with(words),
            "{code:?} {text}"
        );
    }
    let mut nowhere = spec(&["/bin/true"]);
    nowhere["process"]["cwd"] = "/nope".into();
    let request = exec_request("e1", &nowhere["process"]);
    let (_, text) = refusal(guest.agent.exec(soon(), &request).await)?;
    ensure!(
        text.ends_with(
            "chdir to cwd (\"/nope\") set in config.json failed: no such file or directory"
        ),
        "{text}"
    );
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn specifications_that_cannot_be_kept_change_nothing(guest: &Guest) -> Outcome {
    let good = spec(&["/bin/true"]);
    let with = |pointer: &str, value: serde_json::Value| {
        let mut changed = good.clone();
        if let Some(place) = changed.pointer_mut(pointer) {
            *place = value;
        }
        changed
    };
    let namespaces = serde_json::json!([{"type": "pid"}, {"type": "bogus"}]);
    let source = serde_json::json!([{"destination": "/v", "type": "bind", "source": "/no/such", "options": ["rbind"]}]);
    let cases = [
        (with("/process", serde_json::Value::Null), "no process"),
        (
            with("/process/args", serde_json::json!([])),
            "no process arguments",
        ),
        (with("/process/cwd", "relative".into()), "working directory"),
        (with("/linux/namespaces", namespaces), "bogus"),
        (
            with("/mounts", source),
            "failed to mount \"/no/such\" to /v: no such file or directory",
        ),
        (with("/ociVersion", "2.0.0".into()), "2.0.0"),
        (
            with(
                "/linux/resources",
                serde_json::json!({"unified": {"../x": "1"}}),
            ),
            "../x",
        ),
    ];
    for (bad, part) in cases {
        let (_, text) = refusal(guest.create(&bad).await)?;
        ensure!(text.contains(part), "{text:?} does not contain {part:?}");
        let (code, _) = refusal(guest.wait("c1", "").await)?;
        ensure!(code == Code::NOT_FOUND, "something was made: {code:?}");
    }
    for rootfs in ["", "../x", "/c1/rootfs", "c1/../../x", "no/such"] {
        let (_, text) = refusal(guest.create_with(&good, |r| r.rootfs = rootfs.into()).await)?;
        ensure!(text.contains(rootfs), "{text}");
    }
    Ok(())
}

pub(crate) async fn a_paused_container_does_not_run_until_it_is_resumed(guest: &Guest) -> Outcome {
    guest.create(&spec(&["/bin/sleep", "1000"])).await?;
    guest.start_container("c1").await?;
    guest.agent.pause(soon(), &container("c1")).await?;
    let sleeper = spec(&["/bin/true"]);
    let refused = guest
        .agent
        .exec(soon(), &exec_request("e1", &sleeper["process"]))
        .await;
    ensure!(
        refusal(refused)?.0 == Code::FAILED_PRECONDITION,
        "exec in a paused container"
    );
    guest.kill("", 15, false).await?;
    guest.agent.resume(soon(), &container("c1")).await?;
    guest.kill("", 9, false).await?;
    guest.wait("c1", "").await?;
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn deleting_a_running_container_kills_all_of_it(guest: &Guest) -> Outcome {
    guest
        .create(&spec(&["/bin/sh", "-c", "sleep 1000 & sleep 1000"]))
        .await?;
    guest.start_container("c1").await?;
    let sleeper = spec(&["/bin/sleep", "1000"]);
    let exec = guest
        .agent
        .exec(soon(), &exec_request("e1", &sleeper["process"]))
        .await?;
    let pids = guest.agent.pids(soon(), &container("c1")).await?;
    let named = pids
        .processes
        .iter()
        .find(|p| p.exec_id == "e1")
        .map(|p| p.pid);
    ensure!(
        named == Some(exec.pid) && pids.processes.len() >= 2,
        "{pids:?}"
    );
    guest.delete("c1").await?;
    ensure!(
        refusal(guest.wait("c1", "").await)?.0 == Code::NOT_FOUND,
        "still there"
    );
    Ok(())
}

pub(crate) async fn a_container_can_be_made_again_under_its_name(guest: &Guest) -> Outcome {
    for n in 0..3 {
        guest
            .create(&spec(&["/bin/sh", "-c", &format!("exit {n}")]))
            .await?;
        guest.start_container("c1").await?;
        ensure!(guest.wait("c1", "").await?.exit_status == n, "round {n}");
        guest.delete("c1").await?;
    }
    // Never started.
    guest.create(&spec(&["/bin/true"])).await?;
    guest.delete("c1").await?;
    // Unreadable limits leave it as it was.
    guest.create(&spec(&["/bin/true"])).await?;
    let update = UpdateRequest {
        container_id: "c1".into(),
        resources: b"[".to_vec(),
        ..Default::default()
    };
    ensure!(
        refusal(guest.agent.update(soon(), &update).await)?.0 == Code::INVALID_ARGUMENT,
        "update"
    );
    guest.agent.stats(soon(), &container("c1")).await?;
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn two_hundred_execs_leave_no_descriptor_and_no_process(guest: &Guest) -> Outcome {
    guest.create(&spec(&["/bin/sleep", "1000"])).await?;
    guest.start_container("c1").await?;
    guest.sh("warm-up", "true").await?;
    let count = || fs::read_dir(format!("/proc/{}/fd", guest.pid)).map(Iterator::count);
    let before = count()?;
    let began = Instant::now();
    for n in 0..200 {
        let (status, out) = guest.sh(&format!("e{n}"), "echo hello").await?;
        ensure!((status, out.as_str()) == (0, "hello\n"), "{status} {out:?}");
    }
    println!(
        "  an exec of a shell with its output: {:?}",
        began.elapsed() / 200
    );
    ensure!(
        count()? <= before,
        "{before} descriptors before, {} after",
        count()?
    );
    let pids = guest.agent.pids(soon(), &container("c1")).await?;
    ensure!(pids.processes.len() == 1, "{pids:?}");
    let threads = fs::read_dir(format!("/proc/{}/task", guest.pid))?.count();
    ensure!(threads == 1, "{threads} threads");
    guest.delete("c1").await?;
    Ok(())
}
