//! Where this guest's evidence comes from: the kernel's configfs-tsm, the TEE's older driver
//! ([`super::driver`]), or, in a guest without a TEE, the shim's simulator. Which one it is the guest finds
//! out by itself; the host cannot choose a weaker one.

use std::io;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use sealpod_attestation::evidence::{MAX_CERTIFICATES, MAX_EVENT_LOG, MAX_REPORT, Tee};
use sealpod_attestation::init_data;
use sealpod_protocol::SIMULATOR_PORT;
use sealpod_protocol::simulator::{self, Ask, Request};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

use super::driver::{self, SEV_GUEST, SNP_REPORT, TDX_GUEST};
use super::tsm::{self, Configfs};
use crate::apart::{self, ApartError};
use crate::cgroup;

/// Longest answer of configfs-tsm.
const ANSWER_MAX: usize = MAX_REPORT + MAX_CERTIFICATES + 8;
/// The firmware's event log in a TD (ACPI table CCEL).
const EVENT_LOG: &str = "/sys/firmware/acpi/tables/data/CCEL";
/// HOST_DATA of an SNP report (SEV-SNP ABI, table 23).
const HOST_DATA: std::ops::Range<usize> = 0xC0..0xE0;
/// MRCONFIGID of a quote's body (TDX DCAP, quote formats 4 and 5): after the header and the fields
/// before it; version 5 has six bytes of body descriptor in between.
const MR_CONFIG_ID: usize = 48 + 184;
const BODY_DESCRIPTOR: usize = 6;
/// How long a TEE, or the simulator, may take: a quote is made by a service of the host.
pub(super) const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);

/// Evidence that could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A step failed.
    #[error("Could not {what}: {source}")]
    Step {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel's interface speaks for a TEE that nobody here knows.
    #[error("TSM provider {0:?} is not known; known are sev_guest, tdx_guest")]
    Provider(String),
    /// Others use the same request.
    #[error("The TSM request was changed by someone else while it was made")]
    Disturbed,
    /// There is nothing to ask.
    #[error(
        "This guest has no TEE (no {SEV_GUEST}, no {}) and no simulator stands in for one", TDX_GUEST[0]
    )]
    NoTee,
    /// The TEE's interface, as it told in a process of its own.
    #[error(transparent)]
    Apart(#[from] ApartError),
    /// What the TEE's driver gave is none of its reports.
    #[error("The TEE's driver gave {0} bytes that are no report over what was asked")]
    Length(usize),
    /// The simulator's answer is none.
    #[error("The simulator refused, or sent no answer")]
    Simulator,
    /// The guest was launched with other init-data.
    #[error(
        "Init-data is not what this guest was launched with: {field} of its evidence is another"
    )]
    InitData {
        /// The field that binds it.
        field: &'static str,
    },
    /// A device has no source of evidence.
    #[error("Device {0:?}: this guest has no way to ask it for evidence")]
    Device(String),
}

/// Evidence of the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuEvidence {
    /// Kind of guest.
    pub tee: Tee,
    /// Report or quote.
    pub report: Vec<u8>,
    /// AMD's certificate table, or empty.
    pub endorsements: Vec<u8>,
    /// Event log of the firmware, or empty.
    pub event_log: Vec<u8>,
}

impl CpuEvidence {
    /// Whether the guest was launched with this init-data: its evidence says so.
    ///
    /// # Errors
    /// [`SourceError::InitData`].
    pub fn check_init_data(&self, raw: &[u8]) -> Result<(), SourceError> {
        let at = |start: usize, wanted: &[u8]| {
            self.report.get(start..start + wanted.len()) == Some(wanted)
        };
        let (field, bound) = match self.tee {
            Tee::Snp => ("HOST_DATA", at(HOST_DATA.start, &init_data::host_data(raw))),
            Tee::Tdx => {
                let descriptor = match self.report.first() {
                    Some(5) => BODY_DESCRIPTOR,
                    _ => 0,
                };
                let start = MR_CONFIG_ID + descriptor;
                ("MRCONFIGID", at(start, &init_data::mr_config_id(raw)))
            }
        };
        bound.then_some(()).ok_or(SourceError::InitData { field })
    }
}

/// A source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// configfs-tsm.
    Tsm,
    /// `/dev/sev-guest`.
    SevGuest,
    /// The driver of a TD.
    TdxGuest,
    /// The shim's simulator, and the key that it answers to.
    Simulator([u8; simulator::KEY_LEN]),
}

