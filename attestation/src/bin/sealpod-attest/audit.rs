//! `audit verify` and `audit show`: reads an audit log.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use sealpod_attestation::Timestamp;
use sealpod_attestation::audit::{self, Record};

use crate::{Done, input, output, token};

#[derive(Args)]
pub(crate) struct AuditArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find any edit, cut or change of order
    Verify(LogArgs),
    /// Verify, and print the records
    Show {
        #[command(flatten)]
        log: LogArgs,
        /// One JSON record to a line
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct LogArgs {
    /// The log
    log: PathBuf,
    /// The public key of its writer: a JWK or a JWK set
    #[arg(long)]
    key: PathBuf,
    /// A checkpoint that was kept elsewhere; the one beside the log if absent
    #[arg(long)]
    checkpoint: Option<PathBuf>,
}

pub(crate) fn run(args: &AuditArgs) -> anyhow::Result<Done> {
    match &args.command {
        Command::Verify(log) => read(log, |_, _| String::new()),
        Command::Show { log, json: false } => read(log, line),
        Command::Show { log, json: true } => read(log, |_, r| {
            serde_json::to_string(r).unwrap_or_default() + "\n"
        }),
    }
}

fn read(args: &LogArgs, text: impl Fn(u64, &Record) -> String) -> anyhow::Result<Done> {
    let keys = token::keys(&args.key)?;
    let [key] = keys.as_slice() else {
        bail!(
            "{} holds {} keys; a log has one",
            args.key.display(),
            keys.len()
        );
    };
    let beside = audit::checkpoint_path(&args.log);
    let checkpoint = checkpoint(args.checkpoint.as_deref().unwrap_or(&beside))?;
    let log = std::fs::File::open(&args.log)
        .with_context(|| format!("Cannot open {}", args.log.display()))?;
    let mut printed = Ok(());
    let result = audit::verify(log, &checkpoint, key, |number, record| {
        let line = text(number, record);
        if printed.is_ok() && !line.is_empty() {
            printed = output::print(&line);
        }
    });
    printed?;
    match result {
        Ok(summary) => {
            let end = if summary.open_end {
                "; the last one has no checkpoint yet"
            } else {
                ""
            };
            eprintln!("intact: {} records{end}", summary.records);
            Ok(Done::Accepted)
        }
        Err(broken) => {
            eprintln!("broken: {broken}");
            Ok(Done::Refused)
        }
    }
}

fn checkpoint(path: &Path) -> anyhow::Result<String> {
    String::from_utf8(input::read_up_to(path, 4096)?)
        .with_context(|| format!("{} is not text", path.display()))
}

fn line(number: u64, r: &Record) -> String {
    let time = Timestamp(i64::try_from(r.time).unwrap_or(i64::MAX));
    let mut text = format!(
        "{number:>6} {time} {:<10} {:<10} {}",
        r.event, r.verdict, r.pod_uid
    );
    for (name, value) in [
        ("check", &r.check),
        ("reason", &r.reason),
        ("audience", &r.audience),
        ("jti", &r.jti),
        ("devices", &r.devices.join(",")),
    ] {
        if !value.is_empty() {
            text += &format!(" {name}={value}");
        }
    }
    // A record's text is the writer's; a terminal should not obey it.
    let plain: String = text.chars().filter(|c| !c.is_control()).collect();
    plain + if r.sim { " simulated\n" } else { "\n" }
}
