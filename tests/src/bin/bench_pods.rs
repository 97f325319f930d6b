//! The second part of `make bench-lab`: what a pod costs beside a container of runc's, by turns against
//! one containerd on real KVM. Adds `pods` to the `vmm.json` in the folder that it is given: start to
//! first output and to the end, exec, the same from a template, exits of a whole start, and what each
//! further pod takes in memory (shim, VMM, virtiofsd and the guest's memory together) and threads.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use sealpod_tests::{
    Env, Version,
    assets::{self, RUNC_RUNTIME, SEALPOD_RUNTIME},
    image::BUSYBOX,
    measure::{exec, forget_the_last_guest, start, timeline},
    stats::{memfd_pss_kib, percentile, smaps_kib},
};
use serde_json::{Value, json};

/// Programs of a pod, as their command lines show them.
const PROGRAMS: [(&str, &str); 4] = [
    ("shim", "containerd-shim-sealpod-v2"),
    ("sealpod-vmm", "sealpod-vmm"),
    ("qemu", "qemu-system"),
    ("virtiofsd", "virtiofsd"),
];
/// Pods beyond the first whose memory is measured.
const FURTHER: u32 = 3;
/// A guest reports freed memory within this; in the lab everything is slower.
const REPORTED: Duration = Duration::from_secs(15);
/// Starts of one side that may fail: a guest of the lab can reset itself (docs/lab.md). They are told, counted, and tried again.
const FAILURES: u32 = 2;
/// Pods whose memory shrinks by less are idle.
const SETTLED_KIB: u64 = 512;

/// What is compared.
struct Side {
    name: &'static str,
    runtime: &'static str,
    /// Pods go on from a template.
    template: bool,
    first_output: Vec<f64>,
    exit: Vec<f64>,
    exec: Vec<f64>,
    failed_starts: u32,
    /// What the shim noted of each start, ms after the pod was asked for.
    marks: BTreeMap<String, Vec<f64>>,
}

impl Side {
    fn new(name: &'static str, runtime: &'static str, template: bool) -> Self {
        Self {
            name,
            runtime,
            template,
            first_output: Vec::new(),
            exit: Vec::new(),
            exec: Vec::new(),
            failed_starts: 0,
            marks: BTreeMap::new(),
        }
    }

    /// One round; the first, 0, warms caches and makes the template, and is not counted.
    fn round(&mut self, env: &Env, round: usize) -> Result<()> {
        use_templates(env, self.template)?;
        let (first, exit) = loop {
            forget_the_last_guest();
            let id = env.id(&format!("{}{round}-{}", self.name, self.failed_starts));
            match start(env, self.runtime, &id) {
                Ok(times) => break times,
                Err(e) if self.failed_starts < FAILURES => {
                    self.failed_starts += 1;
                    eprintln!("{}: a start failed, and is tried again: {e:#}", self.name);
                }
                Err(e) => return Err(e),
            }
        };
        let exec = exec(env, &env.id(self.name), round)?;
        forget_the_last_guest();
        let marks = (self.runtime == SEALPOD_RUNTIME).then(|| timeline(env));
        if round == 0 {
            return Ok(());
        }
        self.first_output.push(first);
        self.exit.push(exit);
        self.exec.push(exec);
        if let Some(marks) = marks {
            let marks = marks.context("a start left no times")?;
            let asked = marks["requested_us"].as_f64().context("no request")?;
            for (mark, at) in marks.as_object().context("no marks")? {
                let name = mark.trim_end_matches("_us").to_owned();
                let at = at.as_f64().context("no time")?;
                self.marks.entry(name).or_default().push((at - asked) / 1e3);
            }
        }
        Ok(())
    }

    fn report(&self) -> Value {
        let mut report = json!({ "run_to_first_output": summary(&self.first_output),
            "run_to_exit": summary(&self.exit), "exec": summary(&self.exec),
            "failed_starts": self.failed_starts });
        if !self.marks.is_empty() {
            let marks = self.marks.iter().map(|(mark, at)| (mark, summary(at)));
            report["after_the_request"] = marks.collect();
        }
        report
    }
}

