//! Program `sealpod-attest`: the attestation harness for CI pipelines. It reads files, calls the
//! library, prints; all judgement is in the library.
//!
//! Exit codes: 0 accepted, 1 refused, 2 unreadable input or wrong use.

mod input;
mod inspect;
mod measure;
mod output;
mod serve;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "sealpod-attest",
    version,
    about = "Verifies attestation evidence offline"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Verify evidence and print every check with what was expected and found
    Verify(Box<verify::VerifyArgs>),
    /// Decode a report, quote, certificate, CRL, RIM, event log or token, field by field
    Inspect(inspect::InspectArgs),
    /// Serve verification over HTTPS, and resources to key-broker clients
    Serve(serve::ServeArgs),
    /// Predict the launch measurement of an SNP guest from its files and settings
    Measure(measure::MeasureArgs),
}

/// What a command ended with, where it did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Accepted,
    Refused,
    Unreadable,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Verify(args) => verify::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Measure(args) => measure::run(&args),
    };
    match result {
        Ok(Done::Accepted) => ExitCode::SUCCESS,
        Ok(Done::Refused) => ExitCode::from(1),
        Ok(Done::Unreadable) => ExitCode::from(2),
        Err(error) => {
            eprintln!("sealpod-attest: {error:#}");
            ExitCode::from(2)
        }
    }
}
