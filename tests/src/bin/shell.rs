//! `make shell`: a private environment to try things in. Starts a containerd of the chosen version with
//! the runtime under test and runs a command (by default a shell) beside it; all of it is gone when the
//! command ends.
//!
//!     shell [1.6 | 1.7 | 2.1] [COMMAND [ARG...]]

use std::process::ExitCode;

use anyhow::{Context, Result};
use sealpod_tests::{Env, Version, assets, image};

fn main() -> Result<ExitCode> {
    let mut args = std::env::args().skip(1);
    let version = Version::parse(args.next().as_deref().unwrap_or("1.7"))?;
    let mut words: Vec<String> = args.collect();
    if words.is_empty() {
        words.push("bash".into());
        println!(
            "containerd {} with the image {}; for instance:\n  ctr run --rm --runtime {} {} try uname -a",
            version.number(),
            image::BUSYBOX,
            assets::runtime(),
            image::BUSYBOX
        );
    }
    let env = Env::new(version)?;
    let mut command = env.command(&words[0]);
    command
        .args(&words[1..])
        .env("SEALPOD_ENVIRONMENT", env.folder());
    let mut child = env
        .namespaces
        .enter(|| command.spawn())
        .context(words[0].clone())?;
    let status = child.wait()?;
    let code = u8::try_from(status.code().unwrap_or(255)).unwrap_or(255);
    Ok(ExitCode::from(code))
}
