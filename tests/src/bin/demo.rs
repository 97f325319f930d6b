//! `make demo`: one container in a VM of its own, shown step by step, then what it took. All of it runs
//! in a private environment and is gone at the end.

use std::{
    io::{BufRead, BufReader},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};
use sealpod_tests::{
    Env, Version, assets,
    attest::{CONTENT, DEVICE},
    image, measure,
    stats::smaps_kib,
    wait,
};
use serde_json::Value;

fn step(text: &str) {
    println!("\n\x1b[1m{text}\x1b[0m");
}

fn show(command: &str, output: &str) {
    println!("  $ {command}");
    for line in output.lines() {
        println!("    {line}");
    }
}

fn main() -> Result<()> {
    let version = Version::parse(&std::env::args().nth(1).unwrap_or_else(|| "1.7".into()))?;
    assets::complete()?;
    let runtime = assets::runtime();

    step(&format!(
        "A private containerd {} and an image built on the spot",
        version.number()
    ));
    let env = Env::new(version)?;
    println!(
        "  state below {}, image {}",
        env.folder().display(),
        image::BUSYBOX
    );

    step("A container with runtime io.containerd.sealpod.v2");
    let id = env.id("demo");
    let words = ["sh", "-c", "uname -a; exec httpd -f -p 80 -h /www"];
    let args = env.image_run_args(&runtime, image::BUSYBOX, &["--rm", "--cni"], &id, &words);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    println!(
        "  $ ctr run --rm --cni --runtime {runtime} {} demo {}",
        image::BUSYBOX,
        words.join(" ")
    );
    let asked = boottime_ns();
    let begin = Instant::now();
    let mut container = env.spawn("ctr", &args);
    let mut inside = String::new();
    if let Some(out) = container.stdout.take() {
        // Nothing read is told below.
        let _ = BufReader::new(out).read_line(&mut inside);
    }
    let first_output = begin.elapsed();
    if inside.is_empty() {
        let done = container.wait_with_output()?;
        bail!(
            "The container did not start: {}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    step("It is another kernel");
    show("uname -a                  (inside)", &inside);
    show(
        "uname -a                  (outside)",
        &env.run("uname", &["-a"]).stdout,
    );

    step("Exec into it");
    let begin = Instant::now();
    let done = env
        .ctr_exec(
            &id,
            "look",
            &[
                "sh",
                "-c",
                "cat /proc/1/cmdline | tr '\\0' ' '; echo; nproc; free -m | head -2",
            ],
        )
        .ok();
    let exec = begin.elapsed();
    show("ctr task exec demo ...", &done.stdout);

    step("One HTTP request over the CNI network");
    let address = (env.pod_address(&id), 80).into();
    let page = wait::until("the page", Duration::from_secs(10), || {
        env.http_get(address).ok()
    });
    show(
        &format!("GET http://{address}/"),
        page.lines().last().unwrap_or_default(),
    );

    let table = Table::collect(&env, asked, first_output, exec);

    step("Removed again");
    let _ = env.ctr(&["task", "kill", "-s", "KILL", &id]).ok();
    let _ = container.wait();
    let left = env.leaks();
    println!(
        "  processes, mounts, interfaces, cgroups and files left: {}",
        left.len()
    );
    for line in &left {
        println!("    {line}");
    }
    table.print();
    gates(version)
}

/// The two gates: a device released after attestation, a pod refused, the audit log verified.
fn gates(version: Version) -> Result<()> {
    step("A node with a simulated TEE, and a device that only affirmed pods get");
    let env = Env::attesting(version)?;
    println!("  reference values by `sealpod measure`, authority by `sealpod-attest simulate`");
    let device = format!("io.sealpod.attestation.devices={DEVICE}");
    let read = format!("head -c {} /dev/gpu0", CONTENT.len());
    let options = ["--annotation", &device];

    step(
        "A pod that asks for the device: attested, admitted by both gates, and the device used inside",
    );
    let begin = Instant::now();
    let id = env.id("gpu");
    env.ctr_start(&options, &id, &["sleep", "600"]);
    println!("  $ ctr run --detach --annotation {device} ... sleep 600");
    println!(
        "    {} ms from request to start",
        begin.elapsed().as_millis()
    );
    let done = env.ctr_exec(&id, "read", &["sh", "-c", &read]).ok();
    show(&format!("ctr task exec ... {read}"), &done.stdout);
    show_gate(&measure::marks(&env).unwrap_or_default());
    env.ctr_remove(&id);

    step("The same pod with one more word on its kernel's command line: another measurement");
    let more = "io.sealpod.kernel_params=one.more=word";
    let options = [&options[..], &["--annotation", more]].concat();
    let done = env.ctr_run(&options, &env.id("other"), &["sh", "-c", &read]);
    if done.code == 0 {
        bail!("The pod was not refused");
    }
    show(&format!("ctr run --annotation {more} ..."), &done.stderr);

    step("What was decided, and that nobody changed it since");
    for log in env.audit_logs() {
        let log = log.to_string_lossy();
        let args = ["audit", "show", "--key", &env.verifier_key(), &log];
        show(
            "sealpod-attest audit show",
            &env.run("sealpod-attest", &args).ok().stdout,
        );
    }
    Ok(())
}

/// What the gates took of a start, beyond what the guest took for its evidence and QEMU for the device.
fn show_gate(timeline: &Value) {
    let ms = |part: &str| timeline.get(part).and_then(Value::as_u64).unwrap_or(0) / 1_000_000;
    let [whole, evidence, attach] = [
        "gate_took_ns",
        "gate_evidence_took_ns",
        "gate_attach_took_ns",
    ]
    .map(ms);
    println!(
        "  of that {whole} ms for the gates: evidence {evidence}, the device {attach}, all else {} ms",
        whole.saturating_sub(evidence + attach)
    );
}

/// CLOCK_BOOTTIME, as the shim's timeline uses it.
fn boottime_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    let time = time.map_or(Duration::ZERO, Duration::from);
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// What the demo ends with.
struct Table {
    stages: Vec<(&'static str, Option<f64>)>,
    memory: Vec<(&'static str, Option<u64>)>,
}

impl Table {
    fn collect(env: &Env, asked: u64, first_output: Duration, exec: Duration) -> Self {
        let marks = measure::marks(env).unwrap_or_default();
        #[expect(clippy::cast_precision_loss, reason = "milliseconds for people")]
        let at = |name: &str| {
            let ns = marks.get(name)?.as_u64()?;
            Some(ns.saturating_sub(asked) as f64 / 1e6)
        };
        let stages = vec![
            ("shim start", at("shim_start_ns")),
            ("VM created", at("vm_created_ns")),
            ("kernel up", at("kernel_up_ns")),
            ("agent ready", at("agent_ready_ns")),
            ("container started", at("container_started_ns")),
            ("first output", Some(first_output.as_secs_f64() * 1e3)),
            ("one exec, by itself", Some(exec.as_secs_f64() * 1e3)),
        ];
        let pss = |mark: &str| {
            let pids = env.processes(mark);
            let dirs = pids
                .iter()
                .map(|p| env.namespaces.path(&format!("/proc/{}", p.pid)));
            let sum: u64 = dirs.filter_map(|dir: PathBuf| smaps_kib(&dir, "Pss")).sum();
            (sum > 0).then_some(sum)
        };
        let memory = vec![
            ("shim", pss("containerd-shim-sealpod-v2")),
            ("VM, with the guest's memory", pss("qemu-system-x86_64")),
            ("virtiofsd", pss("virtiofsd")),
        ];
        Self { stages, memory }
    }

    fn print(&self) {
        println!("\n\x1b[1mTimes since the request, and memory on the host (PSS)\x1b[0m");
        for (name, ms) in &self.stages {
            match ms {
                Some(ms) => println!("  {name:<30}{ms:>9.0} ms"),
                None => println!("  {name:<30}        -"),
            }
        }
        for (name, kib) in &self.memory {
            match kib {
                Some(kib) => println!("  {name:<30}{:>9.1} MiB", *kib as f64 / 1024.0),
                None => println!("  {name:<30}        -"),
            }
        }
    }
}
