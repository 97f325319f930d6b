//! `serve`: the verifier as an HTTPS service, for pods on other machines and for clients of Trustee's
//! key broker. This folder holds the service alone: connections, limits, routes, files; all judgement
//! is in the library.
//!
//! Signals: TERM and INT finish the requests that have begun and end; HUP loads certificate, policy,
//! reference values and collateral anew without losing a request.

mod answer;
mod backend;
mod config;
mod kbs;
mod limits;
mod listen;
mod metrics;
mod resources;
mod routes;
mod self_signed;
mod service;
mod sessions;
mod tls;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use anyhow::Context;
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::{Done, output};
use backend::Backend;
use config::Config;
use service::Service;

#[derive(Args)]
pub(crate) struct ServeArgs {
    /// Configuration file (TOML)
    #[arg(long)]
    config: Option<PathBuf>,
    /// Address and port to listen on, in place of the configuration's
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// Folder of signing key, certificate and audit log, in place of the configuration's
    #[arg(long)]
    state: Option<PathBuf>,
}

pub(crate) fn run(args: &ServeArgs) -> anyhow::Result<Done> {
    let mut config = Config::load(args.config.as_deref())?;
    if let Some(listen) = args.listen {
        config.listen = listen;
    }
    if let Some(state) = &args.state {
        config.state.clone_from(state);
    }
    tls::state_folder(&config.state)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("Cannot start")?;
    runtime.block_on(serve(config))
}

async fn serve(config: Config) -> anyhow::Result<Done> {
    let loaded = tls::load(&config)?;
    let backend = Backend::open(&config)?;
    let on = |kind| signal(kind).context("Cannot catch signals");
    let signals = Signals {
        term: on(SignalKind::terminate())?,
        int: on(SignalKind::interrupt())?,
        hup: on(SignalKind::hangup())?,
    };
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("Cannot listen on {}", config.listen))?;
    let address = listener.local_addr()?;
    output::print(&format!(
        "listening on https://{address}\ncertificate pin {}\nverifier key {}\n",
        loaded.pin,
        backend.kid()
    ))?;
    let service = Arc::new(Service::new(config, backend, loaded)?);
    let (stop, stopped) = watch::channel(false);
    let served = tokio::spawn(listen::serve(listener, Arc::clone(&service), stopped));
    signals.wait(&service).await;
    eprintln!("sealpod-attest: draining");
    let _ = stop.send(true);
    match served.await.context("The service failed")? {
        0 => eprintln!("sealpod-attest: drained"),
        cut => eprintln!("sealpod-attest: {cut} connections did not end in time"),
    }
    Ok(Done::Accepted)
}

struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

impl Signals {
    /// Reloads as often as asked; returns when it is time to end.
    async fn wait(mut self, service: &Arc<Service>) {
        loop {
            tokio::select! {
                _ = self.term.recv() => return,
                _ = self.int.recv() => return,
                _ = self.hup.recv() => {}
            }
            let reloading = Arc::clone(service);
            let done = tokio::task::spawn_blocking(move || reloading.reload()).await;
            let failed = match done {
                Ok(Ok(())) => {
                    eprintln!("sealpod-attest: reloaded");
                    0
                }
                Ok(Err(error)) => {
                    eprintln!("sealpod-attest: not reloaded, all stays as it was: {error:#}");
                    1
                }
                Err(_) => 1,
            };
            service.metrics.reloads[failed].fetch_add(1, Relaxed);
        }
    }
}
