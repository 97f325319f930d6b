//! One server with its own CA, state and files, and what a guest of that CA would send it.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use sealpod_attestation::audit::{self, Record};
use sealpod_attestation::binding::{self, EphemeralKey, Nonce, PublicKey};
use sealpod_attestation::evidence::{Bundle, GpuEvidence, Tee, gpu_digest};
use sealpod_attestation::remote::{Remote, read_pin};
use sealpod_attestation::signer::Signer;
use sealpod_attestation::simulate::{Ca, Defect, GpuClaims, Minted, SnpClaims, TdxClaims};
use sealpod_attestation::{Timestamp, init_data};

/// MEASUREMENT and MRTD of the reference values.
pub(crate) const GOOD: [u8; 48] = [2; 48];

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock")
        .as_secs()
}

/// The CA of all tests: making its RSA keys takes a while.
pub(crate) fn ca() -> &'static Ca {
    static CA: OnceLock<Ca> = OnceLock::new();
    CA.get_or_init(|| Ca::in_memory(Timestamp(now() as i64)).expect("CA"))
}

/// A guest's key.
pub(crate) fn key(fill: u8) -> PublicKey {
    let key = EphemeralKey::from_random(&[fill; 48]);
    key.expect("key").public()
}

/// A guest's GPU, with a report for this nonce.
pub(crate) fn gpu(nonce: [u8; 32]) -> Minted {
    let claims = GpuClaims {
        nonce,
        ..GpuClaims::default()
    };
    ca().mint_gpu(&claims, None).expect("GPU evidence")
}

/// CPU evidence for this REPORT_DATA.
pub(crate) fn cpu(tee: Tee, report_data: [u8; 64], init: &[u8], defect: Option<Defect>) -> Minted {
    match tee {
        Tee::Snp => {
            let claims = SnpClaims {
                report_data,
                measurement: GOOD,
                host_data: init_data::host_data(init),
                ..SnpClaims::default()
            };
            ca().mint_snp(&claims, defect)
        }
        Tee::Tdx => {
            let claims = TdxClaims {
                report_data,
                mr_td: GOOD,
                mr_config_id: init_data::mr_config_id(init),
                ..TdxClaims::default()
            };
            ca().mint_tdx(&claims, defect)
        }
    }
    .expect("CPU evidence")
}

/// What a guest sends.
#[derive(Clone)]
pub(crate) struct Guest {
    pub(crate) tee: Tee,
    pub(crate) pod: String,
    pub(crate) key: PublicKey,
    pub(crate) gpus: usize,
    pub(crate) defect: Option<Defect>,
}

impl Guest {
    pub(crate) fn new(tee: Tee, pod: &str) -> Self {
        Self {
            tee,
            pod: pod.into(),
            key: key(1),
            gpus: 0,
            defect: None,
        }
    }

    pub(crate) fn bundle(&self, nonce: &Nonce) -> Bundle {
        let key_digest = binding::key_digest(&self.key);
        let gpus: Vec<GpuEvidence> = (0..self.gpus)
            .map(|n| {
                let minted = gpu(binding::gpu_nonce(nonce, &key_digest));
                GpuEvidence {
                    device_id: format!("0000:0{n}:00.0"),
                    report: minted.report,
                    certificates: minted.endorsements,
                }
            })
            .collect();
        let init = init_data::InitData::default().to_text().into_bytes();
        let report_data = binding::report_data(
            nonce,
            &key_digest,
            &gpu_digest(&gpus),
            &init_data::digest(&init),
            &self.pod,
        );
        let minted = cpu(self.tee, report_data, &init, self.defect);
        Bundle {
            tee: self.tee,
            report: minted.report,
            endorsements: minted.endorsements,
            event_log: Vec::new(),
            gpus,
            key: self.key,
            init_data: init,
        }
    }
}

/// A running server. Killed at the end.
pub(crate) struct Server {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) pin: String,
    pub(crate) kid: String,
    child: Child,
}

impl Server {
    /// With the default limits.
    pub(crate) fn start() -> Self {
        Self::with("")
    }

