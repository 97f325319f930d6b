//! Fast starts: a VM of sealpod-vmm whose agent has come up is written down once, and later VMs go on from
//! there. A template is nobody's pod: nobody serves its share, it has no network, and nothing of any pod was ever in it.
//! `docs/vmm-snapshot.md` has what is renewed in each VM that comes from one.
//!
//! ```text
//!  there is none ── lock ──▶ boot, agent answers, pause, save ──▶ template
//!       └── another makes it: None                                  │ restore
//!                                                                   ▼
//!                   Restored ── share, NICs plugged in; agent answers ──▶ a VM like any other
//! ```
//! What goes wrong is an error and leaves no VM; the caller boots one instead.

mod about;
mod learning;
mod store;
mod write_set;

use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealpod_protocol::agent::HelloResponse;

use super::builtin::{Begin, Machine, cmdline, launch};
use super::{Nic, VSOCK_FILE, Vm, VmConfig, VmError};
use crate::guest::{Dialled, Guest, GuestError};
use crate::host_cgroup::Entrance;
use crate::ledger::{Ledger, LedgerError, Resource, remove_tree};
pub use learning::Learning;

use about::About;
use store::{Found, Lock, Store};

/// Network devices that a VM from a template can begin with.
const NICS: u32 = 2;
/// Folder, in the pod's, of a VM that becomes a template.
const MAKING_DIR: &str = "template";

