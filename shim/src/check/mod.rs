//! What this node can do, in plain words: `sealpod check`. Each finding says what was found and, where
//! something is missing, how to get it. Looks and tries, changes nothing that outlives it.

mod containerd;
mod node;

use std::{
    fmt,
    path::{Path, PathBuf},
    process::Command,
};

use serde::Serialize;

use crate::config::{self, Config};

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Pods run, but something is slower or not available.
    Warn,
    /// No pod can run.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at.
    pub name: &'static str,
    /// How good it is.
    pub state: State,
    /// What was found.
    pub found: String,
    /// How to get what is missing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Finding {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            found: found.into(),
            fix: None,
        }
    }

    fn warn(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Warn,
            found: found.into(),
            fix: Some(fix.into()),
        }
    }

    fn missing(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            state: State::Missing,
            ..Self::warn(name, found, fix)
        }
    }
}

/// All findings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether pods can run.
    pub ready: bool,
    /// In the order in which a person should read them.
    pub findings: Vec<Finding>,
}

/// What to look at.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// sealpod's configuration; none: as the shim finds it.
    pub config: Option<PathBuf>,
    /// containerd's configuration; none: the usual place.
    pub containerd_config: Option<PathBuf>,
}

/// Looks at this node.
pub async fn check(options: &Options) -> Report {
    let (config, first) = match config::load(options.config.as_deref()) {
        Ok(config) => (config, Finding::ok("configuration", "valid")),
        Err(e) => {
            let fix = "correct it; docs/configuration.md lists every key";
            let finding = Finding::missing("configuration", chain(&e), fix);
            (Config::default(), finding)
        }
    };
    let mut findings = vec![first];
    findings.push(node::kvm(&config));
    findings.push(node::qemu(&config.hypervisor));
    findings.push(node::kernel(&config.hypervisor.kernel));
    findings.push(node::initramfs(&config.hypervisor.initramfs));
    findings.push(node::virtiofsd(&config.hypervisor.virtiofsd));
    findings.push(node::confidential(&config));
    findings.push(node::vsock());
    findings.push(node::cgroups());
    findings.extend(node::network().await);
    findings.push(containerd::shim_in_path());
    findings.extend(containerd::check(options.containerd_config.as_deref()));
    Report {
        ready: findings.iter().all(|f| f.state != State::Missing),
        findings,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.findings.iter().map(|x| x.name.len()).max();
        let width = width.unwrap_or_default();
        for finding in &self.findings {
            let state = match finding.state {
                State::Ok => "ok     ",
                State::Warn => "warn   ",
                State::Missing => "MISSING",
            };
            writeln!(f, "{state}  {:width$}  {}", finding.name, finding.found)?;
            if let Some(fix) = &finding.fix {
                writeln!(f, "{:9}{:width$}  → {fix}", "", "")?;
            }
        }
        let verdict = if self.ready {
            "Pods can run on this node."
        } else {
            "Pods cannot run on this node until what is MISSING is there."
        };
        writeln!(f, "{verdict}")
    }
}

/// An error with all that caused it, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text.replace('\n', " ")
}

/// First line of what `program --version` prints, at most 200 characters.
fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    let text = String::from_utf8_lossy(&text).into_owned();
    let line: String = text.lines().next()?.chars().take(200).collect();
    output.status.success().then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_says_how_to_get_what_is_missing() {
        let report = Report {
            ready: false,
            findings: vec![
                Finding::ok("a", "fine"),
                Finding::missing("long name", "not there", "install it"),
            ],
        };
        assert_eq!(
            report.to_string(),
            "ok       a          fine\n\
             MISSING  long name  not there\n         \
             \u{20}          → install it\n\
             Pods cannot run on this node until what is MISSING is there.\n"
        );
        let json = serde_json::to_value(&report).expect("json");
        assert_eq!(json["findings"][1]["state"], "missing");
        assert_eq!(json["findings"][0].get("fix"), None);
    }
}
