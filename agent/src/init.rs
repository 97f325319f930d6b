//! The first process of a guest: sets the guest up, serves the shim, and powers off when that ends.

use crate::start::{self, Serving};
use crate::{boot, log, sandbox};

/// Runs the guest; `serving` makes of the agent's service what answers the shim. Where this is not the first
/// process, it says so and ends with status 2.
pub fn main(serving: Serving) {
    let began_ns = start::boot_time_ns();
    if std::process::id() != 1 {
        eprintln!("sealpod-agent is the init of a sealpod guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    std::panic::set_hook(Box::new(|panic| {
        log::always(&format_args!("{panic}"));
        sandbox::power_off();
    }));
    if let Err(error) = run(began_ns, serving) {
        log::always(&format_args!("{error}"));
    }
    sandbox::power_off();
}

fn run(began_ns: u64, serving: Serving) -> Result<(), Box<dyn std::error::Error>> {
    boot::set_up()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    runtime.block_on(start::over_vsock(began_ns, serving))?;
    Ok(())
}
