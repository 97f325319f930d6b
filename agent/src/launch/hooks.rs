//! `startContainer` hooks: programs of the container that run in it just before its own program. Runs
//! in the child.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{LaunchError, Step};
use crate::container::plan::{ContainerPlan, HookPlan};
use crate::sys;

/// Runs the plan's hooks one after another; the first that fails ends the container.
pub(super) fn run(plan: &ContainerPlan) -> Result<(), LaunchError> {
    if plan.start_hooks.is_empty() {
        return Ok(());
    }
    let mut state = plan.hook_state.clone();
    state.insert("pid".into(), std::process::id().into());
    let state = serde_json::Value::Object(state).to_string();
    plan.start_hooks
        .iter()
        .try_for_each(|hook| one(hook, &state))
}

fn one(hook: &HookPlan, state: &str) -> Result<(), LaunchError> {
    let path = hook.path.display();
    let mut command = Command::new(&hook.path);
    if let Some((name, args)) = hook.args.split_first() {
        command.arg0(name).args(args);
    }
    let mut child = command
        .env_clear()
        .envs(hook.env.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::piped())
        .spawn()
        .step(|| format!("startContainer hook {path}"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it. Its state is shorter than a pipe's buffer in any sane case.
        let _ = stdin.write_all(state.as_bytes());
    }
    if let Some(seconds) = hook.timeout {
        let pid = i32::try_from(child.id()).unwrap_or(i32::MAX);
        let pidfd = sys::pidfd_open(pid).step(|| format!("watch hook {path}"))?;
        let timeout =
            PollTimeout::try_from(seconds.saturating_mul(1000)).unwrap_or(PollTimeout::MAX);
        let mut exits = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        if poll(&mut exits, timeout) == Ok(0) {
            let _ = child.kill();
            let _ = child.wait();
            return Err(LaunchError::text(format!(
                "startContainer hook {path} did not end within {seconds} s"
            )));
        }
    }
    let status = child.wait().step(|| format!("wait for hook {path}"))?;
    if !status.success() {
        return Err(LaunchError::text(format!(
            "startContainer hook {path}: {status}"
        )));
    }
    Ok(())
}
