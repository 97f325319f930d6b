//! `start`: makes the pod's folder and its serving process, or finds the one that a container joins.

use std::{
    fs,
    io::{self, Write},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixListener,
            process::CommandExt,
        },
    },
    path::Path,
    process::{Child, Command, Stdio},
};

use command_fds::{CommandFdExt, FdMapping};

use super::{
    Args, Error, Place, abandoned,
    reply::Caller,
    serve::{CALLER_FD, LISTENER_FD},
};
use crate::{
    child::SMALL_STACKS,
    config, ledger,
    service::config_path,
    spec::{self, Role},
};

/// containerd 1.6 finds a shim again by this file in the bundle.
const ADDRESS_FILE: &str = "address";

/// Starts or joins; `print` tells containerd where. A pod whose address nobody takes ends again.
pub(super) fn start(
    args: &Args,
    print: impl FnOnce(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let watched = abandoned::caller().map_err(Error::io("watch the caller"))?;
    let caller = Caller::ask(&args.id).map_err(Error::io("read standard input"))?;
    let named = config_path(caller.options.as_ref()).map_err(|e| Error::Options(e.message))?;
    let config = config::load(named.as_deref().map(Path::new))?;
    let bundle = fs::canonicalize(&args.bundle).map_err(Error::io("find the bundle"))?;
    let (role, pod) = pod_of(&bundle, &args.id)?;
    let place = Place::new(
        &config.runtime.state_dir,
        &args.address,
        &args.namespace,
        &pod,
    );

    // Noted first: whoever cleans up finds the pod from the moment that it exists.
    let note = || {
        let noted = place.note_in(&bundle);
        noted.map_err(Error::io("note the pod in the bundle"))
    };
    let mut serving = None;
    if matches!(role, Role::Member { .. }) {
        if !place.answers() {
            return Err(Error::NoPod {
                id: pod,
                container: args.id.clone(),
                socket: place.socket(),
            });
        }
        note()?;
    } else {
        prepare(&place, &pod)?;
        let folder = serving.insert(Serving::new(&place));
        note()?;
        folder.process = Some(spawn(args, &place, &bundle, watched)?);
    }
    let address = place.address();
    write_address(&bundle, &address).map_err(Error::io("write the address into the bundle"))?;
    let reply = caller.reply(&address).map_err(|e| Error::Io {
        doing: "encode the reply".into(),
        source: io::Error::other(e),
    })?;
    print(&reply)?;
    if let Some(serving) = serving {
        serving.keep();
    }
    Ok(())
}

/// A pod's folder and serving process, taken away again unless they are kept.
struct Serving<'a> {
    place: &'a Place,
    process: Option<Child>,
    kept: bool,
}

impl<'a> Serving<'a> {
    fn new(place: &'a Place) -> Self {
        Self {
            place,
            process: None,
            kept: false,
        }
    }

    fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Some(process) = &mut self.process {
            // It has been asked for nothing yet, so it has nothing that would outlive it.
            let _ = process.kill();
            let _ = process.wait();
        }
        let _ = ledger::remove_tree(self.place.dir());
    }
}

/// The container's role, and the id of its pod. A sandbox of the Sandbox API may have no specification.
fn pod_of(bundle: &Path, id: &str) -> Result<(Role, String), Error> {
    if !bundle.join("config.json").exists() {
        return Ok((Role::Sandbox, id.to_owned()));
    }
    let spec = spec::load(bundle)?;
    Ok(match spec::role(&spec::annotations(&spec))? {
        Role::Member { sandbox_id } => (
            Role::Member {
                sandbox_id: sandbox_id.clone(),
            },
            sandbox_id,
        ),
        own => (own, id.to_owned()),
    })
}

/// An empty folder for a new pod. What a dead one left there goes; a living one is left alone.
fn prepare(place: &Place, pod: &str) -> Result<(), Error> {
    if place.answers() {
        return Err(Error::Running {
            id: pod.to_owned(),
            socket: place.socket(),
        });
    }
    if place.dir().exists() {
        let report = ledger::clean(place.dir());
        if !report.is_clean() {
            return Err(Error::Leftovers {
                dir: place.dir().into(),
                what: format!("{report:?}"),
            });
        }
        ledger::remove_tree(place.dir())
            .map_err(Error::io("remove the folder of an earlier pod"))?;
    }
    if let Some(parent) = place.dir().parent() {
        let made = fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(parent);
        made.map_err(Error::io(format!("create {parent:?}")))?;
    }
    let made = fs::DirBuilder::new().mode(0o700).create(place.dir());
    made.map_err(Error::io(format!("create {:?}", place.dir())))
}

/// Starts the serving process with a socket that already listens, so that nobody has to wait for it.
fn spawn(args: &Args, place: &Place, bundle: &Path, caller: OwnedFd) -> Result<Child, Error> {
    let doing = || Error::io("start the serving process");
    let listener =
        UnixListener::bind(place.socket()).map_err(Error::io("listen on the shim's socket"))?;
    let program = std::env::current_exe().map_err(doing())?;
    let log = bundle.join("log");
    // Read and write: opening does not wait for containerd to read, and writing fails instead of
    // blocking when it does not.
    let stderr = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NONBLOCK)
        .open(&log)
        .map_or_else(|_| Stdio::null(), Stdio::from);
    let mut command = Command::new(program);
    command
        .args([
            "-namespace",
            &args.namespace,
            "-id",
            &args.id,
            "-address",
            &args.address,
        ])
        .arg("-socket")
        .arg(place.socket())
        .arg("-bundle")
        .arg(bundle);
    if args.debug {
        command.arg("-debug");
    }
    command
        .arg("serve")
        .env(SMALL_STACKS.0, SMALL_STACKS.1)
        .current_dir(bundle)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .process_group(0);
    let fd = |parent_fd, child_fd| FdMapping {
        parent_fd,
        child_fd,
    };
    let fds = vec![fd(listener.into(), LISTENER_FD), fd(caller, CALLER_FD)];
    command.fd_mappings(fds).map_err(|e| Error::Io {
        doing: "hand over the shim's socket".into(),
        source: io::Error::other(e),
    })?;
    command.spawn().map_err(doing())
}

/// Written beside and renamed: containerd never reads half of it.
fn write_address(bundle: &Path, address: &str) -> io::Result<()> {
    let temporary = bundle.join(".address");
    fs::File::create(&temporary)?.write_all(address.as_bytes())?;
    fs::rename(temporary, bundle.join(ADDRESS_FILE))
}
