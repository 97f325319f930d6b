//! `token verify`: checks a token as a gate does.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use sealpod_attestation::Timestamp;
use sealpod_attestation::binding::{Nonce, PublicKey};
use sealpod_attestation::token::{self, Expected, MAX_TOKEN};
use serde::Deserialize;

use crate::{Done, input, output};

#[derive(Args)]
pub(crate) struct TokenArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check signature, scope, time and status of a token
    Verify(VerifyArgs),
}

#[derive(Args)]
struct VerifyArgs {
    /// File with the token, - for standard input
    token: PathBuf,
    /// The verifier's public key: a JWK or a JWK set
    #[arg(long)]
    key: PathBuf,
    /// Audience that it must be for
    #[arg(long)]
    audience: String,
    /// Uid of the pod that it must be of
    #[arg(long)]
    pod: String,
    /// Nonce that it must answer, base64url
    #[arg(long)]
    nonce: Option<String>,
    /// Device that it must affirm
    #[arg(long)]
    device: Vec<String>,
    /// Believe tokens that rest on simulated evidence
    #[arg(long)]
    allow_simulated: bool,
    /// Time of the check, UTC
    #[arg(long)]
    now: Option<Timestamp>,
    /// Print the claims as JSON
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &TokenArgs) -> anyhow::Result<Done> {
    let Command::Verify(args) = &args.command;
    let text = input::read_up_to(&args.token, MAX_TOKEN as u64)?;
    let text = String::from_utf8(text).context("The token is not text")?;
    let nonce: Option<Nonce> = args.nonce.as_deref().map(str::parse).transpose()?;
    let expected = Expected {
        verifiers: &keys(&args.key)?,
        audience: &args.audience,
        pod_uid: &args.pod,
        confirmation: None,
        nonce: nonce.as_ref(),
        init_data_digest: None,
        now: u64::try_from(input::now(args.now).0).unwrap_or(0),
        allow_simulated: args.allow_simulated,
        devices: &args.device,
    };
    match token::check(text.trim(), &expected) {
        Ok(claims) if args.json => {
            output::print(&(serde_json::to_string_pretty(&claims)? + "\n"))?;
            Ok(Done::Accepted)
        }
        Ok(claims) => {
            let end = Timestamp(i64::try_from(claims.exp).unwrap_or(i64::MAX));
            let simulated = if claims.sim { ", simulated" } else { "" };
            output::print(&format!(
                "accepted: pod {}, devices [{}], until {end}{simulated}\n",
                claims.pod_uid,
                claims.devices.join(", ")
            ))?;
            Ok(Done::Accepted)
        }
        Err(token::TokenError::Form(what)) => {
            bail!("The token is not of the documented form: {what}")
        }
        Err(error) => {
            output::print(&format!("refused: {error}\n"))?;
            Ok(Done::Refused)
        }
    }
}

/// The keys of a file: one JWK, or a set.
pub(crate) fn keys(path: &Path) -> anyhow::Result<Vec<PublicKey>> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Keys {
        Set { keys: Vec<PublicKey> },
        One(PublicKey),
    }
    let keys = serde_json::from_slice(&input::read(path)?).with_context(|| {
        format!(
            "{} is neither a JWK on P-384 nor a set of them",
            path.display()
        )
    })?;
    Ok(match keys {
        Keys::Set { keys } => keys,
        Keys::One(key) => vec![key],
    })
}
