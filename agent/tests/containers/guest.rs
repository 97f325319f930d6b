//! A guest for tests: the agent in its own mount, PID, network, UTS, IPC and cgroup namespaces, and the
//! client's side of it. Nothing of it outlives the process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use sealpod_agent::io::Connection;
use sealpod_agent::start::{Timeline, serve as serve_agent};
use sealpod_agent::{cgroup, launch};
use sealpod_protocol::agent::{
    ContainerRequest, CreateContainerRequest, ExecRequest, HelloRequest, ProcessRequest,
    SetupSandboxRequest, SignalRequest, WaitResponse,
};
use sealpod_protocol::agent_ttrpc::AgentClient;
use sealpod_protocol::streams::{Header, Stdio};
use sealpod_protocol::{PROTOCOL_VERSION, SHARE_DIR};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use ttrpc::r#async::Client;
use ttrpc::r#async::transport::Socket;
use ttrpc::context;

use super::{Failure, Outcome};

/// Debian's busybox-static, as `tests/setup/setup.sh clients` unpacks it, or as it is installed.
fn busybox() -> Option<PathBuf> {
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/sealpod"));
    let cache = std::env::var_os("SEALPOD_CACHE").map(PathBuf::from);
    let unpacked = cache
        .or_else(home)
        .map(|c| c.join("debs/tools/bin/busybox"));
    let places = unpacked.into_iter().chain(["/bin/busybox".into()]);
    places.into_iter().find(|path| path.exists())
}

/// What this machine lacks for these tests.
pub(crate) fn missing() -> Option<&'static str> {
    match () {
        () if !nix::unistd::geteuid().is_root() => Some("root"),
        () if busybox().is_none() => Some("busybox-static"),
        () => None,
    }
}

/// The agent's side: the first process of its namespaces.
pub(crate) fn serve(folder: &Path) -> ExitCode {
    let run = || -> Result<(), Failure> {
        set_up(folder)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let streams = UnixListener::bind(folder.join("streams"))?;
            let shim = UnixStream::connect(folder.join("agent")).await?;
            serve_agent(shim, Timeline::default(), async || {
                loop {
                    if let Ok((stream, _)) = streams.accept().await {
                        return Box::new(stream) as Connection;
                    }
                }
            })
            .await
        })?;
        Ok(())
    };
    if let Err(e) = run() {
        eprintln!("agent under test: {e}");
    }
    ExitCode::SUCCESS
}

fn set_up(folder: &Path) -> Result<(), Failure> {
    let none = None::<&str>;
    let cgroups = |what: &str| -> Result<(), Failure> {
        let e = mount(
            Some("cgroup2"),
            cgroup::MOUNT,
            Some("cgroup2"),
            MsFlags::empty(),
            none,
        );
        e.map_err(|e| format!("{what}: {e}").into())
    };
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none)?;
    mount(
        Some("tmpfs"),
        "/sys/fs/cgroup",
        Some("tmpfs"),
        MsFlags::empty(),
        none,
    )?;
    cgroups("cgroup2 of the machine")?;
    let own = Path::new(cgroup::MOUNT).join(group_name(folder));
    fs::create_dir(&own)?;
    fs::write(own.join("cgroup.procs"), "0")?;
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    umount2(cgroup::MOUNT, MntFlags::MNT_DETACH)?;
    cgroups("cgroup2 of the test")?;
    fs::create_dir(cgroup::ROOT)?;
    let test_share = nix::fcntl::open(
        &folder.join("share"),
        nix::fcntl::OFlag::O_PATH,
        nix::sys::stat::Mode::empty(),
    )?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none)?;
    fs::create_dir_all(SHARE_DIR)?;
    fs::create_dir_all(launch::STAGE)?;
    let share = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&test_share)
    );
    mount(
        Some(share.as_str()),
        SHARE_DIR,
        none,
        MsFlags::MS_BIND,
        none,
    )?;
    mount(none, "/", none, MsFlags::MS_SHARED | MsFlags::MS_REC, none)?;
    Ok(())
}

