//! Everything the service has, shared by all connections: the verifier, the tables, the budgets.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::{Request, StatusCode};
use rustls::ServerConfig;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::answer::Answer;
use super::backend::Backend;
use super::config::Config;
use super::limits::Addresses;
use super::metrics::Metrics;
use super::resources::Resources;
use super::sessions::Sessions;
use super::tls;

/// How long a request waits for memory or for a processor before it is told to come again.
const PATIENCE: Duration = Duration::from_secs(5);

/// What a body's memory grows by, KiB.
const STEP: u32 = 16;

/// The service.
pub(crate) struct Service {
    pub(crate) config: Config,
    pub(crate) backend: Backend,
    pub(crate) sessions: Sessions,
    pub(crate) resources: Option<Resources>,
    pub(crate) addresses: Arc<Addresses>,
    pub(crate) metrics: Metrics,
    pub(crate) started: Instant,
    /// KiB of request bodies.
    memory: Arc<Semaphore>,
    /// Appraisals at once: one for each processor.
    judges: Arc<Semaphore>,
    tls: RwLock<Arc<ServerConfig>>,
}

/// A body, and the memory that it counts for.
pub(crate) struct Read {
    pub(crate) bytes: Vec<u8>,
    permit: OwnedSemaphorePermit,
}

impl Service {
    pub(crate) fn new(
        config: Config,
        backend: Backend,
        loaded: tls::Loaded,
    ) -> anyhow::Result<Self> {
        use anyhow::Context;
        let resources = match &config.kbs.resources {
            Some(folder) => Some(
                Resources::open(folder)
                    .with_context(|| format!("Cannot open {}", folder.display()))?,
            ),
            None => None,
        };
        let judges = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            backend,
            sessions: Sessions::default(),
            resources,
            addresses: Arc::new(Addresses::new(&config.limits)),
            metrics: Metrics::default(),
            started: Instant::now(),
            memory: Arc::new(Semaphore::new((config.limits.memory_mib as usize) << 10)),
            judges: Arc::new(Semaphore::new(judges)),
            tls: RwLock::new(loaded.config),
            config,
        })
    }

    /// The certificate for the next connection.
    pub(crate) fn tls(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.tls.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Loads certificate, policy, reference values and collateral anew. What cannot be loaded leaves
    /// everything as it was.
    pub(crate) fn reload(&self) -> anyhow::Result<()> {
        let loaded = tls::load(&self.config)?;
        self.backend.reload(&self.config)?;
        *self.tls.write().unwrap_or_else(PoisonError::into_inner) = loaded.config;
        Ok(())
    }

    /// Reads a body within its caps of length, time and memory.
    pub(crate) async fn body(&self, request: Request<Incoming>, most: u32) -> Result<Read, Answer> {
        let limits = &self.config.limits;
        let most = (most.min(limits.body_kib) as usize) << 10;
        let body = request.into_body();
        let announced = body.size_hint().lower();
        if usize::try_from(announced).map_or(true, |length| length > most) {
            return Err(too_large(most));
        }
        match timeout(limits.body_time(), self.collect(body, most)).await {
            Ok(read) => read,
            Err(_) => Err(Answer::error(
                StatusCode::REQUEST_TIMEOUT,
                "time",
                "The request's body did not come in time",
            )),
        }
    }

    /// Reads a body piece by piece. What has come counts against the memory of all bodies, what is only
    /// announced does not.
    async fn collect(&self, mut body: Incoming, most: usize) -> Result<Read, Answer> {
        let mut bytes = Vec::new();
        let mut permit = self.memory(STEP).await?;
        while let Some(frame) = body.frame().await {
            let broken = "The request's body ended early or is broken";
            let frame =
                frame.map_err(|_| Answer::error(StatusCode::BAD_REQUEST, "body", broken))?;
            let Ok(data) = frame.into_data() else {
                continue;
            };
            if bytes.len() + data.len() > most {
                return Err(too_large(most));
            }
            while bytes.len() + data.len() > permit.num_permits() << 10 {
                permit.merge(self.memory(STEP).await?);
            }
            bytes.extend_from_slice(&data);
        }
        Ok(Read { bytes, permit })
    }

    /// Memory for so many KiB of a body, as soon as there is some.
    async fn memory(&self, kib: u32) -> Result<OwnedSemaphorePermit, Answer> {
        match timeout(PATIENCE, Arc::clone(&self.memory).acquire_many_owned(kib)).await {
            Ok(Ok(permit)) => Ok(permit),
            _ => Err(Answer::busy(5)),
        }
    }

    /// Runs what takes a processor on one, as soon as one is free. The work goes on when the client
    /// leaves; its memory counts until it is done.
    pub(crate) async fn judge<T: Send + 'static>(
        self: &Arc<Self>,
        read: Option<Read>,
        work: impl FnOnce(&Self, &[u8]) -> T + Send + 'static,
    ) -> Result<T, Answer> {
        let permit = timeout(PATIENCE, Arc::clone(&self.judges).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            return Err(Answer::busy(5));
        };
        let service = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || {
            let (bytes, memory) = read.map_or_else(Default::default, |r| (r.bytes, Some(r.permit)));
            let done = work(&service, &bytes);
            drop((bytes, memory, permit));
            done
        });
        done.await.map_err(|_| {
            Answer::error(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "The verifier failed",
            )
        })
    }
}

fn too_large(most: usize) -> Answer {
    let text = format!("The request's body may have {most} bytes");
    Answer::error(StatusCode::PAYLOAD_TOO_LARGE, "size", &text)
}
