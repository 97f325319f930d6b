//! VMs that go on from a template: with the real agent, a share and a network, on real KVM (`make lab`). Each test
//! runs again in a process with a mount namespace of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sealpod_protocol::agent::{CreateContainerRequest, SetupSandboxRequest};
use sealpod_protocol::streams::{Header, Stdio};
use sealpod_shim::guest::{Dialled, Guest};
use sealpod_shim::host_cgroup::Entrance;
use sealpod_shim::ledger::{Ledger, clean};
use sealpod_shim::network::{PodNetns, PodNetwork};
use sealpod_shim::virtiofs::{Virtiofs, make_share};
use sealpod_shim::vm::template::{self, Plugged, Restored, TemplateError};
use sealpod_shim::vm::{Accelerator, Builtin, Driver, Nic, VSOCK_FILE, Vm, VmConfig, find_program};
use tokio::io::AsyncReadExt;

use crate::bench::{builtin, guest_file, run, skip};
use crate::share::{inside, virtiofsd};

/// How long an agent may take in the lab.
const LIMIT: Duration = Duration::from_secs(60);

/// Says what the tests compare.
const FACTS: &str = "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | base64
    hostname; cat /sys/class/net/eth0/address; cat /proc/sys/kernel/random/uuid; date +%s";

/// Templates and pods of one test.
struct Bench {
    base: tempfile::TempDir,
}

impl Bench {
    /// `None`, and a line that says why, where there is no sealpod-vmm to test.
    fn new(test: &str) -> Option<Self> {
        if builtin().is_none() || !guest_file("initramfs.cpio").exists() {
            skip("needs sealpod-vmm, the agent and real KVM (make lab)");
            return None;
        }
        let base = || tempfile::tempdir().unwrap();
        inside(&format!("template::{test}")).then(|| Self { base: base() })
    }

    fn state_dir(&self) -> PathBuf {
        self.base.path().join("state")
    }

    fn config(&self, dir: &Path) -> VmConfig {
        VmConfig {
            dir: dir.into(),
            program: builtin().unwrap(),
            kernel: guest_file("vmlinux"),
            initramfs: guest_file("initramfs.cpio"),
            kernel_params: Vec::new(),
            vcpus: 1,
            memory_mib: 256,
            share: None,
            nics: Vec::new(),
            passed: Vec::new(),
            confidential: None,
            cgroup: Entrance::default(),
            hotplug_ports: 1,
            accelerator: Accelerator::Kvm,
            user: 64_777,
        }
    }

    fn ledger(&self, pod: &str) -> Ledger {
        Ledger::open(&self.base.path().join(pod)).unwrap()
    }

    /// A VM of a pod of this name, from a template; how it got there.
    async fn restored(&self, pod: &str) -> (Ledger, Result<Option<Restored>, TemplateError>) {
        let ledger = self.ledger(pod);
        let config = self.config(ledger.dir());
        let started = template::start(&self.state_dir(), &config, &ledger, LIMIT).await;
        (ledger, started)
    }

    /// Files of the only template.
    fn template(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.state_dir().join("templates")).unwrap();
        let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
        found.retain(|path| path.is_dir());
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }
}

/// A pod whose VM came from a template.
struct Pod {
    ledger: Ledger,
    vm: Arc<dyn Vm>,
    guest: Guest,
    share: PathBuf,
    daemon: Virtiofs,
    network: PodNetwork,
    outside: PodNetns,
}

