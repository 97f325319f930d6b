//! Private mount, network and PID namespaces in which a whole environment lives. When the value is
//! dropped, or the test process dies in any way, every process in them is killed and every mount and
//! interface is gone.

use std::{
    fs::File,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns, unshare};

/// What PID 1 of the environment does. `/run` and `/var/lib` become empty and `/etc` a copy: no state of
/// the machine is seen, none is left. `ctr --cni` looks for its network in fixed places. It ends when its standard input does, that is with the test process; meanwhile
/// bash reaps orphans.
const INIT: &str = r#"
set -e
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs -o mode=755 tmpfs /var/lib
mkdir -p /run/lock /run/netns
mkdir -p /var/lib/etc-upper /var/lib/etc-work
mount -t overlay -o lowerdir=/etc,upperdir=/var/lib/etc-upper,workdir=/var/lib/etc-work overlay /etc
rm -rf /etc/cni
mkdir /etc/cni
ln -s "$CNI_CONF" /etc/cni/net.d
mount -t tmpfs tmpfs /opt
mkdir -p /opt/cni
ln -s "$CNI_BIN" /opt/cni/bin
ip link set lo up
echo 1 > /proc/sys/net/ipv4/ip_forward
echo ready
while read -r _; do :; done
"#;

/// A set of namespaces with an idle PID 1.
#[derive(Debug)]
pub struct Namespaces {
    // `unshare`: in the new mount and network namespaces itself, parent of PID 1.
    holder: Child,
}

/// A process of the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its number inside the PID namespace.
    pub pid: u32,
    /// Command line, words joined by spaces; `stat` where there is none (zombies).
    pub command: String,
}

impl Namespaces {
    /// Makes them.
    ///
    /// # Errors
    /// Where `unshare` fails: not root, or no right to.
    pub fn new(cni_conf: &Path, cni_bin: &Path) -> Result<Self> {
        let mut holder = Command::new("unshare")
            .args([
                "-m",
                "-n",
                "-p",
                "-f",
                "--kill-child",
                "--mount-proc",
                "bash",
                "-c",
                INIT,
            ])
            .env("CNI_CONF", cni_conf)
            .env("CNI_BIN", cni_bin)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("unshare (package util-linux)")?;
        let mut line = String::new();
        if let Some(out) = holder.stdout.take() {
            BufReader::new(out).read_line(&mut line)?;
        }
        ensure!(
            line == "ready\n",
            "Namespaces could not be made; unshare said why above"
        );
        Ok(Self { holder })
    }

    fn file(&self, name: &str) -> Result<File> {
        let path = format!("/proc/{}/ns/{name}", self.holder.id());
        File::open(&path).context(path)
    }

    /// Runs `f` on a thread inside all three namespaces; processes that it spawns live there. `f` must
    /// not make threads of its own.
    ///
    /// # Panics
    /// When the namespaces cannot be entered, or `f` panics.
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.thread(
            &[
                ("pid_for_children", CloneFlags::CLONE_NEWPID),
                ("net", CloneFlags::CLONE_NEWNET),
                ("mnt", CloneFlags::CLONE_NEWNS),
            ],
            f,
        )
    }

    /// Runs `f` on a thread inside the network namespace only.
    ///
    /// # Panics
    /// As [`Self::enter`].
    pub fn enter_net<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        self.thread(&[("net", CloneFlags::CLONE_NEWNET)], f)
    }

    fn thread<R: Send>(&self, which: &[(&str, CloneFlags)], f: impl FnOnce() -> R + Send) -> R {
        let files: Vec<_> = which
            .iter()
            .map(|(name, flag)| (self.file(name).expect("namespace"), *flag))
            .collect();
        std::thread::scope(|scope| {
            let work = scope.spawn(move || {
                // A thread that shares its working directory may not change its mount namespace.
                unshare(CloneFlags::CLONE_FS).expect("unshare(CLONE_FS)");
                for (file, flag) in &files {
                    setns(file, *flag).expect("setns");
                }
                f()
            });
            match work.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// A path of the environment (`/run/…`) as the machine can open it.
    #[must_use]
    pub fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.holder.id()))
    }

    /// Every process of the environment, without its PID 1.
    #[must_use]
    pub fn processes(&self) -> Vec<Process> {
        // The procfs that is mounted inside shows just the PID namespace and those below it.
        let mut found = Vec::new();
        for entry in std::fs::read_dir(self.path("/proc"))
            .into_iter()
            .flatten()
            .flatten()
        {
            if let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>()
                && pid != 1
            {
                found.push(Process {
                    pid,
                    command: self.command(pid),
                });
            }
        }
        found
    }

    fn command(&self, pid: u32) -> String {
        let read = |file: &str| std::fs::read(self.path(&format!("/proc/{pid}/{file}")));
        let words = read("cmdline").unwrap_or_default();
        let text = if words.is_empty() {
            read("stat").unwrap_or_default()
        } else {
            words
        };
        String::from_utf8_lossy(&text)
            .trim_end_matches(['\0', '\n'])
            .replace('\0', " ")
    }

    /// Sends a signal to a process of the environment; one that is gone already is no error.
    pub fn kill(&self, pid: u32, signal: &str) {
        // kill(2) reads numbers in the caller's own PID namespace, so a child has to call it.
        let _ = self.enter(|| {
            Command::new("kill")
                .args(["-s", signal, &pid.to_string()])
                .stderr(Stdio::null())
                .status()
        });
    }

    /// The environment's mounts, as `target type source`.
    #[must_use]
    pub fn mounts(&self) -> Vec<String> {
        let table = std::fs::read_to_string(format!("/proc/{}/mountinfo", self.holder.id()));
        table
            .unwrap_or_default()
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split(' ').collect();
                let after = words.iter().position(|w| *w == "-").unwrap_or(0);
                let word = |i: usize| words.get(i).copied().unwrap_or("?");
                format!("{} {} {}", word(4), word(after + 1), word(after + 2))
            })
            .collect()
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        // Its init is killed with it. Not waited for: init only ends when every process of the
        // namespace is reaped, and a client that the test still holds is reaped after this.
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
