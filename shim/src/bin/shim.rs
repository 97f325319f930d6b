//! `containerd-shim-sealpod-v2`: the program that containerd runs. Everything is in the library.

use std::process::ExitCode;

use sealpod_shim::{
    bootstrap::{self, Args},
    error,
};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let args = Args::parse(&words).map_err(bootstrap::Error::from);
    match args.and_then(|a| bootstrap::run(&a)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("containerd-shim-sealpod-v2: {}", error::chain(&e));
            ExitCode::FAILURE
        }
    }
}
