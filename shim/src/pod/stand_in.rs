//! The number by which the host knows a pod or a container of it, its task's pid: a thread of the shim that
//! only waits, and ends with what it stands for.
//!
//! Of a pid others want more than that it is one: Docker, nerdctl and `ctr --cni` look for the pod's
//! network namespace at `/proc/<pid>/ns/net`, so the thread is in that one. The VMM's process could not
//! stand for it: it is in a network namespace of its own. And `/proc/<pid>/root` must not be the host's
//! root for those who copy files there, so the thread has the VMM's jail, where nothing can be written.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::mpsc,
    thread,
};

use nix::{
    sched::{CloneFlags, setns, unshare},
    unistd::gettid,
};
use tokio::sync::oneshot;

use crate::{
    error::{Error, Kind, Result},
    network::PodNetns,
    vm::Vm,
};

/// Bytes; it makes a handful of system calls.
const STACK: usize = 16 << 10;

/// See the file's head.
#[derive(Debug)]
pub(crate) struct StandIn {
    pid: u32,
    /// Dropped, the thread ends.
    _alive: mpsc::Sender<()>,
}

impl StandIn {
    /// One in `netns`, and else where the process of `vm` is.
    ///
    /// # Errors
    /// The thread cannot be made or cannot enter, also because the VM has ended.
    pub(super) async fn new(netns: &PodNetns, vm: &dyn Vm) -> Result<Self> {
        let made = async { Self::inside(netns.clone(), vm.pidfd()?).await };
        made.await.map_err(|e: io::Error| {
            let kind = Kind::Unknown;
            Error::new(kind, format!("No pid for the task can be made: {e}"))
        })
    }

    async fn inside(netns: PodNetns, process: OwnedFd) -> io::Result<Self> {
        let (alive, ended) = mpsc::channel::<()>();
        let (tell, told) = oneshot::channel();
        let run = move || {
            let entered = enter(&netns, process);
            drop(netns);
            let told = tell.send(entered.map(|()| gettid().as_raw().unsigned_abs()));
            if told.is_ok() {
                // Returns when the other end is dropped: nothing is ever sent.
                let _ = ended.recv();
            }
        };
        let thread = thread::Builder::new().name("stand-in".into());
        thread.stack_size(STACK).spawn(run)?;
        let pid = told.await.map_err(io::Error::other)??;
        Ok(Self { pid, _alive: alive })
    }

    /// The thread's id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }
}

/// Takes the calling thread into `netns` and into the other namespaces of `process`.
fn enter(netns: &PodNetns, process: OwnedFd) -> nix::Result<()> {
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET)?;
    // Root and working directory are those of all threads until this.
    unshare(CloneFlags::CLONE_FS)?;
    let others = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS;
    setns(process, others)
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Read,
        path::PathBuf,
        process::{self, Child, Command, Stdio},
        time::Duration,
    };

    use rustix::process::{Pid, PidfdFlags, geteuid, pidfd_open};

    use super::*;

    /// A process in a mount, an IPC and a UTS namespace of its own.
    fn apart() -> (Child, OwnedFd) {
        let mut command = Command::new("unshare");
        command.args(["--mount", "--ipc", "--uts", "sh", "-c"]);
        command.arg("echo ready; exec sleep 1000");
        let mut child = command.stdout(Stdio::piped()).spawn().expect("unshare");
        let mut ready = [0; 5];
        let out = child.stdout.as_mut().expect("its output");
        out.read_exact(&mut ready).expect("ready");
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).expect("pidfd");
        (child, pidfd)
    }

    fn end(mut child: Child) {
        child.kill().expect("killed");
        child.wait().expect("reaped");
    }

    /// What `/proc/<pid>/ns/<name>` leads to.
    fn space(pid: u32, name: &str) -> PathBuf {
        fs::read_link(format!("/proc/{pid}/ns/{name}")).expect(name)
    }

    #[tokio::test]
    async fn it_is_in_the_pods_network_and_else_where_the_vm_is_until_it_is_dropped() {
        if !geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let netns = PodNetns::create().await.expect("namespace");
        let (child, pidfd) = apart();
        let again = pidfd.try_clone().expect("descriptor");
        let a = StandIn::inside(netns.clone(), pidfd).await.expect("one");
        let b = StandIn::inside(netns.clone(), again).await.expect("two");
        assert_ne!(a.pid(), b.pid());
        let pods = fs::read_link(netns.path()).expect("the pod's namespace");
        for stand_in in [&a, &b] {
            assert_eq!(space(stand_in.pid(), "net"), pods);
            for name in ["mnt", "ipc", "uts"] {
                assert_eq!(space(stand_in.pid(), name), space(child.id(), name));
            }
        }
        for name in ["net", "mnt", "ipc", "uts"] {
            let (ours, others) = (space(process::id(), name), space(a.pid(), name));
            assert_ne!(ours, others, "{name}: this process stays where it is");
        }
        let (alive, ended) = (b.pid(), format!("/proc/{}", a.pid()));
        drop(a);
        while fs::exists(&ended).expect("proc") {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(space(alive, "net"), pods);
        end(child);
    }

    #[tokio::test]
    async fn there_is_none_for_a_vm_that_has_ended() {
        if !geteuid().is_root() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let netns = PodNetns::create().await.expect("namespace");
        let (child, pidfd) = apart();
        end(child);
        let e = StandIn::inside(netns, pidfd).await.expect_err("gone");
        assert_eq!(e.raw_os_error(), Some(libc::ESRCH));
    }
}
