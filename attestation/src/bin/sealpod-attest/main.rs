//! Program `sealpod-attest`: the attestation harness for CI pipelines. It reads files, calls the
//! library, prints; all judgement is in the library.
//!
//! Exit codes: 0 accepted, 1 refused, 2 unreadable input or wrong use.

mod audit;
mod input;
mod inspect;
mod measure;
mod output;
mod serve;
mod simulate;
mod token;
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
    /// Predict the launch measurement of an SNP guest or a TD from its files and settings
    Measure(measure::MeasureArgs),
    /// Mint simulated evidence under a local CA, good or with a named defect
    Simulate(simulate::SimulateArgs),
    /// Check a token as a gate does
    Token(token::TokenArgs),
    /// Check or print an audit log
    Audit(audit::AuditArgs),
}

/// What a command ended with, where it did not fail.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Accepted,
    Refused,
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Verify(args) => verify::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Simulate(args) => simulate::run(&args),
        Command::Token(args) => token::run(&args),
        Command::Audit(args) => audit::run(&args),
    };
    match result {
        Ok(Done::Accepted) => ExitCode::SUCCESS,
        Ok(Done::Refused) => ExitCode::from(1),
        Err(error) => {
            eprintln!("sealpod-attest: {error:#}");
            ExitCode::from(2)
        }
    }
}