    /// With a piece of configuration: a `[limits]` table, say.
    pub(crate) fn with(more: &str) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().expect("parent")).expect("folder");
            std::fs::write(path, bytes).expect("file");
        };
        write("anchors.json", ca().anchors_file().as_bytes());
        let digits = "02".repeat(48);
        let references = format!(
            r#"{{"snp":{{"measurement":["{digits}"],"limits":{{"minimum_tcb":{{"snp":20}}}}}},
                "tdx":{{"mr_td":["{digits}"]}}}}"#
        );
        write("references.json", references.as_bytes());
        let tdx = cpu(Tee::Tdx, [0; 64], b"", None).collateral;
        let snp = cpu(Tee::Snp, [0; 64], b"", None).collateral;
        for (name, bytes) in [tdx, snp, gpu([0; 32]).collateral].concat() {
            write(&format!("collateral/{name}"), &bytes);
        }
        // The event log is a guest's, not the verifier's.
        let _ = std::fs::remove_file(dir.path().join("collateral/event-log.bin"));
        write("resources/default/key/one", b"a secret");
        write("serve.toml", configuration(more).as_bytes());
        Self::run(dir)
    }

    fn run(dir: tempfile::TempDir) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sealpod-attest"))
            .args(["serve", "--config"])
            .arg(dir.path().join("serve.toml"))
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log(dir.path())))
            .spawn()
            .expect("server");
        let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
        let mut value = |name: &str| {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            let value = line.strip_prefix(name).map(str::trim);
            value.map(str::to_owned).unwrap_or_else(|| {
                let log = std::fs::read_to_string(dir.path().join("stderr")).unwrap_or_default();
                panic!("no {name:?} in {line:?}; {log}")
            })
        };
        let address = value("listening on https://").parse().expect("address");
        let (pin, kid) = (value("certificate pin"), value("verifier key"));
        Self {
            dir,
            address,
            pin,
            kid,
            child,
        }
    }

    /// A client with this server's pin and keys.
    pub(crate) fn remote(&self) -> Remote {
        let url = format!("https://{}", self.address);
        let pin = read_pin(&self.pin).expect("pin");
        let mut remote = Remote::new(&url, pin, Vec::new()).expect("client");
        remote.fetch_keys().expect("keys");
        remote
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("signal");
    }

    /// Waits for its end: its exit status.
    pub(crate) fn ended(&mut self) -> Option<i32> {
        self.child.wait().expect("wait").code()
    }

    /// The same server again: its state, its files, another port.
    pub(crate) fn restart(mut self) -> Self {
        self.signal(rustix::process::Signal::TERM);
        assert_eq!(self.ended(), Some(0));
        let dir = std::mem::replace(&mut self.dir, tempfile::tempdir().expect("folder"));
        Self::run(dir)
    }

    /// All audit records, after the log was verified.
    pub(crate) fn records(&self) -> Vec<Record> {
        let path = self.dir.path().join("state/audit.log");
        let checkpoint =
            std::fs::read_to_string(audit::checkpoint_path(&path)).expect("checkpoint");
        let der = std::fs::read(self.dir.path().join("state/verifier-key.p8")).expect("key");
        let signer = Signer::from_pkcs8(&der).expect("key");
        let log = std::fs::File::open(path).expect("log");
        let mut records = Vec::new();
        audit::verify(log, &checkpoint, signer.public(), |_, r| {
            records.push(r.clone())
        })
        .expect("an intact log");
        records
    }

    /// One metric's value; of a name with labels as it stands.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let (status, text) = crate::client::get(self, "/metrics");
        assert_eq!(status, 200);
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|v| v.parse().ok())
            .unwrap_or_else(|| panic!("no {name} in {text}"))
    }

    /// Resident memory, KiB: now (`VmRSS`) or its peak (`VmHWM`).
    pub(crate) fn memory_kib(&self, field: &str) -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("status");
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'));
        let kib = line.and_then(|l| l.trim().strip_suffix(" kB")?.parse().ok());
        kib.expect("a figure")
    }

    /// What `sealpod-attest audit verify` says about its log.
    pub(crate) fn audit_verify(&self) -> Result<(), String> {
        let state = self.dir.path().join("state");
        let output = Command::new(env!("CARGO_BIN_EXE_sealpod-attest"))
            .args(["audit", "verify", "--key"])
            .args([state.join("verifier.jwk"), state.join("audit.log")])
            .output()
            .expect("audit verify");
        match output.status.success() {
            true => Ok(()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    /// CPU time of its process so far, in ticks of 10 ms.
    pub(crate) fn cpu_ms(&self) -> f64 {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).expect("stat");
        // proc_pid_stat(5): after the name in brackets come the fields 3 and on; utime is 14, stime 15.
        let fields = text.rsplit(") ").next().unwrap_or_default().split(' ');
        let ticks = fields.skip(11).take(2);
        let ticks = ticks.map(|t| t.parse::<u64>().expect("ticks")).sum::<u64>();
        ticks as f64 * 10.0
    }

    /// Waits for a line of the server's log.
    pub(crate) fn wait_for_log(&self, part: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let log = std::fs::read_to_string(self.dir.path().join("stderr")).unwrap_or_default();
            if log.contains(part) {
                return;
            }
            assert!(Instant::now() < end, "no {part:?} in {log}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server's configuration; `more` may hold tables that are not in it.
fn configuration(more: &str) -> String {
    format!(
        "listen = \"127.0.0.1:0\"\nstate = \"state\"\n\
         [verifier]\nanchors = \"anchors.json\"\ncollateral = \"collateral\"\n\
         reference_values = \"references.json\"\n\
         [kbs]\nresources = \"resources\"\n{more}\n"
    )
}

fn log(dir: &Path) -> std::fs::File {
    let path: PathBuf = dir.join("stderr");
    let mut options = std::fs::OpenOptions::new();
    options.create(true).append(true).open(path).expect("log")
}
