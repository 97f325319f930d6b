//! One throw-away environment: namespaces, a temporary folder, a containerd of a chosen version with
//! the runtime under test, and the images. What a test starts in it is gone when it ends.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use crate::{
    assets, cni,
    containerd::{Containerd, Version},
    image,
    leak::{CgroupSweep, Snapshot},
    namespaces::{Namespaces, Process},
    wait,
};

/// Ends a client that hangs: well above what the slowest one takes here. Times [`wait::patience`].
pub const CLIENT_SECONDS: u32 = 120;

/// See the module. Fields drop in order: containerd first, namespaces, then the folder.
#[derive(Debug)]
pub struct Env {
    /// The containerd that runs in it.
    pub containerd: Containerd,
    /// Its namespaces.
    pub namespaces: Namespaces,
    tag: String,
    _cgroups: CgroupSweep,
    folder: TempDir,
    before: Option<Snapshot>,
}

/// The pods' configuration: the programs of the build tree, all else as it is by default.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Guest kernel.
    pub kernel: PathBuf,
    /// The guest's root.
    pub initramfs: PathBuf,
    /// File server.
    pub virtiofsd: PathBuf,
    /// How long a guest may take to come up.
    pub boot_seconds: u32,
    /// More lines, first of the section `hypervisor`.
    pub more: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kernel: absolute(assets::kernel()),
            initramfs: absolute(assets::initramfs()),
            virtiofsd: absolute(assets::virtiofsd()),
            boot_seconds: 30 * wait::patience(),
            more: String::new(),
        }
    }
}

impl Settings {
    pub(crate) fn text(&self) -> String {
        let Self {
            kernel,
            initramfs,
            virtiofsd,
            boot_seconds,
            more,
        } = self;
        let vmm = absolute(assets::programs().join("sealpod-vmm"));
        // Where the machine is too busy to tell that its KVM is real (the lab), it is said.
        let chosen = |a| format!("accelerator = \"{a}\"\n");
        let accelerator = assets::accelerator().map_or(String::new(), chosen);
        format!(
            "timeouts.boot_seconds = {boot_seconds}\n[hypervisor]\n{accelerator}vmm = {vmm:?}\nkernel = {kernel:?}\ninitramfs = {initramfs:?}\nvirtiofsd = {virtiofsd:?}\n{more}"
        )
    }
}

/// What a client printed and how it ended.
#[derive(Debug, Clone)]
pub struct Done {
    /// Exit status; 128 + signal where one ended it; 124 where it hung.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Done {
    /// # Panics
    /// Where the client failed.
    #[must_use]
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(
            self.code, 0,
            "stdout: {}\nstderr: {}",
            self.stdout, self.stderr
        );
        self
    }

    /// Both outputs, to look for a message in.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }
}

