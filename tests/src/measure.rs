//! Times of one start and one exec as a user sees them, and what a shim noted on its way: for the benches.
//! What a machine does late because of what ran before is done before the clock starts.

use std::{io::Read, time::Instant};

use anyhow::{Result, ensure};
use serde_json::Value;

use crate::{Env, image::BUSYBOX};

/// Memory that [`forget_the_last_guest`] takes and gives back: more than a guest of the benches uses.
const RECYCLED: usize = 384 << 20;

/// Writes to memory that was freed last. In the lab the translator still has code of the guest that used it,
/// and drops that page by page when something new is written there: a second or more, which is neither
/// runtime's. On hardware it costs some milliseconds.
pub fn forget_the_last_guest() {
    let mut memory = vec![0_u8; RECYCLED];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// Milliseconds since `begin`.
#[must_use]
pub fn ms(begin: Instant) -> f64 {
    begin.elapsed().as_secs_f64() * 1e3
}

/// One `ctr run --rm`: time to its first byte of output, and to its end.
///
/// # Errors
/// Where it fails.
pub fn start(env: &Env, runtime: &str, id: &str) -> Result<(f64, f64)> {
    let args = env.image_run_args(runtime, BUSYBOX, &["--rm"], id, &["echo", "here"]);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let begin = Instant::now();
    let mut child = env.spawn("ctr", &args);
    drop(child.stdin.take());
    let mut byte = [0];
    let read = child.stdout.as_mut().map(|out| out.read(&mut byte));
    let first = ms(begin);
    let status = child.wait()?;
    let exit = ms(begin);
    ensure!(
        status.success() && matches!(read, Some(Ok(1))),
        "{runtime}: ctr run failed"
    );
    Ok((first, exit))
}

/// One `ctr task exec` to its end.
///
/// # Errors
/// Where it fails.
pub fn exec(env: &Env, id: &str, round: usize) -> Result<f64> {
    let begin = Instant::now();
    let done = env.ctr_exec(id, &format!("e{round}"), &["true"]);
    let time = ms(begin);
    ensure!(done.code == 0, "exec failed: {}", done.text());
    Ok(time)
}

/// One more start, with what its shim noted: microseconds since the shim's own, by mark.
#[must_use]
pub fn timeline(env: &Env) -> Option<Value> {
    let id = env.id("timeline");
    env.ctr_start(&[], &id, &["sh", "-c", "echo here; sleep 1000"]);
    let _ = env.ctr_exec(&id, "e", &["true"]);
    let marks = marks(env);
    env.ctr_remove(&id);
    let marks = marks?;
    let begin = marks.get("shim_start_ns")?.as_u64()?;
    let since = marks.as_object()?.iter().filter_map(|(name, ns)| {
        let micro = ns.as_u64()?.saturating_sub(begin) / 1000;
        Some((name.replace("_ns", "_us"), Value::from(micro)))
    });
    Some(Value::Object(since.collect()))
}

/// What the shim of the newest pod noted: nanoseconds, by mark.
#[must_use]
pub fn marks(env: &Env) -> Option<Value> {
    let pods = std::fs::read_dir(env.namespaces.path("/run/sealpod")).ok()?;
    let files = pods.flatten().map(|p| p.path().join("timeline.json"));
    let newest = files
        .filter_map(|f| Some((f.metadata().ok()?.modified().ok()?, f)))
        .max()?;
    let text = std::fs::read_to_string(newest.1).ok()?;
    serde_json::from_str(&text).ok()
}
