//! OCI hooks that run on the host: prestart, createRuntime, poststart, poststop. Those whose programs
//! would have to come from the host but run in the container (createContainer) are refused.
//!
//! Source: OCI runtime specification 1.2, config.md "POSIX-platform Hooks", runtime.md "State".

use std::{path::Path, process::Stdio, time::Duration};

use oci_spec::runtime::{Hook, Spec};
use tokio::{io::AsyncReadExt, io::AsyncWriteExt, process::Command, time::timeout};

/// Hooks without a timeout of their own.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// How much of a failed hook's standard error is told.
const STDERR_MAX: u64 = 4096;

/// A hook that was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Could not be started, or talked to.
    #[error("Hook {path:?} could not be run")]
    Run {
        /// Its program.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Exit status other than 0.
    #[error("Hook {path:?} failed ({status}): {stderr}")]
    Failed {
        /// Its program.
        path: String,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// Took too long, and was killed.
    #[error("Hook {path:?} did not end within {seconds} s")]
    Timeout {
        /// Its program.
        path: String,
        /// Its limit.
        seconds: u64,
    },
    /// Cannot be done for a VM.
    #[error(
        "createContainer hook {path:?} is refused: its program is the host's and its place is inside the VM"
    )]
    Refused {
        /// Its program.
        path: String,
    },
}

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// prestart, then createRuntime: after the VM is there, before the container is.
    Create,
    /// After the container's process has started.
    Poststart,
    /// After the container is deleted.
    Poststop,
}

/// The hooks of a container and what they are told.
#[derive(Debug, Clone, Default)]
pub struct Hooks {
    create: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
    state: serde_json::Map<String, serde_json::Value>,
}

impl Hooks {
    /// Reads the hooks of `spec`.
    ///
    /// # Errors
    /// [`Error::Refused`] for createContainer hooks.
    pub fn of(spec: &Spec, id: &str, bundle: &Path) -> Result<Self, Error> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Self::default());
        };
        if let Some(hook) = hooks.create_container().iter().flatten().next() {
            return Err(Error::Refused {
                path: hook.path().display().to_string(),
            });
        }
        let prestart = hooks.prestart().clone().unwrap_or_default();
        let create_runtime = hooks.create_runtime().clone().unwrap_or_default();
        let mut state = serde_json::Map::new();
        state.insert("ociVersion".into(), spec.version().clone().into());
        state.insert("id".into(), id.into());
        state.insert("bundle".into(), bundle.display().to_string().into());
        let annotations = crate::spec::annotations(spec);
        state.insert("annotations".into(), serde_json::json!(annotations));
        Ok(Self {
            create: prestart.into_iter().chain(create_runtime).collect(),
            poststart: hooks.poststart().clone().unwrap_or_default(),
            poststop: hooks.poststop().clone().unwrap_or_default(),
            state,
        })
    }

    /// Runs the hooks of `point` in order. `pid` is the VM's process, whose network namespace is the
    /// pod's. The first failure of a create hook ends it; later ones are logged, as the specification
    /// says.
    ///
    /// # Errors
    /// A create hook's failure.
    pub async fn run(&self, point: Point, pid: u32) -> Result<(), Error> {
        let (hooks, status) = match point {
            Point::Create => (&self.create, "creating"),
            Point::Poststart => (&self.poststart, "running"),
            Point::Poststop => (&self.poststop, "stopped"),
        };
        if hooks.is_empty() {
            return Ok(());
        }
        let mut state = self.state.clone();
        state.insert("status".into(), status.into());
        if point != Point::Poststop {
            state.insert("pid".into(), pid.into());
        }
        let state = serde_json::Value::Object(state).to_string();
        for hook in hooks {
            match run(hook, &state).await {
                Err(e) if point == Point::Create => return Err(e),
                Err(e) => tracing::warn!("{}", crate::error::chain(&e)),
                Ok(()) => {}
            }
        }
        Ok(())
    }
}

async fn run(hook: &Hook, state: &str) -> Result<(), Error> {
    let path = hook.path().display().to_string();
    let io = |source| Error::Run {
        path: path.clone(),
        source,
    };
    let mut command = Command::new(hook.path());
    if let Some((name, args)) = hook.args().as_ref().and_then(|a| a.split_first()) {
        command.arg0(name).args(args);
    }
    command.env_clear();
    for pair in hook.env().iter().flatten() {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        command.env(key, value);
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().map_err(io)?;
    let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let limit = hook
        .timeout()
        .and_then(|s| u64::try_from(s).ok())
        .filter(|s| *s > 0);
    let limit = limit.map_or(DEFAULT_TIMEOUT, Duration::from_secs);
    let work = async {
        if let Some(mut stdin) = stdin {
            // A hook need not read its state.
            let _ = stdin.write_all(state.as_bytes()).await;
        }
        let mut said = Vec::new();
        if let Some(stderr) = stderr {
            stderr.take(STDERR_MAX).read_to_end(&mut said).await?;
        }
        Ok((child.wait().await?, said))
    };
    let (status, said) = match timeout(limit, work).await {
        Ok(done) => done.map_err(io)?,
        Err(_) => {
            return Err(Error::Timeout {
                path,
                seconds: limit.as_secs(),
            });
        }
    };
    if status.success() {
        return Ok(());
    }
    Err(Error::Failed {
        path,
        status,
        stderr: String::from_utf8_lossy(&said).trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hooks(json: &str) -> Result<Hooks, Error> {
        let spec = format!(r#"{{"ociVersion":"1.0.2","hooks":{json}}}"#);
        let spec: Spec = serde_json::from_str(&spec).expect("spec");
        Hooks::of(&spec, "c1", Path::new("/b"))
    }

    #[tokio::test]
    async fn a_hook_reads_the_state_with_the_vms_pid() {
        let dir = tempfile::tempdir().expect("tempdir");
        let out = dir.path().join("state");
        let h = hooks(&format!(
            r#"{{"createRuntime":[{{"path":"/bin/sh","args":["sh","-c","cat >{}"],"env":["A=b"]}}]}}"#,
            out.display()
        ));
        h.expect("hooks").run(Point::Create, 42).await.expect("run");
        let state: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out).expect("state")).expect("json");
        assert_eq!((&state["pid"], &state["id"]), (&42.into(), &"c1".into()));
        assert_eq!(state["status"], "creating");
    }

    #[tokio::test]
    async fn a_failing_create_hook_says_why_and_a_failing_poststop_does_not_stop_the_end() {
        let bad = r#"[{"path":"/bin/sh","args":["sh","-c","echo no luck >&2; exit 3"]}]"#;
        let h = hooks(&format!(r#"{{"prestart":{bad},"poststop":{bad}}}"#)).expect("hooks");
        let e = h
            .run(Point::Create, 1)
            .await
            .expect_err("fails")
            .to_string();
        assert!(e.contains("no luck") && e.contains('3'), "{e}");
        h.run(Point::Poststop, 1).await.expect("logged only");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_at_its_timeout() {
        let h = hooks(r#"{"prestart":[{"path":"/bin/sleep","args":["sleep","100"],"timeout":1}]}"#);
        let e = h
            .expect("hooks")
            .run(Point::Create, 1)
            .await
            .expect_err("hangs")
            .to_string();
        assert!(e.contains("within 1 s"), "{e}");
    }

    #[test]
    fn create_container_hooks_are_refused_by_name() {
        let e = hooks(r#"{"createContainer":[{"path":"/usr/bin/x"}]}"#).expect_err("refused");
        assert!(e.to_string().contains("/usr/bin/x"));
    }
}
