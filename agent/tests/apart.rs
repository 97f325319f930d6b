//! Work in a process of its own (`apart`), and the TEE's drivers by it. The agent forks from its only thread,
//! so these tests have no harness: this program is one. It speaks what `cargo test` and nextest ask of one.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use sealpod_agent::apart::{self, ApartError};
use sealpod_agent::attest::{SourceError, driver};

const SOON: Duration = Duration::from_secs(30);

async fn an_answer_comes_whole_and_a_reason_as_it_is() {
    let long = vec![7; 300_000];
    let answer = apart::run(long.len(), SOON, || Ok(long.clone())).await;
    assert!(answer.expect("answer") == long);
    let reason = apart::run(10, SOON, || Err("no such luck".into())).await;
    assert_eq!(reason.expect_err("reason").to_string(), "no such luck");
    let reason = apart::run(0, SOON, || Err("x".repeat(100_000))).await;
    assert!(matches!(reason, Err(ApartError::Failed(r)) if r.len() == 512));
}

async fn a_panic_and_an_abort_are_errors_and_nothing_else() {
    let panics = apart::run(10, SOON, || panic!("in the child")).await;
    assert!(matches!(panics, Err(ApartError::Ended)), "{panics:?}");
    let aborts = apart::run(10, SOON, || std::process::abort()).await;
    assert!(matches!(aborts, Err(ApartError::Ended)), "{aborts:?}");
}

async fn too_much_is_refused_and_what_never_answers_is_killed() {
    let long = apart::run(9, SOON, || Ok(vec![0; 10])).await;
    assert!(matches!(long, Err(ApartError::TooLong(9))), "{long:?}");
    nix::sys::wait::wait().expect("child");
    let began = Instant::now();
    let silent = apart::run(9, Duration::from_millis(200), || {
        std::thread::sleep(Duration::from_secs(3600));
        Ok(Vec::new())
    });
    let silent = silent.await;
    assert!(matches!(silent, Err(ApartError::Silent(_))), "{silent:?}");
    assert!(began.elapsed() < SOON);
    // It ends.
    let ended = nix::sys::wait::wait().expect("child");
    assert!(format!("{ended:?}").contains("SIGKILL"), "{ended:?}");
}

/// The crate panics where there is no device, `sev` says so: neither ends the agent.
async fn a_tee_that_is_not_there_is_an_error() {
    if [driver::SEV_GUEST, driver::TDX_GUEST[0]]
        .iter()
        .any(|device| Path::new(device).exists())
    {
        eprintln!("SKIPPED: this machine is a confidential guest");
        return;
    }
    let snp = driver::snp(&[1; 64]).await.expect_err("no device");
    assert!(snp.to_string().contains(driver::SEV_GUEST), "{snp}");
    let tdx = driver::tdx(&[1; 64]).await.expect_err("no device");
    assert!(matches!(tdx, SourceError::NoTee), "{tdx}");
    let panics = apart::run(10, SOON, || {
        tdx_attest::get_tdx_quote(String::new()).map_err(|e| e.to_string())
    });
    let panics = panics.await;
    assert!(matches!(panics, Err(ApartError::Ended)), "{panics:?}");
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|a| a == flag);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    let filter = args.iter().find(|a| !a.starts_with('-') && *a != "terse");
    let wanted = |name: &str| filter.is_none_or(|f| name.contains(f.as_str()));
    macro_rules! tests {
        ($($test:ident),+ $(,)?) => { $(
            let name = stringify!($test);
            if has("--list") && !has("--ignored") {
                println!("{name}: test");
            } else if wanted(name) && !has("--list") && !has("--ignored") {
                runtime.block_on($test());
                // Ends its children before the next one counts them.
                while nix::sys::wait::wait().is_ok() {}
                println!("test {name} ... ok");
            }
        )+ };
    }
    tests!(
        an_answer_comes_whole_and_a_reason_as_it_is,
        a_panic_and_an_abort_are_errors_and_nothing_else,
        too_much_is_refused_and_what_never_answers_is_killed,
        a_tee_that_is_not_there_is_an_error,
    );
    ExitCode::SUCCESS
}
