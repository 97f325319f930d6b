//! Tests with real processes. The ones that need root say so when they skip.

use super::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::process::{Command as StdCommand, Stdio};

/// Ends a process that allocates between clone and exec: the heap's lock may be held for ever there.
/// A child is known by its pid, which is not that of the process that allocated first.
struct ParentOnly;

#[global_allocator]
static HEAP: ParentOnly = ParentOnly;

impl ParentOnly {
    fn check(&self) {
        use std::sync::atomic::{AtomicU32, Ordering};
        static PARENT: AtomicU32 = AtomicU32::new(0);
        let pid = std::process::id();
        let first = PARENT.compare_exchange(0, pid, Ordering::Relaxed, Ordering::Relaxed);
        if first.is_err_and(|parent| parent != pid) {
            std::process::abort();
        }
    }
}

#[expect(unsafe_code, reason = "an allocator is one by an unsafe trait")]
// SAFETY: hands everything to the system's allocator, unchanged.
unsafe impl GlobalAlloc for ParentOnly {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.check();
        // SAFETY: forwarded from the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        self.check();
        // SAFETY: forwarded from the caller.
        unsafe { System.dealloc(block, layout) }
    }
}

fn ledger() -> (tempfile::TempDir, Ledger) {
    let base = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(&base.path().join("pod")).unwrap();
    (base, ledger)
}

fn sh(script: &str) -> Command {
    let mut command = Command::new("test", Path::new("/bin/sh"));
    command.arg("-c").arg(script);
    command
}

fn root_or_skip() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root");
    }
    root
}

#[tokio::test]
async fn exit_and_output_of_a_child_are_seen_and_it_leaves_no_zombie() {
    let (base, ledger) = ledger();
    let child = spawn(sh("echo out; echo err >&2; exit 7"), &ledger)
        .await
        .unwrap();
    assert_eq!(child.wait().await, Exit::Code(7));
    assert_eq!(child.wait().await, Exit::Code(7));
    assert_eq!(child.watch().output(), ["out", "err"]);
    assert_eq!(crate::ledger::start_time(child.pid()), None);
    // Nothing is held any more: cleaning finds nothing to kill.
    let report = crate::ledger::clean(&base.path().join("pod"));
    assert_eq!(report.undone.len(), 1, "{report:?}");
}

#[tokio::test]
async fn a_dropped_child_is_killed_and_reaped() {
    let (_base, ledger) = ledger();
    let child = spawn(sh("exec sleep 1000"), &ledger).await.unwrap();
    let watch = child.watch();
    drop(child);
    assert_eq!(watch.wait().await, Exit::Signal(libc::SIGKILL));
}

#[tokio::test]
async fn a_missing_program_is_named() {
    let (_base, ledger) = ledger();
    let command = Command::new("vmm", Path::new("/nonexistent/vmm"));
    let error = spawn(command, &ledger).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "Program /nonexistent/vmm of vmm cannot be run"
    );
    let command = Command::new("vmm", Path::new("/etc/passwd"));
    assert!(matches!(
        spawn(command, &ledger).await.unwrap_err(),
        ChildError::Program { .. }
    ));
}