/// Pods that start from now on go on from a template, or boot.
fn use_templates(env: &Env, template: bool) -> Result<()> {
    let folder = env.folder().join("sealpod.toml.d");
    fs::create_dir_all(&folder)?;
    let text = format!("[hypervisor]\ntemplate = {template}\n");
    fs::write(folder.join("template.toml"), text)?;
    Ok(())
}

/// All processes of all pods, by program.
#[derive(Default, Clone, Copy)]
struct Usage {
    pss_kib: u64,
    guest_kib: u64,
    /// The programs' own, no file's.
    anonymous_kib: u64,
    threads: u64,
}

fn usage(env: &Env, mark: &str) -> Usage {
    let mut all = Usage::default();
    for process in env.processes(mark) {
        let dir = env.namespaces.path(&format!("/proc/{}", process.pid));
        all.pss_kib += smaps_kib(&dir, "Pss").unwrap_or(0);
        all.guest_kib += memfd_pss_kib(&dir);
        all.anonymous_kib += smaps_kib(&dir, "Pss_Anon").unwrap_or(0);
        all.threads += fs::read_dir(dir.join("task")).map_or(0, |t| t.count() as u64);
    }
    all
}

fn run_detached(env: &Env, runtime: &str, name: &str) -> Result<()> {
    let command = ["sleep", "10000"];
    let args = env.image_run_args(runtime, BUSYBOX, &["--detach"], &env.id(name), &command);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = env.run("ctr", &args);
    ensure!(done.code == 0, "{name} does not start: {}", done.text());
    Ok(())
}

/// What all pods use once they are idle: guests report what they have freed some seconds later.
fn idle(env: &Env) -> [Usage; PROGRAMS.len()] {
    let mut before = u64::MAX;
    loop {
        let all = PROGRAMS.map(|(_, mark)| usage(env, mark));
        let sum: u64 = all.iter().map(|usage| usage.pss_kib).sum();
        if sum + SETTLED_KIB > before {
            return all;
        }
        before = sum;
        std::thread::sleep(REPORTED);
    }
}

/// What each pod beyond the first takes.
fn further_pods(env: &Env) -> Result<Value> {
    run_detached(env, SEALPOD_RUNTIME, "m0")?;
    let one = idle(env);
    for n in 1..=FURTHER {
        run_detached(env, SEALPOD_RUNTIME, &format!("m{n}"))?;
    }
    let all = idle(env);
    for n in 0..=FURTHER {
        env.ctr_remove(&env.id(&format!("m{n}")));
    }
    let share = |more: u64, less: u64| more.saturating_sub(less) as f64 / f64::from(FURTHER);
    let mut parts = serde_json::Map::new();
    let (mut sum, mut guest) = (0.0, 0.0);
    for ((name, _), (one, all)) in PROGRAMS.iter().zip(one.iter().zip(&all)) {
        if all.threads == 0 {
            continue;
        }
        let pss = share(all.pss_kib, one.pss_kib);
        let in_guest = share(all.guest_kib, one.guest_kib);
        sum += pss;
        guest += in_guest;
        let own = (pss - in_guest).round();
        let anonymous = share(all.anonymous_kib, one.anonymous_kib).round();
        let threads = share(all.threads, one.threads);
        parts.insert(
            (*name).into(),
            json!({ "own_kib": own, "anonymous_kib": anonymous, "threads": threads }),
        );
    }
    Ok(json!({ "pss_kib": f64::round(sum), "guest_kib": f64::round(guest), "parts": parts }))
}

/// What KVM counts of a VM (its debugfs; a name that a kernel does not have is left out).
const COUNTED: [&str; 6] = [
    "exits",
    "mmio_exits",
    "io_exits",
    "halt_exits",
    "irq_exits",
    "pf_taken",
];