impl Pod {
    async fn new(bench: &Bench, name: &str, host: u8) -> Self {
        let begin = Instant::now();
        let (ledger, started) = bench.restored(name).await;
        let restored = started.unwrap().expect("nobody else makes it");
        eprintln!("{name}: restored after {:?}", begin.elapsed());
        let share = make_share(ledger.dir()).unwrap();
        let program = virtiofsd().unwrap();
        let daemon = Virtiofs::start(&program, ledger.dir(), Entrance::default(), &ledger);
        let (daemon, client) = daemon.await.unwrap();
        let outside = PodNetns::create().await.unwrap();
        let netns = PodNetns::create().await.unwrap();
        connect(&outside, &netns, host);
        let network = PodNetwork::new(netns, ledger.clone()).await;
        let mut network = network.unwrap();
        let taps = network.attach().await.unwrap();
        let nics: Vec<_> = (taps.into_iter())
            .map(|tap| Nic {
                tap: tap.tap,
                mac: tap.mac,
                mtu: tap.mtu.unwrap(),
            })
            .collect();
        let begin = Instant::now();
        let Plugged { vm, guest, .. } = restored.plug(&client, &nics).await.unwrap();
        eprintln!(
            "{name}: plugged in, and answered, after {:?}",
            begin.elapsed()
        );
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let mut entropy = vec![0; 256];
        let mut random = std::fs::File::open("/dev/urandom").unwrap();
        std::io::Read::read_exact(&mut random, &mut entropy).unwrap();
        let sandbox = SetupSandboxRequest {
            hostname: name.into(),
            time_unix_ns: now.as_nanos().try_into().unwrap(),
            entropy,
            share: true,
            network: Some(network.to_proto()).into(),
            ..Default::default()
        };
        let set_up = guest.agent().setup_sandbox(Guest::soon(), &sandbox).await;
        set_up.unwrap_or_else(|e| panic!("{e}: {:?}", vm.console_tail()));
        eprintln!("{name}: set up after {:?}", begin.elapsed());
        Self {
            ledger,
            vm,
            guest,
            share,
            daemon,
            network,
            outside,
        }
    }

    /// What a container prints.
    async fn say(&self, id: &str, script: &str) -> String {
        let root = self.share.join(id).join("rootfs");
        for folder in ["bin", "proc", "sys", "dev"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        let busybox = find_program(Path::new("busybox")).unwrap();
        std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
        let script = format!("/bin/busybox --install -s /bin; {script}");
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {
                "cwd": "/", "args": ["/bin/busybox", "sh", "-c", script],
                "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0},
                "capabilities": {"bounding": ["CAP_NET_RAW"], "effective": ["CAP_NET_RAW"],
                                 "permitted": ["CAP_NET_RAW"]},
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
            ],
            "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
        });
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec: spec.to_string().into_bytes(),
            rootfs: format!("{id}/rootfs"),
            stdout: true,
            ..Default::default()
        };
        let agent = self.guest.agent();
        let made = agent
            .create_container(Guest::while_building(), &request)
            .await;
        made.unwrap();
        let header = Header::Stdio {
            stream: Stdio::Stdout,
            container_id: id.into(),
            exec_id: String::new(),
        };
        let mut stdout = self.guest.stream(&header).await.unwrap();
        let container = Guest::container(id);
        let started = agent.start_container(Guest::soon(), &container).await;
        started.unwrap();
        let mut text = String::new();
        stdout.read_to_string(&mut text).await.unwrap();
        text
    }

    async fn end(self) {
        self.vm.stop().await;
        drop(self.vm);
        self.daemon.stop().await;
        drop((self.daemon, self.network, self.outside));
        run("umount", &[self.share.to_str().unwrap()]);
        let report = clean(self.ledger.dir());
        assert!(report.is_clean(), "{report:?}");
    }
}

/// A veth pair, `10.9.0.1` outside and `10.9.0.<host>` in the pod.
fn connect(outside: &PodNetns, pod: &PodNetns, host: u8) {
    let (outside, pod) = (outside.path(), pod.path());
    let (outside, pod) = (outside.display(), pod.display());
    let script = format!(
        "nsenter --net={outside} ip link add out0 type veth peer name eth0
         nsenter --net={outside} ip link set eth0 netns $$
         nsenter --net={outside} ip addr add 10.9.0.1/24 dev out0
         nsenter --net={outside} ip link set out0 up
         ip addr add 10.9.0.{host}/24 dev eth0 && ip link set eth0 up"
    );
    run("nsenter", &[&format!("--net={pod}"), "sh", "-ec", &script]);
}