#[tokio::test]
async fn a_child_has_the_descriptors_it_was_given_and_no_others() {
    let (_base, ledger) = ledger();
    let (a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
    let _open_elsewhere = std::fs::File::open("/dev/null").unwrap();
    let mut command = sh("ls /proc/self/fd | tr '\\n' ' '; echo over-$0 >&3");
    let number = command.fd(a.into());
    command.arg(number.to_string());
    assert_eq!(number, 3);
    let child = spawn(command, &ledger).await.unwrap();
    assert_eq!(child.wait().await, Exit::Code(0));
    // 4 is ls's own, on the folder.
    assert_eq!(child.watch().output(), ["0 1 2 3 4"]);
    let mut text = String::new();
    std::io::Read::read_to_string(&mut b, &mut text).unwrap();
    assert_eq!(text, "over-3\n");
}

#[tokio::test]
async fn the_environment_does_not_pass_but_for_what_is_given() {
    let (_base, ledger) = ledger();
    let mut command = sh("env | grep -v -e ^PATH= -e ^PWD= -e ^_=");
    command.env(SMALL_STACKS);
    let child = spawn(command, &ledger).await.unwrap();
    assert_eq!(child.wait().await, Exit::Code(0));
    assert_eq!(child.watch().output(), ["RUST_MIN_STACK=524288"]);
}

#[tokio::test]
async fn a_jailed_child_sees_its_root_only_and_holds_no_privilege() {
    if !root_or_skip() {
        return;
    }
    let (base, ledger) = ledger();
    let root = base.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let given = base.path().join("given");
    std::fs::write(&given, "hello").unwrap();
    let mut jail = Jail::new(&root);
    jail.file(&given, "/given").proc().device("/dev/null", 1, 3);
    let mut command = Command::new("test", Path::new("/usr/bin/sh"));
    let script = "ls -x /; cat /given; echo; id -u; id -g; echo $$; \
        grep -E 'Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status | tr -d '\\n\\t'; echo; \
        touch /x 2>/dev/null || echo sealed; ls -ln /dev/null | cut -c1-14; ulimit -n";
    command.arg("-c").arg(script);
    command.jail(jail).user(64_000, 64_001);
    command.rlimit(libc::RLIMIT_NOFILE, 77);
    let child = spawn(command, &ledger).await.unwrap();
    assert_eq!(
        child.wait().await,
        Exit::Code(0),
        "{:?}",
        child.watch().output()
    );
    let lines = child.watch().output();
    assert!(
        lines[0].contains("given") && !lines[0].contains("home"),
        "{lines:?}"
    );
    assert_eq!(lines[1..5], ["hello", "64000", "64001", "1"]);
    let none = "0000000000000000";
    let status = format!("CapPrm:{none}CapEff:{none}CapBnd:{none}CapAmb:{none}NoNewPrivs:1");
    assert_eq!(lines[5], status);
    assert_eq!(lines[6..], ["sealed", "crw------- 1 6", "77"]);
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
}

#[tokio::test]
async fn a_failing_step_is_named() {
    if !root_or_skip() {
        return;
    }
    let (base, ledger) = ledger();
    let mut jail = Jail::new(&base.path().join("pod"));
    jail.file(Path::new("/nonexistent/kernel"), "/kernel");
    let mut command = sh("true");
    command.jail(jail);
    let error = spawn(command, &ledger).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "test could not be started: bind \"/nonexistent/kernel\" into its root"
    );
}

/// The test binary runs itself as a process that starts a child and is then killed.
#[tokio::test]
async fn killing_the_parent_kills_a_child_that_changed_its_user() {
    const ROLE: &str = "SEALPOD_TEST_PARENT";
    let me = std::env::current_exe().unwrap();
    if std::env::var_os(ROLE).is_some() {
        let (_base, ledger) = ledger();
        let mut command = sh("exec sleep 1000");
        if rustix::process::geteuid().is_root() {
            command.user(64_000, 64_000);
        }
        let child = spawn(command, &ledger).await.unwrap();
        println!("child={}", child.pid());
        std::future::pending::<()>().await;
    }
    let name = "killing_the_parent_kills_a_child_that_changed_its_user";
    let mut parent = StdCommand::new(me)
        .args(["--nocapture", name])
        .env(ROLE, "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = std::io::BufReader::new(parent.stdout.take().unwrap());
    let pid: i32 = loop {
        let mut line = String::new();
        assert_ne!(std::io::BufRead::read_line(&mut out, &mut line).unwrap(), 0);
        if let Some((_, pid)) = line.split_once("child=") {
            break pid.trim().parse().unwrap();
        }
    };
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::NONBLOCK).unwrap();
    let ended = spawner::watch(Arc::new(pidfd)).unwrap();
    parent.kill().unwrap();
    parent.wait().unwrap();
    let seen = tokio::time::timeout(Duration::from_secs(10), ended.readable()).await;
    drop(seen.expect("the child outlived its parent").unwrap());
}

#[tokio::test]
async fn what_a_child_writes_is_in_the_log_up_to_a_bound() {
    let log = tempfile::NamedTempFile::new().unwrap();
    // The log of the whole process, so of other tests too: what only this thread has, others can keep from it.
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(Mutex::new(log.reopen().unwrap()))
        .init();
    let (_base, ledger) = ledger();
    let script = "for n in $(seq 64); do echo line $n; done; echo too much >&2; exit 3";
    let mut command = sh(script);
    command.name = "talker".into();
    let child = spawn(command, &ledger).await.unwrap();
    assert_eq!(child.wait().await, Exit::Code(3));
    let log = std::fs::read_to_string(log.path()).unwrap();
    let lines: Vec<_> = log.lines().filter(|line| line.contains("talker")).collect();
    assert_eq!(lines.len(), 65, "{log}");
    assert!(lines[0].ends_with("talker: line 1"), "{log}");
    assert!(lines[63].ends_with("talker: line 64"), "{log}");
    assert!(
        lines[64].ends_with("Further lines of talker are not logged"),
        "{log}"
    );
    assert_eq!(child.watch().output().last().unwrap(), "too much");
}