impl From<Output> for Done {
    fn from(output: Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let status = output.status;
        Self {
            code: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().unwrap_or(0)),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Env {
    /// A containerd of `version` with the busybox image.
    ///
    /// # Errors
    /// Where something could not be set up; the message says what.
    pub fn new(version: Version) -> Result<Self> {
        Self::with_settings(version, &Settings::default())
    }

    /// The same with another `sealpod.toml` for its pods.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_settings(version: Version, settings: &Settings) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Short: socket paths below it have 108 bytes.
        let folder = tempfile::Builder::new().prefix("sp-").tempdir_in("/tmp")?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let tag = format!("t{}x{count}", std::process::id());
        let cni_conf = folder.path().join("cni");
        cni::write_config(&cni_conf)?;
        let namespaces = Namespaces::new(&cni_conf, &assets::unpacked("tools/usr/lib/cni"))?;
        let config = folder.path().join("sealpod.toml");
        std::fs::write(&config, settings.text()).context("sealpod.toml")?;
        let mut containerd = Containerd::new(version, folder.path());
        containerd.start(&namespaces)?;
        let sweep = CgroupSweep(tag.clone());
        let mut env = Self {
            containerd,
            namespaces,
            tag,
            _cgroups: sweep,
            folder,
            before: None,
        };
        env.import("default", &image::busybox()?)?;
        env.before = Some(Snapshot::take(&env));
        Ok(env)
    }

    /// The temporary folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// A name that no other environment uses, for containers and cgroups.
    #[must_use]
    pub fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.tag)
    }

    /// Begins every name that [`Self::id`] gives.
    #[must_use]
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// Imports an OCI archive into a containerd namespace.
    ///
    /// # Errors
    /// Where `ctr` fails.
    pub fn import(&self, namespace: &str, archive: &Path) -> Result<()> {
        let archive = archive.to_string_lossy();
        let done = self.ctr_in(namespace, &["image", "import", "--local", &archive]);
        // `--local` exists since 1.7 and is needed by 2.x to unpack in the client.
        let done = if done.code == 0 {
            done
        } else {
            self.ctr_in(namespace, &["image", "import", &archive])
        };
        ensure!(done.code == 0, "Image import failed: {}", done.text());
        Ok(())
    }

    /// A command that will live in the environment once it is spawned inside [`Namespaces::enter`].
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        // Looked up here: spawning searches the PATH of the test itself.
        let path = self.containerd.path_variable();
        let program = Path::new(program.as_ref());
        let found = path
            .split(':')
            .map(|dir| Path::new(dir).join(program))
            .find(|p| p.exists());
        let mut command = Command::new(found.as_deref().unwrap_or(program));
        command
            .env("PATH", path)
            .env("CONTAINERD_ADDRESS", self.containerd.address())
            .current_dir(self.folder());
        command
    }

    /// Runs a command to its end, no input.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn run(&self, program: &str, args: &[&str]) -> Done {
        let limit = CLIENT_SECONDS * wait::patience();
        let mut command = self.command("timeout");
        command
            .args(["-k", "2", &limit.to_string(), program])
            .args(args);
        command.stdin(Stdio::null());
        self.namespaces
            .enter(|| command.output())
            .expect(program)
            .into()
    }

    /// Starts a command with all three standard streams piped and no time limit.
    ///
    /// # Panics
    /// Where it cannot be started.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Child {
        let mut command = self.command(program);
        command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        self.namespaces.enter(|| command.spawn()).expect(program)
    }

    /// Processes of the environment whose command line holds `part`.
    #[must_use]
    pub fn processes(&self, part: &str) -> Vec<Process> {
        let mut all = self.namespaces.processes();
        all.retain(|p| p.command.contains(part));
        all
    }

    /// Names of the interfaces in the network namespace of a process, or a thread, of the environment,
    /// sorted; and which namespace that is.
    ///
    /// # Errors
    /// Where there is none.
    pub fn network_of(&self, pid: u32) -> Result<(Vec<String>, PathBuf)> {
        let of = |name: &str| self.namespaces.path(&format!("/proc/{pid}/{name}"));
        let table = std::fs::read_to_string(of("net/dev"))?;
        // Two lines of titles; each other is `name: figures`.
        let names = table.lines().skip(2).filter_map(|l| l.split(':').next());
        let mut names: Vec<String> = names.map(|n| n.trim().to_owned()).collect();
        names.sort();
        Ok((names, std::fs::read_link(of("ns/net"))?))
    }

    /// What is left over compared with the freshly started environment; waits a little for what ends
    /// by itself.
    #[must_use]
    pub fn leaks(&self) -> Vec<String> {
        let Some(before) = &self.before else {
            return Vec::new();
        };
        let end = std::time::Instant::now() + Duration::from_secs(10) * wait::patience();
        loop {
            let leaks = before.leaks(&Snapshot::take(self));
            if leaks.is_empty() || std::time::Instant::now() > end {
                return leaks;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// # Panics
    /// Where something is left over.
    #[track_caller]
    pub fn assert_clean(&self) {
        let leaks = self.leaks();
        assert!(leaks.is_empty(), "left over:\n{}", leaks.join("\n"));
    }

    /// From now on, what is there counts as belonging there.
    pub fn rebase(&mut self) {
        self.before = Some(Snapshot::take(self));
    }
}

impl Drop for Env {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- end of containerd's log\n{}",
                self.containerd.log_tail(60)
            );
        }
    }
}

fn absolute(path: PathBuf) -> PathBuf {
    path.canonicalize().unwrap_or(path)
}