fn seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    now.as_secs()
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_from_one_template_are_pods_like_any_other_and_differ() {
    let test = "vms_from_one_template_are_pods_like_any_other_and_differ";
    let Some(bench) = Bench::new(test) else {
        return;
    };
    let pods = [
        Pod::new(&bench, "one", 2).await,
        Pod::new(&bench, "two", 3).await,
    ];
    // Nobody but its owner can read what is in a guest's memory; and both came from the same.
    let template = bench.template();
    for file in ["memory", "state"] {
        let found = std::fs::metadata(template.join(file)).unwrap();
        let mode = std::os::unix::fs::MetadataExt::mode(&found);
        assert_eq!(mode & 0o777, 0o600, "{file}");
        let room = std::os::unix::fs::MetadataExt::blocks(&found) / 2;
        eprintln!("template's {file}: {room} KiB");
    }
    let mut all = Vec::new();
    for (pod, name) in pods.iter().zip(["one", "two"]) {
        let begin = seconds();
        let said = pod.say("facts", FACTS).await;
        let facts: Vec<String> = said.lines().map(str::to_owned).collect();
        assert_eq!(facts.len(), 6, "{said:?}");
        assert_eq!(facts[2], name);
        let time: u64 = facts[5].parse().unwrap();
        assert!((begin..=seconds()).contains(&time), "{time} {begin}");
        all.push(facts);
        // The network, and what the guest writes into the share.
        let said = pod.say(
            "net",
            "ping -c 1 -W 5 10.9.0.1 >&2 && echo out > /written && echo yes",
        );
        assert_eq!(said.await, "yes\n");
        let written = pod.share.join("net/rootfs/written");
        assert_eq!(std::fs::read_to_string(written).unwrap(), "out\n");
        // It is confined like any other.
        for entry in std::fs::read_dir(format!("/proc/{}/task", pod.vm.pid())).unwrap() {
            let status = std::fs::read_to_string(entry.unwrap().path().join("status")).unwrap();
            assert!(status.contains("Seccomp:\t2"), "{status}");
            assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        }
    }
    // All but the time.
    for (one, two) in all[0].iter().zip(&all[1]).take(5) {
        assert_ne!(one, two);
    }
    for pod in pods {
        pod.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_template_that_is_damaged_is_given_up_and_the_vm_can_boot() {
    let test = "a_template_that_is_damaged_is_given_up_and_the_vm_can_boot";
    let Some(bench) = Bench::new(test) else {
        return;
    };
    let (ledger, made) = bench.restored("first").await;
    drop(made.unwrap().unwrap());
    let state = bench.template().join("state");
    let mut raw = std::fs::read(&state).unwrap();
    let middle = raw.len() / 2;
    raw[middle] ^= 1;
    std::fs::write(&state, raw).unwrap();
    let refused = |started: Result<_, TemplateError>| match started {
        Ok(_) => panic!("it started"),
        Err(e) => e.to_string(),
    };
    let (second, started) = bench.restored("second").await;
    let why = refused(started);
    assert!(why.contains("checksum"), "{why}");
    assert!(!state.exists());
    let (third, started) = bench.restored("third").await;
    let why = refused(started);
    assert!(why.contains("short while ago"), "{why}");
    // What they were to use is as it was.
    let dialled = Dialled::bind(second.dir().join(VSOCK_FILE)).unwrap();
    let vm = Builtin.start(bench.config(second.dir()), &second).await;
    let vm = vm.unwrap();
    let ended = async { vm.wait().await.to_string() };
    dialled.answered(ended, LIMIT).await.unwrap();
    vm.stop().await;
    drop(vm);
    for ledger in [ledger, second, third] {
        assert!(clean(ledger.dir()).is_clean());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_somebody_makes_the_template_others_boot() {
    let Some(bench) = Bench::new("while_somebody_makes_the_template_others_boot") else {
        return;
    };
    let (one, other) = tokio::join!(bench.restored("one"), bench.restored("other"));
    let whole = [&one, &other].map(|(_, started)| started.as_ref().unwrap().is_some());
    assert_ne!(whole[0], whole[1]);
    for (ledger, started) in [one, other] {
        drop(started);
        assert!(clean(ledger.dir()).is_clean());
    }
}