/// What KVM has counted of the one VM that runs.
fn counted() -> Result<Value> {
    let mut vms = fs::read_dir("/sys/kernel/debug/kvm")?.flatten();
    let vm = vms.find(|e| e.path().is_dir()).context("no VM runs")?;
    let read = |name| {
        let text = fs::read_to_string(vm.path().join(name)).ok()?;
        Some((name, text.trim().parse::<u64>().ok()?))
    };
    let counts: BTreeMap<_, _> = COUNTED.into_iter().filter_map(read).collect();
    ensure!(counts.contains_key("exits"), "KVM does not count exits");
    Ok(json!(counts))
}

/// From the start of a pod until its container runs.
fn counted_of_a_start(env: &Env) -> Result<Value> {
    run_detached(env, SEALPOD_RUNTIME, "exits")?;
    let counts = counted();
    env.ctr_remove(&env.id("exits"));
    counts
}

fn summary(samples: &[f64]) -> Value {
    let round = |x: f64| (x * 10.0).round() / 10.0;
    json!({ "p50_ms": round(percentile(samples, 0.5)), "p95_ms": round(percentile(samples, 0.95)) })
}

fn measure(env: &Env, rounds: usize) -> Result<Value> {
    let mut sides = [
        Side::new("runc", RUNC_RUNTIME, false),
        Side::new("sealpod", SEALPOD_RUNTIME, false),
        Side::new("sealpod-template", SEALPOD_RUNTIME, true),
    ];
    for side in &sides {
        use_templates(env, side.template)?;
        run_detached(env, side.runtime, side.name)?;
    }
    for round in 0..=rounds {
        eprintln!("round {round} of {rounds}");
        for side in &mut sides {
            side.round(env, round)?;
        }
    }
    for side in &sides {
        env.ctr_remove(&env.id(side.name));
    }
    let [runc, boot, template] = &sides;
    use_templates(env, false)?;
    let counts = counted_of_a_start(env)?;
    let further = further_pods(env)?;
    // Here the guest's memory is the VMM's own, and the template's page cache.
    use_templates(env, true)?;
    let counts_template = counted_of_a_start(env)?;
    let further_templates = further_pods(env)?;
    let ratio =
        |a: &[f64], b: &[f64]| (percentile(a, 0.5) / percentile(b, 0.5) * 100.0).round() / 100.0;
    let marked = |mark: &str| ratio(&template.marks[mark], &boot.marks[mark]);
    let goals = json!({
        "start_to_runc (3.3)": ratio(&boot.first_output, &runc.first_output),
        "exec_to_runc": ratio(&boot.exec, &runc.exec),
        "further_pod_kib (44922)": further["pss_kib"],
        "template_agent_ready_to_boot (0.2)": marked("agent_ready"),
        "template_started_to_boot (0.35)": marked("container_started"),
        "template_first_output_to_boot": ratio(&template.first_output, &boot.first_output),
    });
    let mut report = json!({ "rounds": rounds, "counts_of_a_start": counts,
        "counts_of_a_start from a template": counts_template, "further_pod": further,
        "further_pod from a template": further_templates, "goals": goals });
    for side in &sides {
        report[side.name] = side.report();
    }
    Ok(report)
}

fn main() -> Result<()> {
    let folder = std::env::args()
        .nth(1)
        .context("usage: bench_pods FOLDER")?;
    let file = Path::new(&folder).join("vmm.json");
    let rounds = std::env::var("SEALPOD_BENCH_ROUNDS").map_or(Ok(5), |r| r.parse())?;
    assets::complete()?;
    let env = Env::new(Version::V1_7)?;
    let pods = measure(&env, rounds)?;
    println!("{pods:#}");
    let mut report: Value = match fs::read(&file) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| file.display().to_string())?,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => json!({}),
        Err(e) => return Err(e).with_context(|| file.display().to_string()),
    };
    report["pods"] = pods;
    fs::create_dir_all(PathBuf::from(folder))?;
    fs::write(&file, format!("{report:#}\n"))?;
    Ok(())
}
