//! Building a container: its root and volumes on the host, its disks, then itself in the guest. A
//! failure leaves nothing behind.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use containerd_shim_protos::{api::Mount, events::task as ev};
use oci_spec::runtime::Spec;
use sealpod_protocol::agent;

use super::{Container, Handle, process};
use crate::{
    attest::wanted::Wanted,
    error::{Error, Kind, Result},
    guest::{self, Guest},
    hooks::{Hooks, Point},
    io::{self, HostEnds, Uris},
    mount::{self, RootMount},
    owner::Owner,
    pod::Pod,
    spec::{self, Folder, GuestSpec, MemoryVolume, PidNamespace, Role},
};

/// What a client asks for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Container id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root, as the snapshotter made it.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub uris: Uris,
}

/// Builds the container of `request` in `pod`, whose VM runs. `spec` is the bundle's. A sandbox
/// container gets no process.
///
/// # Errors
/// [`Error`] says what could not be made; what had been made is gone again.
pub async fn create(pod: &Arc<Pod>, request: Request, spec: Spec, role: Role) -> Result<Handle> {
    let refused = |e: &dyn std::error::Error| Error::chain(Kind::InvalidArgument, e);
    let mut spec = spec;
    let in_guest = role != Role::Sandbox;
    let wanted = match in_guest {
        true => pod.wanted_devices(&mut spec)?,
        false => Vec::new(),
    };
    let hooks = Hooks::of(&spec, &request.id, &request.bundle).map_err(|e| refused(&e))?;
    let console = console_size(&spec);
    let stand_in = match role {
        Role::Member { .. } => Some(pod.stand_in().await?),
        Role::Single | Role::Sandbox => None,
    };
    let mut container = Container {
        pod: Arc::clone(pod),
        id: request.id.clone(),
        bundle: request.bundle.clone(),
        hooks,
        init: process::Process::new(request.uris.clone(), Vec::new()),
        execs: HashMap::new(),
        paused: false,
        alone: role == Role::Single,
        stand_in,
        in_guest,
        guest_pid: 0,
        disks: Vec::new(),
        volumes: Vec::new(),
    };
    let mut drain = io::Drain::default();
    if in_guest {
        let guest_spec = spec::translate(spec, &request.bundle).map_err(|e| refused(&e))?;
        let host = io::open(&request.uris, pod.namespace(), &request.id).await;
        let host = host.map_err(|e| refused(&e))?;
        let built = container.build(&request, guest_spec, wanted, host, console);
        if let Err(e) = built.await {
            pod.remove_container(&request.id, &container.disks, &container.volumes)
                .await;
            return Err(e);
        }
        drain = container
            .init
            .stdio
            .as_ref()
            .map(io::Stdio::drain)
            .unwrap_or_default();
    } else {
        container.run_create_hooks().await?;
    }
    let event = container.created(&request);
    container.publish(event).await;
    let handle = Handle {
        pid: container.pid(),
        owner: Owner::spawn(container),
    };
    if in_guest {
        handle.watch(pod.guest()?, request.id, String::new(), drain);
    }
    Ok(handle)
}

impl Container {
    async fn build(
        &mut self,
        request: &Request,
        spec: GuestSpec,
        wanted: Vec<Wanted>,
        host: HostEnds,
        (console_width, console_height): (u32, u32),
    ) -> Result<()> {
        let (pid_namespace, pid_namespace_of) = self.pid_namespace(spec.pid_namespace)?;
        let admitted_devices = self.pod.admit(wanted).await?;
        self.mount_host_side(request, &spec).await?;
        let mut block_devices = Vec::new();
        for disk in &spec.disks {
            let serial = self.pod.attach_disk(&disk.host, disk.readonly).await?;
            self.disks.push(serial.clone());
            block_devices.push(agent::BlockDevice {
                serial,
                path: disk.path.to_string_lossy().into_owned(),
                readonly: disk.readonly,
                mode: disk.mode,
                uid: disk.uid,
                gid: disk.gid,
                ..Default::default()
            });
        }
        self.run_create_hooks().await?;
        let (stdin, stdout, stderr) = host.wanted();
        let message = agent::CreateContainerRequest {
            container_id: self.id.clone(),
            spec: spec.json,
            rootfs: format!("{}/rootfs", self.id),
            terminal: request.uris.terminal,
            stdin,
            stdout,
            stderr,
            pid_namespace: pid_namespace.into(),
            pid_namespace_of: pid_namespace_of.unwrap_or_default(),
            memory_volumes: spec.memory.into_iter().map(memory_volume).collect(),
            block_devices,
            admitted_devices,
            skip_missing_devices: spec.skip_missing_devices,
            console_width,
            console_height,
            ..Default::default()
        };
        guest::fits("The container's specification", &message)?;
        let guest = self.pod.guest()?;
        let made = guest
            .agent()
            .create_container(Guest::while_building(), &message)
            .await
            .map_err(create_failed)?;
        self.guest_pid = made.pid;
        self.init.stdio = Some(process::attach(&guest, &self.id, "", host).await?);
        Ok(())
    }