impl Source {
    /// The source of this guest. `key` is the simulator's, where there is one.
    ///
    /// # Errors
    /// [`SourceError::NoTee`].
    pub fn find(key: &[u8]) -> Result<Self, SourceError> {
        let exists = |path: &str| Path::new(path).exists();
        let (sev, tdx) = (exists(SEV_GUEST), TDX_GUEST.into_iter().any(exists));
        if sev || tdx {
            if exists(tsm::CONFIGFS) {
                // Mounted already, or there is none: told by what is below.
                let (none, flags) = (None::<&str>, MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC);
                let _ = mount(
                    Some("configfs"),
                    tsm::CONFIGFS,
                    Some("configfs"),
                    flags,
                    none,
                );
            }
            if Path::new(tsm::CONFIGFS).join(tsm::REPORTS).is_dir() {
                return Ok(Self::Tsm);
            }
            return Ok(if sev { Self::SevGuest } else { Self::TdxGuest });
        }
        let key = key.try_into().map_err(|_| SourceError::NoTee)?;
        Ok(Self::Simulator(key))
    }

    /// Evidence of the CPU over `data`.
    ///
    /// # Errors
    /// [`SourceError`].
    pub async fn report(&self, data: &[u8; 64]) -> Result<CpuEvidence, SourceError> {
        match self {
            Self::Tsm => {
                let root = Path::new(tsm::CONFIGFS).join(tsm::REPORTS);
                // The kernel answers when the TEE has, which is not to hold up the agent.
                let work = || match tsm::report(&Configfs(root), data) {
                    Ok(evidence) => Ok(simulator::answer(&evidence.report, &evidence.endorsements)),
                    Err(e) => Err(e.to_string()),
                };
                let answer = apart::run(ANSWER_MAX, PATIENCE, work).await?;
                let (report, second) =
                    simulator::blobs(&answer).ok_or(SourceError::Length(answer.len()))?;
                Ok(with_event_log(by_length(report, second)))
            }
            Self::SevGuest => driver::snp(data).await,
            Self::TdxGuest => driver::tdx(data).await.map(with_event_log),
            Self::Simulator(key) => {
                let ask = Ask::Report(*data);
                let (report, second) = ask_simulator(key, ask).await?;
                let mut evidence = by_length(report, second);
                if evidence.tee == Tee::Tdx {
                    evidence.event_log = std::mem::take(&mut evidence.endorsements);
                }
                Ok(evidence)
            }
        }
    }

    /// Evidence of a device over `nonce`: its report and its certificates.
    ///
    /// # Errors
    /// [`SourceError`].
    pub async fn device(
        &self,
        nonce: [u8; 32],
        device: &str,
    ) -> Result<(Vec<u8>, Vec<u8>), SourceError> {
        let Self::Simulator(key) = self else {
            return Err(SourceError::Device(device.into()));
        };
        let device = device.to_owned();
        ask_simulator(key, Ask::Gpu { nonce, device }).await
    }
}

/// A report and its certificate table, or a quote and what came with it.
fn by_length(report: Vec<u8>, endorsements: Vec<u8>) -> CpuEvidence {
    let tee = if report.len() == SNP_REPORT {
        Tee::Snp
    } else {
        Tee::Tdx
    };
    CpuEvidence {
        tee,
        report,
        endorsements,
        event_log: Vec::new(),
    }
}

/// Adds a TD's event log.
fn with_event_log(mut evidence: CpuEvidence) -> CpuEvidence {
    if evidence.tee == Tee::Tdx {
        evidence.event_log = event_log();
    }
    evidence
}

fn event_log() -> Vec<u8> {
    use io::Read;
    let mut log = Vec::new();
    let read = std::fs::File::open(EVENT_LOG)
        .and_then(|f| f.take(MAX_EVENT_LOG as u64).read_to_end(&mut log));
    // A TD that was booted directly has none; what the verifier needs it says.
    read.map(|_| log).unwrap_or_default()
}

async fn ask_simulator(
    key: &[u8; simulator::KEY_LEN],
    ask: Ask,
) -> Result<(Vec<u8>, Vec<u8>), SourceError> {
    let address = VsockAddr::new(VMADDR_CID_HOST, SIMULATOR_PORT);
    let answer = tokio::time::timeout(PATIENCE, async {
        let stream = VsockStream::connect(address).await.ok()?;
        exchange(stream, Request { key: *key, ask }).await
    });
    answer.await.ok().flatten().ok_or(SourceError::Simulator)
}