/// Why a VM does not come from a template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A file or folder.
    #[error("Cannot {action} {path}")]
    Host {
        /// What was tried.
        action: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could have written templates.
    #[error("{0} is not a folder for its owner alone")]
    Folder(PathBuf),
    /// A file of a snapshot.
    #[error(transparent)]
    Snapshot(#[from] sealpod_vmm::snapshot::Error),
    /// A VM of it.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its agent.
    #[error("Its agent cannot be talked to; the guest's last lines: {console}")]
    Guest {
        /// Why not.
        source: GuestError,
        /// What the guest wrote last.
        console: String,
    },
    /// The pod's ledger.
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    /// It was tried a short while ago.
    #[error("The template failed a short while ago: {0}")]
    FailedBefore(String),
    /// More network devices than there are slots.
    #[error("{0} network devices; a template has slots for {NICS}")]
    TooManyNics(usize),
}

/// A VM that goes on from a template, whose agent has not answered yet; not a pod's yet.
pub struct Restored {
    machine: Machine,
    dialled: Dialled,
    /// How long the agent may take to answer.
    limit: Duration,
    store: Store,
    name: String,
    learning: Option<Learning>,
}

/// Starts a VM like `config`, whose share and network devices come later ([`Restored::plug`]), from a template in
/// `state_dir`, which is made if there is none. `limit` is how long an agent may take to answer. `None` while
/// somebody else makes the template.
///
/// # Errors
/// [`TemplateError`]; then there is no VM, and for a while no template.
pub async fn start(
    state_dir: &Path,
    config: &VmConfig,
    ledger: &Ledger,
    limit: Duration,
) -> Result<Option<Restored>, TemplateError> {
    let store = Store::open(state_dir)?;
    let mut config = without_devices(config)?;
    config.program = super::find_program(&config.program)?;
    let spare_slots = NICS + config.hotplug_ports;
    let about = About::of(&config, cmdline(&config), spare_slots);
    let named = about.and_then(|about| Ok((about.name()?, about)));
    let (name, about) = named.map_err(|source| TemplateError::Host {
        action: "look at the files of",
        path: config.dir.clone(),
        source,
    })?;
    let (files, write_set) = match store.find(&name) {
        Ok(Found::Whole(files, write_set)) => (files, write_set),
        Ok(Found::Failed(why)) => return Err(TemplateError::FailedBefore(why)),
        Ok(Found::None) => {
            let Some(lock) = store.lock()? else {
                return Ok(None);
            };
            let made = make(&store, &lock, (&name, &about), &config, ledger, limit).await;
            made.inspect_err(|e| give_up(&store, Some(lock), &name, e))?;
            match store.find(&name)? {
                Found::Whole(files, write_set) => (files, write_set),
                // Somebody needed the room.
                Found::None | Found::Failed(_) => return Ok(None),
            }
        }
        Err(e) => {
            give_up(&store, store.lock()?, &name, &e);
            return Err(e);
        }
    };
    let dialled = dialled(&config.dir)?;
    let since = Instant::now();
    let learns = write_set.is_open().then(|| files.memory.try_clone());
    let learns = learns.transpose().map_err(|source| TemplateError::Host {
        action: "copy a descriptor of",
        path: config.dir.clone(),
        source,
    })?;
    let begin = Begin::Restore(files, write_set.runs());
    match launch(config, begin, ledger).await {
        Ok(machine) => Ok(Some(Restored {
            learning: learns.map(|memory| Learning {
                store: store.clone(),
                name: name.clone(),
                memory,
                pid: machine.pid(),
                since,
            }),
            machine,
            dialled,
            limit,
            store,
            name,
        })),
        Err(e) => {
            let e = e.into();
            give_up(&store, store.lock().ok().flatten(), &name, &e);
            Err(e)
        }
    }
}

/// A VM that went on from a template and has all that a pod's has.
pub struct Plugged {
    /// It.
    pub vm: Arc<dyn Vm>,
    /// Its agent.
    pub guest: Guest,
    /// What that said first.
    pub hello: HelloResponse,
    /// To be done when its container runs, where the template knows too little.
    pub learning: Option<Learning>,
}

impl Restored {
    /// Gives it what a pod's VM has beyond a template's (its share, by a connection to the daemon, and its
    /// network devices) while its agent dials.
    ///
    /// # Errors
    /// [`TemplateError`]; then there is no VM.
    pub async fn plug(self, share: &OwnedFd, nics: &[Nic]) -> Result<Plugged, TemplateError> {
        let machine = &self.machine;
        let plug = async {
            if nics.len() > NICS as usize {
                return Err(TemplateError::TooManyNics(nics.len()));
            }
            machine.add_share(share.as_fd()).await?;
            for nic in nics {
                machine.plug_nic(nic).await?;
            }
            Ok(())
        };
        let ended = async { machine.wait().await.to_string() };
        let answer = self.dialled.answered(ended, self.limit);
        let (plugged, answered) = tokio::join!(plug, answer);
        let failed = match (plugged, answered) {
            (Ok(()), Ok((guest, hello))) => {
                return Ok(Plugged {
                    vm: Arc::new(self.machine),
                    guest,
                    hello,
                    learning: self.learning,
                });
            }
            (_, Err(e)) => {
                let e = no_agent(machine, e).await;
                give_up(
                    &self.store,
                    self.store.lock().ok().flatten(),
                    &self.name,
                    &e,
                );
                e
            }
            (Err(e), Ok(_)) => e,
        };
        machine.stop().await;
        Err(failed)
    }
}

/// So that not every pod tries it. Whoever has the lock may: another one is busy with it.
fn give_up(store: &Store, lock: Option<Lock>, name: &str, why: &TemplateError) {
    let Some(lock) = lock else { return };
    if let Err(e) = store.give_up(&lock, name, &crate::error::chain(why)) {
        tracing::warn!("Template not removed: {}", crate::error::chain(&e));
    }
}

/// The same VM, without share and network devices, with descriptors of its own.
fn without_devices(config: &VmConfig) -> Result<VmConfig, TemplateError> {
    let failed = |source| TemplateError::Host {
        action: "copy a descriptor of",
        path: config.dir.clone(),
        source,
    };
    Ok(VmConfig {
        dir: config.dir.clone(),
        program: config.program.clone(),
        kernel: config.kernel.clone(),
        initramfs: config.initramfs.clone(),
        kernel_params: config.kernel_params.clone(),
        share: None,
        nics: Vec::new(),
        passed: Vec::new(),
        confidential: None,
        cgroup: config.cgroup.try_clone().map_err(failed)?,
        ..*config
    })
}

/// Makes a template: a VM is booted, and written down once its agent has answered.
async fn make(
    store: &Store,
    lock: &Lock,
    (name, about): (&str, &About),
    config: &VmConfig,
    ledger: &Ledger,
    limit: Duration,
) -> Result<(), TemplateError> {
    store.clear(lock)?;
    let mut config = without_devices(config)?;
    config.dir = config.dir.join(MAKING_DIR);
    config.hotplug_ports = about.spare_slots();
    // Not the pod's share of memory: others use what is made here.
    config.cgroup = Entrance::default();
    let host = |action| {
        let path = config.dir.clone();
        move |source| TemplateError::Host {
            action,
            path,
            source,
        }
    };
    let entry = ledger.record(Resource::Path {
        path: config.dir.clone(),
    })?;
    let mut builder = DirBuilder::new();
    builder.mode(0o700);
    builder.create(&config.dir).map_err(host("make folder"))?;
    let (gone, dir) = (host("remove"), config.dir.clone());
    let saved = boot_and_save(store, lock, name, config, ledger, limit).await;
    remove_tree(&dir).map_err(gone)?;
    ledger.release(entry)?;
    saved?;
    store.finish(lock, name, about)?;
    tracing::info!("Template {name} made");
    Ok(())
}

async fn boot_and_save(
    store: &Store,
    lock: &Lock,
    name: &str,
    config: VmConfig,
    ledger: &Ledger,
    limit: Duration,
) -> Result<(), TemplateError> {
    let dialled = dialled(&config.dir)?;
    let machine = launch(config, Begin::Boot { saved: true }, ledger).await?;
    let save = async {
        let ended = async { machine.wait().await.to_string() };
        // Its connection stays: an agent that loses it dials again.
        let answered = dialled.answered(ended, limit).await;
        let _guest = match answered {
            Ok((guest, _)) => guest,
            Err(e) => return Err(no_agent(&machine, e).await),
        };
        machine.pause().await?;
        let files = store.begin(lock, name)?;
        machine.save(&files).await?;
        machine.end().await?;
        Ok(())
    };
    let saved = save.await;
    machine.stop().await;
    saved
}

async fn no_agent(machine: &Machine, source: GuestError) -> TemplateError {
    super::log_where_it_stands(machine).await;
    let console = machine.console_tail().join(" | ");
    TemplateError::Guest { source, console }
}

fn dialled(dir: &Path) -> Result<Dialled, TemplateError> {
    Dialled::bind(dir.join(VSOCK_FILE)).map_err(|source| TemplateError::Host {
        action: "listen for the agent in",
        path: dir.into(),
        source,
    })
}