    /// What the agent is told of the PID namespace, and whose it is.
    fn pid_namespace(&self, wanted: PidNamespace) -> Result<(agent::PidNamespace, Option<String>)> {
        Ok(match wanted {
            PidNamespace::Private => (agent::PidNamespace::PID_PRIVATE, None),
            PidNamespace::Guest => (agent::PidNamespace::PID_GUEST, None),
            PidNamespace::Of(pid) if !self.alone && pid == self.pod.pid() => {
                (agent::PidNamespace::PID_POD, None)
            }
            PidNamespace::Of(pid) => match self.pod.container_of(pid) {
                Some(id) => (agent::PidNamespace::PID_CONTAINER, Some(id)),
                None => {
                    return Err(Error::invalid(format!(
                        "The PID namespace of process {pid} cannot be joined: it is no container of pod {:?}",
                        self.pod.id()
                    )));
                }
            },
        })
    }

    async fn run_create_hooks(&self) -> Result<()> {
        let done = self.hooks.run(Point::Create, self.pod.pid()).await;
        done.map_err(|e| Error::chain(Kind::Unknown, &e))
    }

    /// Root and volumes below the share, off the runtime's threads: mount(2) can take its time.
    async fn mount_host_side(&mut self, request: &Request, spec: &GuestSpec) -> Result<()> {
        let dir = self.pod.container_dir(&self.id);
        let layers: Vec<RootMount> = request
            .rootfs
            .iter()
            .map(|m| RootMount {
                fstype: m.type_.clone(),
                source: m.source.clone(),
                target: m.target.clone(),
                options: m.options.clone(),
            })
            .collect();
        let bundle_root = self.bundle_root(request)?;
        let volumes = spec.mounts.clone();
        let stage = self.pod.volumes().root_stage(&self.id);
        let pod = Arc::clone(&self.pod);
        let work = move || {
            let mut held = Vec::new();
            let done = mount::root(&layers, &bundle_root, &dir.join("rootfs"), &stage)
                .and_then(|()| pod.volumes().hold(&volumes, &mut held));
            (done, held)
        };
        let (done, held) = tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| Error::chain(Kind::Unknown, &e))?;
        self.volumes = held;
        done.map_err(|e| Error::chain(Kind::Unknown, &e))
    }

    /// Without layers, the root is `root.path` of the specification, a directory that must be there.
    fn bundle_root(&self, request: &Request) -> Result<PathBuf> {
        let spec = spec::load(&self.bundle).map_err(|e| Error::chain(Kind::InvalidArgument, &e))?;
        let path = spec
            .root()
            .as_ref()
            .map_or("rootfs".into(), |r| r.path().clone());
        let path = self.bundle.join(path);
        if request.rootfs.is_empty() && !path.is_dir() {
            return Err(Error::invalid(format!(
                "The root file system {path:?} is not a directory (`root.path` of the specification)"
            )));
        }
        Ok(path)
    }

    fn created(&self, request: &Request) -> ev::TaskCreate {
        ev::TaskCreate {
            container_id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            io: Some(ev::TaskIO {
                stdin: request.uris.stdin.clone(),
                stdout: request.uris.stdout.clone(),
                stderr: request.uris.stderr.clone(),
                terminal: request.uris.terminal,
                ..Default::default()
            })
            .into(),
            pid: self.pid(),
            ..Default::default()
        }
    }
}

fn memory_volume(volume: MemoryVolume) -> agent::MemoryVolume {
    let folder = |path: &Path, folder: Folder| agent::MemoryFolder {
        path: path.to_string_lossy().into_owned(),
        mode: folder.mode,
        uid: folder.uid,
        gid: folder.gid,
        ..Default::default()
    };
    let part = volume.part.map(|(path, part)| folder(&path, part));
    agent::MemoryVolume {
        name: volume.name,
        bytes: volume.bytes,
        root: Some(folder(Path::new(""), volume.root)).into(),
        part: part.into(),
        ..Default::default()
    }
}

/// Width and height that the specification gives the terminal; 0 where it gives none.
fn console_size(spec: &Spec) -> (u32, u32) {
    let size = spec.process().as_ref().and_then(|p| p.console_size());
    let number = |n: u64| u32::try_from(n).unwrap_or(0);
    size.map_or((0, 0), |s| (number(s.width()), number(s.height())))
}

/// The words that clients look for in a failed create.
fn create_failed(e: ttrpc::Error) -> Error {
    let e = Error::from(e);
    if e.kind == Kind::Unavailable {
        return e;
    }
    Error::new(
        Kind::Unknown,
        format!("OCI runtime create failed: {}", e.message),
    )
}
