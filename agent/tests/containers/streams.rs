//! Input, output and terminals.

use sealpod_protocol::agent::ResizePtyRequest;
use sealpod_protocol::streams::Stdio;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};

use super::Outcome;
use super::guest::{Guest, exec_request, process, soon, spec};
use crate::ensure;

pub(crate) async fn input_reaches_the_process_and_its_end_does_too(guest: &Guest) -> Outcome {
    guest
        .create_with(&spec(&["/bin/cat"]), |r| r.stdin = true)
        .await?;
    let mut input = guest.attach("c1", "", Stdio::Stdin).await?;
    let mut output = guest.attach("c1", "", Stdio::Stdout).await?;
    ensure!(
        guest.attach("c1", "", Stdio::Stdout).await.is_err(),
        "attached twice"
    );
    guest.start_container("c1").await?;
    input.write_all(b"one\n").await?;
    let mut line = String::new();
    output.read_line(&mut line).await?;
    ensure!(line == "one\n", "{line:?}");
    input.write_all(b"two\n").await?;
    input.shutdown().await?;
    output.read_line(&mut line).await?;
    ensure!(line == "one\ntwo\n", "{line:?}");
    let ended = guest.wait("c1", "").await?;
    ensure!(
        (ended.exit_status, ended.stdout_bytes) == (0, 8),
        "{ended:?}"
    );

    guest.delete("c1").await?;
    guest
        .create_with(&spec(&["/bin/cat"]), |r| r.stdin = true)
        .await?;
    guest.start_container("c1").await?;
    guest.agent.close_stdin(soon(), &process("c1", "")).await?;
    // Nobody has come for the two outputs: they are given up with the connections that come now.
    guest.read_all("c1", "", Stdio::Stdout).await?;
    guest.read_all("c1", "", Stdio::Stderr).await?;
    ensure!(
        guest.wait("c1", "").await?.exit_status == 0,
        "cat did not end"
    );
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn a_terminal_has_the_size_it_was_given_and_then_the_new_one(
    guest: &Guest,
) -> Outcome {
    let script = "test -t 0 && test -t 1 && stty size; ls -l /dev/console >/dev/null && read x; stty size; exit 3";
    let shell = spec(&["/bin/sh", "-c", script]);
    let made = guest.create_with(&shell, |r| {
        r.terminal = true;
        r.stdin = true;
        (r.console_width, r.console_height) = (80, 24);
    });
    made.await?;
    let mut output = guest.attach("c1", "", Stdio::Stdout).await?;
    let mut input = guest.attach("c1", "", Stdio::Stdin).await?;
    guest.start_container("c1").await?;
    let mut text = String::new();
    output.read_line(&mut text).await?;
    ensure!(text == "24 80\r\n", "{text:?}");
    let size = ResizePtyRequest {
        container_id: "c1".into(),
        width: 132,
        height: 43,
        ..Default::default()
    };
    guest.agent.resize_pty(soon(), &size).await?;
    input.write_all(b"\n").await?;
    output.read_to_string(&mut text).await?;
    ensure!(text.ends_with("43 132\r\n"), "{text:?}");
    let ended = guest.wait("c1", "").await?;
    ensure!(
        ended.exit_status == 3 && ended.stdout_bytes == text.len() as u64,
        "{ended:?}"
    );
    guest.delete("c1").await?;

    // An exec has a terminal of its own, also when nobody has asked for its output.
    guest.create(&spec(&["/bin/sleep", "1000"])).await?;
    guest.start_container("c1").await?;
    let mut request = exec_request(
        "e1",
        &spec(&["/bin/sh", "-c", "test -t 0 && test -t 2 && echo yes"])["process"],
    );
    (request.terminal, request.stderr) = (true, false);
    guest.agent.exec(soon(), &request).await?;
    let text = guest.read_all("c1", "e1", Stdio::Stdout).await?;
    ensure!(text == "yes\r\n", "{text:?}");
    (request.exec_id, request.stdout) = ("e2".into(), false);
    request.process =
        spec(&["/bin/sh", "-c", "dd if=/dev/zero bs=64k count=10; exit 4"])["process"]
            .to_string()
            .into();
    guest.agent.exec(soon(), &request).await?;
    ensure!(
        guest.wait("c1", "e2").await?.exit_status == 4,
        "blocked by its terminal"
    );
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn a_daemon_that_keeps_the_output_open_does_not_hold_up_the_exit(
    guest: &Guest,
) -> Outcome {
    guest.create(&spec(&["/bin/sleep", "1000"])).await?;
    guest.start_container("c1").await?;
    let script = spec(&[
        "/bin/sh",
        "-c",
        "(read x < /tmp/fifo; echo late) & echo now",
    ]);
    nix::unistd::mkfifo(
        &guest.share().join("c1/rootfs/tmp/fifo"),
        nix::sys::stat::Mode::from_bits_truncate(0o666),
    )?;
    guest
        .agent
        .exec(soon(), &exec_request("e1", &script["process"]))
        .await?;
    let mut output = guest.attach("c1", "e1", Stdio::Stdout).await?;
    let _errors = guest.attach("c1", "e1", Stdio::Stderr).await?;
    let ended = guest.wait("c1", "e1").await?;
    ensure!(
        (ended.exit_status, ended.stdout_bytes) == (0, 4),
        "{ended:?}"
    );
    guest.sh("e2", "echo > /tmp/fifo").await?;
    let mut text = String::new();
    output.read_to_string(&mut text).await?;
    ensure!(text == "now\nlate\n", "{text:?}");
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn much_output_arrives_complete_through_a_slow_reader(guest: &Guest) -> Outcome {
    const SIZE: usize = 8 << 20;
    let script = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", SIZE / 65536);
    guest.create(&spec(&["/bin/sh", "-c", &script])).await?;
    let mut output = guest.attach("c1", "", Stdio::Stdout).await?;
    guest.attach("c1", "", Stdio::Stderr).await?;
    guest.start_container("c1").await?;
    let (mut total, mut chunk) = (0, vec![0; 1 << 20]);
    loop {
        match output.read(&mut chunk).await? {
            0 => break,
            n => total += n,
        }
        tokio::task::yield_now().await;
    }
    let ended = guest.wait("c1", "").await?;
    ensure!(
        total == SIZE && ended.stdout_bytes == SIZE as u64,
        "{total} {ended:?}"
    );
    guest.delete("c1").await?;
    Ok(())
}

pub(crate) async fn an_argument_list_that_is_too_long_is_named(guest: &Guest) -> Outcome {
    let long = "x".repeat(1 << 20);
    let Err(error) = guest.create(&spec(&["/bin/true", &long])).await else {
        // The kernel refuses it at execve, which is the start.
        let error = guest
            .start_container("c1")
            .await
            .err()
            .ok_or("a megabyte was accepted")?;
        ensure!(
            error
                .to_string()
                .contains("exec /bin/true: argument list too long"),
            "{error}"
        );
        guest.delete("c1").await?;
        return Ok(());
    };
    Err(error.into())
}
