//! `make bench`: what a start, an exec and a pod cost, sealpod and runc by turns in one run, and whether
//! the goals are met. Writes `target/bench/start.json`; `SEALPOD_BENCH_ROUNDS` sets the rounds.

use std::{
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use sealpod_tests::{
    Env, Version,
    assets::{self, RUNC_RUNTIME, SEALPOD_RUNTIME},
    cri::Cri,
    image::BUSYBOX,
    measure::{exec, ms, start, timeline},
    stats::{memfd_pss_kib, percentile, smaps_kib},
};
use serde_json::{Value, json};

/// Milliseconds of each round, by what was measured.
#[derive(Default)]
struct Samples {
    exit: Vec<f64>,
    first_output: Vec<f64>,
    exec: Vec<f64>,
}

/// What the running pod's QEMU was started with: machine, processor and kernel command line.
fn vm_arguments(env: &Env) -> Result<Vec<String>> {
    let vm = env.processes("qemu-system").pop().context("no VM runs")?;
    let words = std::fs::read_to_string(env.namespaces.path(&format!("/proc/{}/cmdline", vm.pid)))?;
    let words: Vec<&str> = words.split('\0').collect();
    let mut kept = Vec::new();
    for pair in words.windows(2) {
        if ["-machine", "-accel", "-cpu", "-smp", "-bios", "-append"].contains(&pair[0]) {
            // The floor has a plain memory of its own.
            kept.extend([
                pair[0].to_owned(),
                pair[1].replace("memory-backend=mem,", ""),
            ]);
        }
    }
    Ok(kept)
}

/// The same kernel and QEMU, no devices, with an init that ends the VM at once.
fn floor(arguments: &[String]) -> Result<f64> {
    let guest = assets::target().join("guest");
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-m",
            "256",
        ])
        .args(arguments)
        .arg("-kernel")
        .arg(guest.join("vmlinux"))
        .arg("-initrd")
        .arg(guest.join("floor.cpio"))
        .args(["-serial", "stdio"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let begin = Instant::now();
    let status = command.status().context("QEMU")?;
    ensure!(status.success(), "QEMU ended with {status}");
    Ok(ms(begin))
}

fn summary(samples: &[f64]) -> Value {
    let round = |x: f64| (x * 10.0).round() / 10.0;
    json!({ "p50_ms": round(percentile(samples, 0.5)), "p95_ms": round(percentile(samples, 0.95)),
        "rounds": samples.len() })
}

/// Memory of one idle pod, seen from the host and from inside.
fn memory(env: &mut Env) -> Result<Value> {
    // A container without a PID namespace of its own sees the guest's, where the agent is process 1.
    let read = "grep VmRSS /proc/1/status | tr -dc 0-9";
    let agent = env.ctr_run_spec(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|n| n["type"] != "pid");
        }
        spec["process"]["args"] = json!(["sh", "-c", read]);
    });
    let agent: u64 = agent.stdout.trim().parse().with_context(|| agent.text())?;
    let cri = Cri::connect(env)?;
    let pod = cri.run_pod("memory", |_| {})?;
    let container = cri.run(&pod, "c", |_| {})?;
    let kib = |script: &str| -> Result<u64> {
        cri.sh(&container, script)
            .trim()
            .parse()
            .context(script.to_owned())
    };
    let used = "awk '/MemTotal/ {t=$2} /MemAvailable/ {a=$2} END {print t-a}' /proc/meminfo";
    let used = kib(used)?;
    let total = kib("awk '/MemTotal/ {print $2}' /proc/meminfo")?;
    let pss = |mark: &str| -> (u64, u64, usize) {
        let all = env.processes(mark);
        let dirs = all
            .iter()
            .map(|p| env.namespaces.path(&format!("/proc/{}", p.pid)));
        let sum = dirs.fold((0, 0), |(pss, guest), dir| {
            (
                pss + smaps_kib(&dir, "Pss").unwrap_or(0),
                guest + memfd_pss_kib(&dir),
            )
        });
        (sum.0, sum.1, all.len())
    };
    let (shim, vm, files) = (
        pss("containerd-shim-sealpod-v2"),
        pss("qemu-system"),
        pss("virtiofsd"),
    );
    cri.remove_pod(&pod)?;
    Ok(json!({
        "shim_pss_kib": shim.0.saturating_sub(shim.1), "shim_mapped_guest_kib": shim.1,
        "vm_pss_kib": vm.0, "vm_pss_beyond_guest_kib": vm.0.saturating_sub(vm.1),
        "virtiofsd_pss_kib": files.0.saturating_sub(files.1),
        "processes": shim.2 + vm.2 + files.2,
        "agent_rss_kib": agent, "guest_used_kib": used, "guest_total_kib": total,
    }))
}

fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |m| m.len())
}

