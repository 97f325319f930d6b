//! The simulator of a pod: answers on the host's side of [`SIMULATOR_PORT`] what a TEE and its GPU would,
//! under a local authority that only an anchors file of its own accepts. It runs for one pod, over what
//! that pod's VM was really started with.

use std::{path::Path, sync::Arc, time::Duration};

use sealpod_attestation::{
    Timestamp,
    evidence::Tee,
    init_data,
    simulate::{Ca, Defect, GpuClaims, SimulateError, SnpClaims, TdxClaims},
    verdict,
};
use sealpod_protocol::{
    SIMULATOR_PORT,
    simulator::{self, Ask, KEY_LEN, REQUEST_MAX, Request},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::{OnceCell, Semaphore},
    task::JoinHandle,
    time::timeout,
};

use super::launch::{Launch, LaunchError};
use crate::{clock, vm};

/// Connections at once: the agent has one; more are containers' that try.
const CONNECTIONS_MAX: usize = 4;
/// How long a request may take to arrive, and its answer to leave.
const PATIENCE: Duration = Duration::from_secs(5);

/// A simulator that does not run, or evidence that was not made.
#[derive(Debug, thiserror::Error)]
pub enum SimulatorError {
    /// The authority.
    #[error("Simulator")]
    Authority(#[from] SimulateError),
    /// The measurement.
    #[error("Simulator")]
    Launch(#[from] LaunchError),
    /// The socket.
    #[error("Simulator's socket")]
    Socket(#[from] std::io::Error),
}

/// A running simulator; ends when it is dropped.
#[derive(Debug)]
pub struct Simulator {
    key: [u8; KEY_LEN],
    task: JoinHandle<()>,
}

impl Drop for Simulator {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct Shared {
    key: [u8; KEY_LEN],
    ca: Ca,
    defect: String,
    tee: Tee,
    launch: Launch,
    init_data: Vec<u8>,
    measured: OnceCell<Measured>,
}

/// What a guest of either TEE says of itself each time: what it was launched with.
#[derive(Clone)]
enum Measured {
    Snp(SnpClaims),
    Tdx(TdxClaims),
}

impl Simulator {
    /// Starts the simulator of the pod whose folder is `dir`: of such a TEE, under the authority of folder
    /// `ca`. Every piece of evidence gets the defect that is named, if its kind can have it.
    ///
    /// # Errors
    /// [`SimulatorError`].
    pub fn start(
        dir: &Path,
        (ca, tee): (&Path, Tee),
        defect: &str,
        launch: Launch,
        init_data: &[u8],
    ) -> Result<Self, SimulatorError> {
        let mut key = [0; KEY_LEN];
        getrandom(&mut key)?;
        let shared = Arc::new(Shared {
            key,
            ca: Ca::open(ca, now())?,
            defect: defect.into(),
            tee,
            launch,
            init_data: init_data.to_vec(),
            measured: OnceCell::new(),
        });
        let path = dir.join(format!("{}_{SIMULATOR_PORT}", vm::VSOCK_FILE));
        let listener = UnixListener::bind(path)?;
        let task = tokio::spawn(async move {
            let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
            while let Ok((stream, _)) = listener.accept().await {
                // One too many is closed at once.
                if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
                    let shared = Arc::clone(&shared);
                    tokio::spawn(async move {
                        serve(stream, shared).await;
                        drop(place);
                    });
                }
            }
        });
        Ok(Self { key, task })
    }

    /// What the agent shows to be answered.
    #[must_use]
    pub fn key(&self) -> &[u8; KEY_LEN] {
        &self.key
    }
}

fn now() -> Timestamp {
    Timestamp(clock::unix_ns() / 1_000_000_000)
}

fn getrandom(buffer: &mut [u8]) -> std::io::Result<()> {
    use std::io::Read;
    std::fs::File::open("/dev/urandom")?.read_exact(buffer)
}

async fn serve(mut stream: UnixStream, shared: Arc<Shared>) {
    let Ok(Some(request)) = timeout(PATIENCE, read(&mut stream)).await else {
        return;
    };
    if request.key != shared.key {
        tracing::warn!("A process that is not the agent asked the simulator for evidence");
        return;
    }
    match mint(&shared, request.ask).await {
        Ok((first, second)) => {
            let answer = simulator::answer(&first, &second);
            let _ = timeout(PATIENCE, stream.write_all(&answer)).await;
        }
        Err(e) => tracing::error!("{}", crate::error::chain(&e)),
    }
}

async fn read(stream: &mut UnixStream) -> Option<Request> {
    let mut bytes = Vec::with_capacity(REQUEST_MAX);
    loop {
        if let Some(request) = Request::decode(&bytes) {
            return Some(request);
        }
        if bytes.len() >= REQUEST_MAX || stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

async fn mint(shared: &Arc<Shared>, ask: Ask) -> Result<(Vec<u8>, Vec<u8>), SimulatorError> {
    // Some milliseconds of hashing and signing, the first time some hundred.
    let worker = Arc::clone(shared);
    let measured = shared
        .measured
        .get_or_try_init(|| async move {
            let measured = tokio::task::spawn_blocking(move || measure(&worker));
            measured.await.map_err(std::io::Error::other)?
        })
        .await?;
    let (measured, shared) = (measured.clone(), Arc::clone(shared));
    let minted = tokio::task::spawn_blocking(move || mint_now(&shared, measured, ask));
    minted.await.map_err(std::io::Error::other)?
}

fn measure(shared: &Shared) -> Result<Measured, SimulatorError> {
    Ok(match shared.tee {
        Tee::Snp => Measured::Snp(SnpClaims {
            measurement: shared.launch.measurement()?,
            host_data: init_data::host_data(&shared.init_data),
            ..SnpClaims::default()
        }),
        Tee::Tdx => Measured::Tdx(TdxClaims {
            mr_config_id: init_data::mr_config_id(&shared.init_data),
            ..shared.launch.td()?
        }),
    })
}

fn mint_now(
    shared: &Shared,
    measured: Measured,
    ask: Ask,
) -> Result<(Vec<u8>, Vec<u8>), SimulatorError> {
    // A defect of the CPU's evidence is none of a GPU's, and the other way round.
    let defect = |tee| Defect::from_name(&shared.defect, tee).ok();
    match (ask, measured) {
        (Ask::Report(report_data), Measured::Snp(mut claims)) => {
            claims.report_data = report_data;
            let defect = defect(verdict::Tee::Snp);
            let minted = shared.ca.mint_snp(&claims, defect)?;
            Ok((minted.report, minted.endorsements))
        }
        (Ask::Report(report_data), Measured::Tdx(mut claims)) => {
            claims.report_data = report_data;
            let defect = defect(verdict::Tee::Tdx);
            let minted = shared.ca.mint_tdx(&claims, defect)?;
            Ok((minted.report, claims.event_log()))
        }
        (Ask::Gpu { nonce, device: _ }, _) => {
            let claims = GpuClaims {
                nonce,
                ..GpuClaims::default()
            };
            let defect = defect(verdict::Tee::Nvidia);
            let minted = shared.ca.mint_gpu(&claims, defect)?;
            Ok((minted.report, minted.endorsements))
        }
    }
}
