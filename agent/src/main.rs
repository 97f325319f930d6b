//! The guest's PID 1. It has no options: what it does it is told over vsock.

use sealpod_agent::{boot, log, sandbox, start};

fn main() {
    let began_ns = start::boot_time_ns();
    if std::process::id() != 1 {
        eprintln!("sealpod-agent is the init of a sealpod guest; it does nothing elsewhere");
        std::process::exit(2);
    }
    std::panic::set_hook(Box::new(|panic| {
        log::always(&format_args!("{panic}"));
        sandbox::power_off();
    }));
    if let Err(error) = run(began_ns) {
        log::always(&format_args!("{error}"));
    }
    sandbox::power_off();
}

fn run(began_ns: u64) -> Result<(), Box<dyn std::error::Error>> {
    boot::set_up()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    runtime.block_on(start::over_vsock(began_ns))?;
    Ok(())
}