fn main() -> Result<()> {
    let version = Version::parse(&std::env::args().nth(1).unwrap_or_else(|| "1.7".into()))?;
    let rounds = std::env::var("SEALPOD_BENCH_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(20);
    assets::complete()?;
    let mut env = Env::new(version)?;
    let mut sides = [
        ("runc", RUNC_RUNTIME, Samples::default()),
        ("sealpod", SEALPOD_RUNTIME, Samples::default()),
    ];
    let mut floors = Vec::new();
    for (name, runtime, _) in &sides {
        let args = env.image_run_args(
            runtime,
            BUSYBOX,
            &["--detach"],
            &env.id(name),
            &["sleep", "10000"],
        );
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        ensure!(env.run("ctr", &args).code == 0, "{name} does not start");
    }
    let arguments = vm_arguments(&env)?;
    // Round 0 warms caches and is not counted.
    for round in 0..=rounds {
        eprint!("\rround {round} of {rounds}");
        let floor = floor(&arguments)?;
        if round > 0 {
            floors.push(floor);
        }
        for (name, runtime, samples) in &mut sides {
            let (first, exit) = start(&env, runtime, &env.id(&format!("{name}{round}")))?;
            let exec = exec(&env, &env.id(name), round)?;
            if round > 0 {
                samples.first_output.push(first);
                samples.exit.push(exit);
                samples.exec.push(exec);
            }
        }
    }
    eprintln!();
    for (name, ..) in &sides {
        env.ctr_remove(&env.id(name));
    }
    let timeline = timeline(&env);
    let memory = memory(&mut env)?;
    let result = json!({
        "containerd": version.number(),
        "floor": summary(&floors),
        "runc": side(&sides[0].2),
        "sealpod": side(&sides[1].2),
        "timeline": timeline,
        "memory": memory,
        "sizes": {
            "initramfs_bytes": size(&assets::initramfs()),
            "vmlinux_bytes": size(&assets::kernel()),
            "bzimage_bytes": size(&assets::kernel().with_file_name("bzImage")),
            "shim_bytes": size(&assets::programs().join("containerd-shim-sealpod-v2")),
        },
    });
    let file = assets::target().join("bench/start.json");
    std::fs::create_dir_all(file.with_file_name(""))?;
    std::fs::write(&file, serde_json::to_string_pretty(&result)?)?;
    print(&result);
    println!("\nwritten to {}", file.display());
    Ok(())
}

fn side(samples: &Samples) -> Value {
    json!({
        "run_to_exit": summary(&samples.exit),
        "run_to_first_output": summary(&samples.first_output),
        "exec": summary(&samples.exec),
    })
}

/// The table: figures, then goals.
fn print(result: &Value) {
    let number = |path: &str| {
        result
            .pointer(path)
            .and_then(Value::as_f64)
            .unwrap_or(f64::NAN)
    };
    println!(
        "\n{:<28}{:>10}{:>10}{:>12}{:>10}",
        "ms", "runc p50", "p95", "sealpod p50", "p95"
    );
    for what in ["run_to_first_output", "run_to_exit", "exec"] {
        let of = |side: &str, p: &str| number(&format!("/{side}/{what}/{p}_ms"));
        println!(
            "{what:<28}{:>10.0}{:>10.0}{:>12.0}{:>10.0}",
            of("runc", "p50"),
            of("runc", "p95"),
            of("sealpod", "p50"),
            of("sealpod", "p95")
        );
    }
    println!("\n{:<44}{:>10}{:>10}", "goal", "limit", "measured");
    let mib = 1024.0;
    let floor = number("/floor/p50_ms");
    let goals = [
        ("floor, ms", 600.0, floor),
        (
            "start to first output, ms (floor + 350)",
            floor + 350.0,
            number("/sealpod/run_to_first_output/p50_ms"),
        ),
        (
            "exec, ms (2 x runc)",
            2.0 * number("/runc/exec/p50_ms"),
            number("/sealpod/exec/p50_ms"),
        ),
        ("shim PSS, MiB", 8.0, number("/memory/shim_pss_kib") / mib),
        ("agent RSS, MiB", 6.0, number("/memory/agent_rss_kib") / mib),
        (
            "initramfs, MiB",
            4.0,
            number("/sizes/initramfs_bytes") / mib / mib,
        ),
    ];
    for (name, limit, measured) in goals {
        let verdict = if measured <= limit { "met" } else { "MISSED" };
        println!("{name:<44}{limit:>10.1}{measured:>10.1}  {verdict}");
    }
    if let Some(marks) = result["timeline"].as_object() {
        println!("\none start, ms after the shim's");
        let mut marks: Vec<_> = marks
            .iter()
            .map(|(name, us)| (us.as_f64().unwrap_or(0.0), name))
            .collect();
        marks.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (us, name) in marks {
            println!("  {:<28}{:>8.1}", name.trim_end_matches("_us"), us / 1e3);
        }
    }
    let memory = &result["memory"];
    println!(
        "\nVM PSS beyond guest memory {:.1} MiB, virtiofsd {:.1} MiB, guest memory in use {:.1} MiB",
        number("/memory/vm_pss_beyond_guest_kib") / mib,
        number("/memory/virtiofsd_pss_kib") / mib,
        memory["guest_used_kib"].as_f64().unwrap_or(f64::NAN) / mib
    );
}
