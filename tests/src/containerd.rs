//! A private containerd: its configuration for each version, start, stop, kill and log. Writes below
//! the environment's folder only.

use std::{
    fs::File,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{assets, namespaces::Namespaces, wait};

/// The containerd versions that are supported, as Debian packages them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 1.6.20, Debian 12: Task API v2 only.
    V1_6,
    /// 1.7, Debian 13.
    V1_7,
    /// 2.1: Task API v3.
    V2_1,
    /// 2.1 with the Sandbox API served by the shim (`sandboxer = "shim"`).
    V2_1Sandbox,
}

impl Version {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::V1_6, Self::V1_7, Self::V2_1, Self::V2_1Sandbox];

    /// The one that `1.6`, `1.7` or `2.1` names.
    ///
    /// # Errors
    /// For anything else.
    pub fn parse(number: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|v| v.number() == number);
        found.with_context(|| format!("Unknown containerd version {number}: 1.6, 1.7 or 2.1"))
    }

    /// As in the name of the unpacked package: `1.6`.
    #[must_use]
    pub fn number(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 | Self::V2_1Sandbox => "2.1",
        }
    }

    fn programs(self) -> PathBuf {
        assets::unpacked(&format!("containerd-{}/usr/bin", self.number()))
    }
}

/// See the module.
#[derive(Debug)]
pub struct Containerd {
    version: Version,
    folder: PathBuf,
    child: Option<Child>,
}

impl Containerd {
    /// Not started yet.
    #[must_use]
    pub fn new(version: Version, folder: &Path) -> Self {
        Self {
            version,
            folder: folder.to_owned(),
            child: None,
        }
    }

    /// Which one.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// Its socket.
    #[must_use]
    pub fn address(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    /// Its state folder, with the bundles of running tasks.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// PATH for it and its clients: the programs under test, then its own, then the machine's.
    #[must_use]
    pub fn path_variable(&self) -> String {
        let tools = assets::unpacked("tools");
        let docker = assets::unpacked("docker");
        let first = [
            assets::programs()
                .canonicalize()
                .unwrap_or_else(|_| assets::programs()),
            self.version.programs(),
            tools.join("usr/sbin"),
            tools.join("bin"),
            docker.join("usr/bin"),
            docker.join("usr/sbin"),
        ];
        let first: Vec<_> = first.iter().map(|p| p.to_string_lossy()).collect();
        format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", first.join(":"))
    }

    /// Starts it and waits until it answers.
    ///
    /// # Errors
    /// With the end of its log when it does not.
    pub fn start(&mut self, namespaces: &Namespaces) -> Result<()> {
        let config = self.folder.join("containerd.toml");
        std::fs::write(&config, self.config())?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.join("containerd.log"))?;
        let mut command = Command::new(self.version.programs().join("containerd"));
        command
            .arg("--config")
            .arg(&config)
            .env("PATH", self.path_variable())
            .env("SEALPOD_CONFIG", self.folder.join("sealpod.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut child = namespaces.enter(|| command.spawn()).context("containerd")?;
        let up = wait::until("containerd up", Duration::from_secs(60), || {
            if child.try_wait().ok().flatten().is_some() {
                return Some(false);
            }
            UnixStream::connect(self.address()).is_ok().then_some(true)
        });
        self.child = Some(child);
        if !up {
            bail!("containerd ended at its start: {}", self.log_tail(20));
        }
        Ok(())
    }

    /// Its PID inside the environment.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self, namespaces: &Namespaces) -> u32 {
        let config = self.folder.join("containerd.toml");
        let mark = format!("--config {}", config.display());
        let found = namespaces
            .processes()
            .into_iter()
            .find(|p| p.command.ends_with(&mark));
        found.expect("containerd runs").pid
    }

    /// Ends it at once and reaps it; its socket file is left, as after any crash.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Last lines of its log, shims' messages included.
    #[must_use]
    pub fn log_tail(&self, lines: usize) -> String {
        let log = std::fs::read(self.folder.join("containerd.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let all: Vec<&str> = log
            .lines()
            .filter(|l| !l.contains("loading plugin"))
            .collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn config(&self) -> String {
        let folder = self.folder.display();
        let cni_bin = assets::unpacked("tools/usr/lib/cni");
        let cni_bin = match self.version {
            Version::V1_6 | Version::V1_7 => format!("bin_dir = {cni_bin:?}"),
            Version::V2_1 | Version::V2_1Sandbox => format!("bin_dirs = [{cni_bin:?}]"),
        };
        let off = r#"["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.nri.v1.nri"]"#;
        let timeouts = timeouts(wait::patience());
        let head = format!(
            "root = \"{folder}/root\"\nstate = \"{folder}/state\"\ndisabled_plugins = {off}\n\
             [grpc]\naddress = \"{folder}/c.sock\"\n[debug]\nlevel = \"info\"\n{timeouts}\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{folder}/opt\"\n"
        );
        let sandboxer = if self.version == Version::V2_1Sandbox {
            "shim"
        } else {
            "podsandbox"
        };
        let cri = match self.version {
            Version::V1_6 | Version::V1_7 => "io.containerd.grpc.v1.cri",
            Version::V2_1 | Version::V2_1Sandbox => "io.containerd.cri.v1.runtime",
        };
        let mut cri_lines = format!(
            "[plugins.\"{cri}\"]\nrestrict_oom_score_adj = true\nenable_cdi = false\n\
             [plugins.\"{cri}\".cni]\n{cni_bin}\nconf_dir = \"{folder}/cni\"\n\
             [plugins.\"{cri}\".containerd]\ndefault_runtime_name = \"tested\"\n\
             [plugins.\"{cri}\".containerd.runtimes.tested]\nruntime_type = \"{}\"\n\
             pod_annotations = [\"io.sealpod.*\", \"io.katacontainers.*\"]\n\
             privileged_without_host_devices = true\n",
            assets::runtime()
        );
        let stream = "stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n";
        let pause = crate::image::PAUSE;
        if cri.ends_with("runtime") {
            cri_lines += &format!(
                "sandboxer = \"{sandboxer}\"\n\
                 [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{pause}\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\"]\n{stream}"
            );
        } else {
            // These two are keys of the plugin itself, so they come before its tables.
            cri_lines = cri_lines.replacen(
                "enable_cdi = false\n",
                &format!("sandbox_image = \"{pause}\"\n{stream}"),
                1,
            );
        }
        let version = if cri.ends_with("runtime") { 3 } else { 2 };
        format!("version = {version}\n{head}{cri_lines}")
    }
}

/// containerd's own time limits, so many times what they are by default.
fn timeouts(times: u32) -> String {
    let limits = [
        ("shim.cleanup", 5),
        ("shim.load", 5),
        ("shim.shutdown", 3),
        ("task.state", 2),
    ];
    let lines = limits.map(|(name, seconds)| {
        format!(
            "\"io.containerd.timeout.{name}\" = \"{}s\"\n",
            seconds * times
        )
    });
    format!("[timeouts]\n{}", lines.concat())
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.kill();
    }
}