fn group_name(folder: &Path) -> String {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    format!("sealpod-agent-test{name}")
}

/// The shim's side.
pub(crate) struct Guest {
    pub(crate) agent: AgentClient,
    pub(crate) pid: u32,
    folder: tempfile::TempDir,
    child: Mutex<Child>,
}

pub(crate) fn soon() -> context::Context {
    context::with_timeout(30_000_000_000)
}

impl Guest {
    pub(crate) async fn start() -> Result<Self, Failure> {
        let folder = tempfile::tempdir()?;
        let share = folder.path().join("share");
        fs::create_dir(&share)?;
        image(&share.join("c1/rootfs"))?;
        let listener = UnixListener::bind(folder.path().join("agent"))?;
        let child = Command::new("unshare")
            .args([
                "-m",
                "-p",
                "-n",
                "-u",
                "-i",
                "-f",
                "--kill-child",
                "--propagation",
                "private",
            ])
            .arg(std::env::current_exe()?)
            .arg("--serve")
            .arg(folder.path())
            .kill_on_drop(true)
            .spawn()?;
        let (stream, _) =
            tokio::time::timeout(std::time::Duration::from_secs(30), listener.accept()).await??;
        let agent = AgentClient::new(Client::new(Socket::new(stream)));
        let version = HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        };
        agent.hello(soon(), &version).await?;
        let unshared = child.id().ok_or("unshare has ended")?;
        let pid = fs::read_to_string(format!("/proc/{unshared}/task/{unshared}/children"))?;
        Ok(Self {
            agent,
            pid: pid.trim().parse()?,
            folder,
            child: Mutex::new(child),
        })
    }

    /// Ends the guest and checks that its cgroups were all removed.
    pub(crate) async fn end(self) -> Outcome {
        let mut child = self.child.into_inner()?;
        let left = self.folder.path().join("left");
        let name = group_name(self.folder.path());
        child.kill().await?;
        let script = format!(
            "mount -t cgroup2 none /mnt && cd /mnt/{name} && \
             until ! grep -q . cgroup.procs; do :; done; \
             ls -d sealpod/*/ > {left} 2>/dev/null; rmdir sealpod/*/ 2>/dev/null; \
             rmdir sealpod; cd ..; rmdir {name}",
            left = left.display()
        );
        let cleaned = Command::new("unshare")
            .args(["-m", "sh", "-c", &script])
            .status()
            .await?;
        let left = fs::read_to_string(left)?;
        crate::ensure!(cleaned.success(), "cleaning up: {cleaned}");
        crate::ensure!(left.is_empty(), "cgroups left behind: {left}");
        Ok(())
    }

    pub(crate) fn share(&self) -> PathBuf {
        self.folder.path().join("share")
    }

    /// Makes container `c1` of a specification, with all output streams.
    pub(crate) async fn create(&self, spec: &serde_json::Value) -> ttrpc::Result<u32> {
        self.create_with(spec, |_| {}).await
    }

    pub(crate) async fn create_with(
        &self,
        spec: &serde_json::Value,
        change: impl FnOnce(&mut CreateContainerRequest),
    ) -> ttrpc::Result<u32> {
        let mut request = CreateContainerRequest {
            container_id: "c1".into(),
            spec: spec.to_string().into_bytes(),
            rootfs: "c1/rootfs".into(),
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        change(&mut request);
        Ok(self.agent.create_container(soon(), &request).await?.pid)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        self.agent
            .start_container(soon(), &container(id))
            .await
            .map(drop)
    }

    pub(crate) async fn delete(&self, id: &str) -> ttrpc::Result<()> {
        self.agent
            .delete_container(soon(), &container(id))
            .await
            .map(drop)
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<WaitResponse> {
        self.agent.wait(soon(), &process(id, exec)).await
    }

    pub(crate) async fn kill(&self, exec: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: "c1".into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.agent.signal(soon(), &request).await.map(drop)
    }

    /// Runs `sh -c script` as an exec; returns its exit status and output.
    pub(crate) async fn sh(&self, exec: &str, script: &str) -> Result<(u32, String), Failure> {
        let spec = spec(&["/bin/sh", "-c", script]);
        self.exec(exec, &spec["process"]).await
    }

    pub(crate) async fn exec(
        &self,
        exec: &str,
        process: &serde_json::Value,
    ) -> Result<(u32, String), Failure> {
        self.agent
            .exec(soon(), &exec_request(exec, process))
            .await?;
        let output = self.read_all("c1", exec, Stdio::Stdout).await?;
        let errors = self.read_all("c1", exec, Stdio::Stderr).await?;
        let ended = self.wait("c1", exec).await?;
        self.agent
            .delete_process(soon(), &self::process("c1", exec))
            .await?;
        Ok((ended.exit_status, output + &errors))
    }

    /// Attaches a stream of a process.
    pub(crate) async fn attach(
        &self,
        id: &str,
        exec: &str,
        stream: Stdio,
    ) -> Result<BufReader<UnixStream>, Failure> {
        let header = Header::Stdio {
            stream,
            container_id: id.into(),
            exec_id: exec.into(),
        };
        self.stream(&header).await
    }

    pub(crate) async fn stream(&self, header: &Header) -> Result<BufReader<UnixStream>, Failure> {
        let stream = UnixStream::connect(self.folder.path().join("streams")).await?;
        let mut stream = BufReader::new(stream);
        stream.write_all(header.encode().as_bytes()).await?;
        let mut answer = String::new();
        stream.read_line(&mut answer).await?;
        crate::ensure!(answer == "OK\n", "{header:?}: {answer}");
        Ok(stream)
    }

    pub(crate) async fn read_all(
        &self,
        id: &str,
        exec: &str,
        stream: Stdio,
    ) -> Result<String, Failure> {
        let mut text = Vec::new();
        self.attach(id, exec, stream)
            .await?
            .read_to_end(&mut text)
            .await?;
        Ok(String::from_utf8(text)?)
    }

    /// A sandbox request, for what the tests change in it.
    pub(crate) async fn set_up_sandbox(&self, request: SetupSandboxRequest) -> ttrpc::Result<()> {
        self.agent.setup_sandbox(soon(), &request).await.map(drop)
    }
}

pub(crate) fn container(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

pub(crate) fn process(id: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    }
}

pub(crate) fn exec_request(exec: &str, process: &serde_json::Value) -> ExecRequest {
    ExecRequest {
        container_id: "c1".into(),
        exec_id: exec.into(),
        process: process.to_string().into_bytes(),
        stdout: true,
        stderr: true,
        ..Default::default()
    }
}

/// A small root file system.
pub(crate) fn image(root: &Path) -> Result<(), Failure> {
    for folder in ["bin", "etc", "proc", "tmp", "root"] {
        fs::create_dir_all(root.join(folder))?;
    }
    let busybox = busybox().ok_or("there is no busybox-static")?;
    fs::copy(busybox, root.join("bin/busybox"))?;
    for name in [
        "sh", "cat", "sleep", "id", "ls", "stty", "head", "dd", "mount", "hostname", "grep", "ps",
        "nc", "true", "touch", "ip",
    ] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
    }
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/sh\n",
    )?;
    Ok(())
}

/// A specification as a containerd client makes it.
pub(crate) fn spec(args: &[&str]) -> serde_json::Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_KILL",
        "CAP_SETUID",
        "CAP_SETGID",
        "CAP_NET_BIND_SERVICE",
    ];
    serde_json::json!({
        "ociVersion": "1.1.0",
        "root": {"path": "rootfs"},
        "process": {
            "args": args, "cwd": "/", "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": true,
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                           {"type": "network"}, {"type": "cgroup"}],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": ["/proc/kcore", "/proc/scsi", "/no/such/path"],
            "readonlyPaths": ["/proc/sys"],
        },
    })
}