/// One request and its answer.
async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    request: Request,
) -> Option<(Vec<u8>, Vec<u8>)> {
    stream.write_all(&request.encode()).await.ok()?;
    let mut answer = Vec::new();
    let most = 2 * (simulator::BLOB_MAX as u64 + 4);
    stream.take(most).read_to_end(&mut answer).await.ok()?;
    simulator::blobs(&answer)
}

/// Drivers whose device no container gets, privileged or not: who can open it can be attested as this
/// guest.
pub(super) const TEE_DRIVERS: [&str; 3] = ["sev-guest", "tdx_guest", "tdx-guest"];

/// Small text file of the kernel, or nothing.
pub(super) fn text(path: &Path) -> String {
    cgroup::read_file(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn evidence(tee: Tee, report: Vec<u8>) -> CpuEvidence {
        CpuEvidence {
            tee,
            report,
            endorsements: Vec::new(),
            event_log: Vec::new(),
        }
    }

    #[test]
    fn init_data_that_the_guest_was_not_launched_with_is_refused() {
        let raw = b"version = \"0.1.0\"";
        let mut snp = vec![0; 1184];
        snp[HOST_DATA].copy_from_slice(&init_data::host_data(raw));
        assert!(evidence(Tee::Snp, snp.clone()).check_init_data(raw).is_ok());
        let e = evidence(Tee::Snp, snp).check_init_data(b"other");
        assert!(e.expect_err("other").to_string().contains("HOST_DATA"));
        for (version, offset) in [(4, 232), (5, 238)] {
            let mut quote = vec![0; 700];
            quote[0] = version;
            quote[offset..offset + 48].copy_from_slice(&init_data::mr_config_id(raw));
            assert!(
                evidence(Tee::Tdx, quote.clone())
                    .check_init_data(raw)
                    .is_ok()
            );
            quote[offset + 47] ^= 1;
            assert!(evidence(Tee::Tdx, quote).check_init_data(raw).is_err());
        }
        // Too short to say anything.
        assert!(
            evidence(Tee::Snp, vec![0; 100])
                .check_init_data(b"")
                .is_err()
        );
        // None was given: the field is zero.
        assert!(
            evidence(Tee::Snp, vec![0; 1184])
                .check_init_data(b"")
                .is_ok()
        );
    }

    #[test]
    fn a_report_is_told_from_a_quote_by_its_length() {
        let snp = by_length(vec![0; SNP_REPORT], b"table".to_vec());
        assert_eq!((snp.tee, &snp.endorsements[..]), (Tee::Snp, &b"table"[..]));
        assert_eq!(by_length(vec![0; 5000], Vec::new()).tee, Tee::Tdx);
    }

    #[tokio::test]
    async fn the_simulators_answer_is_whole_or_none() {
        let request = Request {
            key: [3; simulator::KEY_LEN],
            ask: Ask::Report([1; 64]),
        };
        for (cut, whole) in [(0, true), (1, false)] {
            let (ours, mut theirs) = tokio::io::duplex(4096);
            let sent = request.encode();
            let answer = tokio::spawn(async move {
                let mut read = vec![0; sent.len()];
                theirs.read_exact(&mut read).await.expect("request");
                assert!(read == sent);
                let answer = simulator::answer(b"report", b"chain");
                let answer = &answer[..answer.len() - cut];
                theirs.write_all(answer).await.expect("answer");
            });
            let got = exchange(ours, request.clone()).await;
            answer.await.expect("simulator");
            assert_eq!(got.is_some(), whole);
        }
    }

    #[test]
    fn without_a_tee_and_without_a_key_there_is_no_evidence() {
        // The machine that tests this may be a confidential guest; then it has a source.
        if ![SEV_GUEST, TDX_GUEST[0]]
            .iter()
            .any(|d| Path::new(d).exists())
        {
            assert!(matches!(Source::find(&[]), Err(SourceError::NoTee)));
            assert!(matches!(Source::find(&[1; 31]), Err(SourceError::NoTee)));
            assert_eq!(
                Source::find(&[1; 32]).expect("simulator"),
                Source::Simulator([1; 32])
            );
        }
    }
}
