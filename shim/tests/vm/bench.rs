//! What the tests start VMs with: a pod folder, a ledger, and guests made of busybox and a script.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealpod_shim::host_cgroup::Entrance;
use sealpod_shim::ledger::{Ledger, clean};
use sealpod_shim::vm::{
    Accelerator, Builtin, Driver, Qemu, Vm, VmConfig, VmExit, choose_accelerator, find_program,
};

/// How long a guest may take to say something, on a busy machine without KVM.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the agent does where nothing tells of devices (virtio-mmio): `look` finds those that came later,
/// `let_go` of a disk that the host will take.
const LOOK: &str = "look() { for d in /sys/bus/platform/devices/virtio-mmio.*; do
    [ -e $d/driver ] || echo ${d##*/} > /sys/bus/platform/drivers/virtio-mmio/bind
    done 2>/dev/null; }
    let_go() { for d in /sys/bus/platform/devices/virtio-mmio.*; do
    ! ls -d $d/virtio*/block/$1 || echo ${d##*/} > /sys/bus/platform/drivers/virtio-mmio/unbind
    done >/dev/null 2>&1; }";

pub(crate) struct Bench {
    base: tempfile::TempDir,
    pub(crate) ledger: Ledger,
    initramfs: PathBuf,
}

pub(crate) fn guest_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/guest")
        .join(name)
}

/// sealpod-vmm, where the environment names one (`tests/lab/tests.sh` does); else QEMU is tested.
pub(crate) fn builtin() -> Option<PathBuf> {
    std::env::var_os("SEALPOD_TEST_VMM").map(PathBuf::from)
}

/// The driver that is tested.
pub(crate) fn driver() -> &'static dyn Driver {
    if builtin().is_some() { &Builtin } else { &Qemu }
}

pub(crate) fn skip(reason: &str) -> Option<Bench> {
    eprintln!("SKIPPED: {reason}");
    None
}

pub(crate) fn run(program: &str, args: &[&str]) {
    let status = Command::new(program).args(args).status().unwrap();
    assert!(status.success(), "{program} {args:?}");
}

/// Waits until a line of the console is `wanted`.
pub(crate) async fn line(vm: &Arc<dyn Vm>, wanted: &str) {
    let until = Instant::now() + PATIENCE;
    while !vm.console_tail().iter().any(|l| l == wanted) {
        assert!(
            Instant::now() < until,
            "no {wanted:?} in {:?}",
            vm.console_tail()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Waits until the VM has ended.
pub(crate) async fn ended(vm: &Arc<dyn Vm>) -> VmExit {
    let ended = tokio::time::timeout(PATIENCE, vm.wait()).await;
    ended.unwrap_or_else(|_| panic!("it does not end: {:?}", vm.console_tail()))
}

impl Bench {
    /// `None`, and a line that says why, where no VM can run. Its guest is the one that ends at once.
    pub(crate) fn new() -> Option<Self> {
        let files = [guest_file("vmlinux"), guest_file("floor.cpio")];
        if !rustix::process::geteuid().is_root() {
            return skip("needs root");
        }
        if let Some(missing) = files.iter().find(|f| !f.exists()) {
            return skip(&format!("{} is not built", missing.display()));
        }
        if find_program(Path::new("qemu-system-x86_64")).is_err() {
            return skip("needs qemu-system-x86_64");
        }
        let base = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(&base.path().join("pod")).unwrap();
        let [_, initramfs] = files;
        Some(Self {
            base,
            ledger,
            initramfs,
        })
    }

    /// A bench whose guest runs `script` with busybox's shell as its init.
    pub(crate) fn with_guest(script: &str) -> Option<Self> {
        let Ok(busybox) = find_program(Path::new("busybox")) else {
            return skip("needs a static busybox");
        };
        let mut bench = Self::new()?;
        let init = format!(
            "#!/bin/busybox sh\nexport PATH=/bin\nbusybox mkdir -p /proc /sys /dev /mnt\n\
             busybox mount -t proc p /proc; busybox --install -s /bin\n\
             mount -t sysfs s /sys; mount -t devtmpfs d /dev\n{LOOK}\n{script}\n"
        );
        let busybox = std::fs::read(busybox).unwrap();
        let archive = cpio(&[
            ("bin", 0o040_755, b""),
            ("dev", 0o040_755, b""),
            ("bin/busybox", 0o100_755, &busybox),
            ("init", 0o100_755, init.as_bytes()),
        ]);
        bench.initramfs = bench.file("guest.cpio", &archive);
        Some(bench)
    }

    pub(crate) fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.base.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// `init` is what the init that ends at once is told.
    pub(crate) fn config(&self, init: &str) -> VmConfig {
        VmConfig {
            dir: self.ledger.dir().into(),
            program: builtin().unwrap_or_else(|| "qemu-system-x86_64".into()),
            kernel: guest_file("vmlinux"),
            initramfs: self.initramfs.clone(),
            kernel_params: vec!["--".into(), init.into()],
            vcpus: 1,
            memory_mib: 96,
            share: None,
            nics: Vec::new(),
            passed: Vec::new(),
            cgroup: Entrance::default(),
            hotplug_ports: 1,
            // A busy lab's KVM looks like an emulated one, and sealpod-vmm has nothing else.
            accelerator: choose_accelerator(builtin().map(|_| Accelerator::Kvm), self.base.path()),
            confidential: None,
            user: 64_777,
        }
    }

    pub(crate) async fn start(&self, init: &str) -> Arc<dyn Vm> {
        driver()
            .start(self.config(init), &self.ledger)
            .await
            .unwrap()
    }

    /// Starts the guest of [`Bench::with_guest`].
    pub(crate) async fn start_guest(&self, change: impl FnOnce(&mut VmConfig)) -> Arc<dyn Vm> {
        let mut config = self.config("");
        config.kernel_params.clear();
        change(&mut config);
        driver().start(config, &self.ledger).await.unwrap()
    }

    /// Nothing may be left once the VM is gone.
    pub(crate) fn finish(self) {
        let dir = self.ledger.dir().to_path_buf();
        let report = clean(&dir);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.undone.len(), 1, "{report:?}");
        assert!(!dir.exists());
    }
}

/// A "newc" archive (cpio(5)) of `(name, mode, content)`.
fn cpio(files: &[(&str, u32, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    let end = [("TRAILER!!!", 0, &b""[..])];
    for (number, (name, mode, content)) in files.iter().chain(&end).enumerate() {
        let fields = [
            u32::try_from(number).unwrap() + 1,
            *mode,
            0,
            0,
            1,
            0,
            u32::try_from(content.len()).unwrap(),
            0,
            0,
            0,
            0,
            u32::try_from(name.len()).unwrap() + 1,
            0,
        ];
        archive.write_all(b"070701").unwrap();
        for field in fields {
            write!(archive, "{field:08x}").unwrap();
        }
        archive.extend_from_slice(name.as_bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend_from_slice(content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}
