//! The QEMU driver with a real VM: skips, loudly, where QEMU, root or the guest's kernel is missing.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sealpod_shim::ledger::{Ledger, clean};
use sealpod_shim::vm::{
    Disk, Driver, ExitReason, Qemu, Vm, VmConfig, VmError, choose_accelerator, find_program,
};

struct Bench {
    base: tempfile::TempDir,
    ledger: Ledger,
}

fn guest_file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../target/guest")
        .join(name)
}

impl Bench {
    /// `None`, and a line that says why, where no VM can run.
    fn new() -> Option<Self> {
        let missing = [guest_file("vmlinux"), guest_file("floor.cpio")]
            .into_iter()
            .find(|f| !f.exists());
        let reason = if !rustix::process::geteuid().is_root() {
            "needs root".to_owned()
        } else if let Some(file) = missing {
            format!("{} is not built", file.display())
        } else if find_program(Path::new("qemu-system-x86_64")).is_err() {
            "needs qemu-system-x86_64".to_owned()
        } else {
            let base = tempfile::tempdir().unwrap();
            let ledger = Ledger::open(&base.path().join("pod")).unwrap();
            return Some(Self { base, ledger });
        };
        eprintln!("SKIPPED: {reason}");
        None
    }

    /// `init` is what the floor's init is told to do.
    fn config(&self, init: &str) -> VmConfig {
        VmConfig {
            dir: self.ledger.dir().into(),
            program: "qemu-system-x86_64".into(),
            kernel: guest_file("vmlinux"),
            initramfs: guest_file("floor.cpio"),
            kernel_params: vec!["--".into(), init.into()],
            vcpus: 1,
            memory_mib: 96,
            share: None,
            nics: Vec::new(),
            netns: None,
            cgroup: Vec::new(),
            hotplug_ports: 1,
            accelerator: choose_accelerator(None, self.base.path()),
            user: 64_777,
        }
    }

    async fn start(&self, init: &str) -> Arc<dyn Vm> {
        Qemu.start(self.config(init), &self.ledger).await.unwrap()
    }

    /// Nothing may be left once the VM is gone.
    fn finish(self) {
        let dir = self.ledger.dir().to_path_buf();
        let report = clean(&dir);
        assert!(report.is_clean(), "{report:?}");
        assert_eq!(report.undone.len(), 1, "{report:?}");
        assert!(!dir.exists());
    }
}

/// `Driver::start` does not give anything that can be printed.
fn error(result: Result<Arc<dyn Vm>, VmError>) -> VmError {
    match result {
        Ok(_) => panic!("the VM started"),
        Err(e) => e,
    }
}

#[tokio::test]
async fn a_guest_that_ends_itself_is_seen_to_have_ended() {
    let Some(bench) = Bench::new() else { return };
    let start = Instant::now();
    let vm = bench.start("tsc").await;
    let exit = vm.wait().await;
    eprintln!("from start to end: {:?}; {exit}", start.elapsed());
    assert_eq!(exit.reason, ExitReason::Guest);
    assert!(
        exit.console.iter().any(|l| l.contains("init tsc")),
        "{exit}"
    );
    assert_eq!(vm.wait().await, exit);
    vm.stop().await;
    assert!(matches!(vm.pause().await, Err(VmError::Ended)));
    drop(vm);
    bench.finish();
}

#[tokio::test]
async fn a_panic_is_the_reason_and_its_line_is_told() {
    let Some(bench) = Bench::new() else { return };
    let vm = bench.start("panic").await;
    let exit = vm.wait().await;
    let ExitReason::Panic(message) = &exit.reason else {
        panic!("{exit}");
    };
    assert!(message.contains("Attempted to kill init"), "{exit}");
    vm.stop().await;
    drop(vm);
    bench.finish();
}
