//! `sealpod`: the node tool. Looks at a node and its pods from outside; changes nothing.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::{Parser, Subcommand};
use sealpod_attestation::encoding::hex;
use sealpod_shim::{
    attest::launch::{self, Launch, LaunchError, Predicted},
    check, config,
    podfile::{self, PodFile},
};
use serde_json::json;

/// What this node can do with sealpod, and which pods it runs.
#[derive(Parser)]
#[command(name = "sealpod", version)]
struct Arguments {
    /// sealpod's configuration [default: $SEALPOD_CONFIG, else /etc/sealpod/sealpod.toml]
    #[arg(long, global = true, value_name = "PATH")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    command: Subcommands,
}

#[derive(Subcommand)]
enum Subcommands {
    /// Say what this node can do, what is missing and how to get it; succeeds when pods can run
    Check {
        /// As JSON
        #[arg(long)]
        json: bool,
        /// containerd's configuration [default: /etc/containerd/config.toml]
        #[arg(long, value_name = "PATH")]
        containerd_config: Option<PathBuf>,
    },
    /// Print reference values for the pods that this node would start: what a confidential guest of the
    /// configured kind, else a simulated one, says of kernel, initramfs and command line
    Measure {
        /// Virtual CPUs of the pods
        #[arg(long, default_value_t = 1)]
        vcpus: u32,
        /// A word that the pods add to the kernel's command line; may be given several times
        #[arg(long = "kernel-param", value_name = "WORD")]
        kernel_params: Vec<String>,
        /// The pods ask for devices
        #[arg(long)]
        devices: bool,
        /// Lowest security version of the SNP firmware; the built-in policy demands one
        #[arg(long, value_name = "SVN")]
        minimum_snp: Option<u8>,
    },
    /// List the pods of this node
    List {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let result = match arguments.command {
        Subcommands::Check {
            json,
            containerd_config,
        } => {
            let options = check::Options {
                config: arguments.config,
                containerd_config,
            };
            check(&options, json)
        }
        Subcommands::Measure {
            vcpus,
            kernel_params,
            devices,
            minimum_snp,
        } => measure(
            arguments.config,
            vcpus,
            &kernel_params,
            devices,
            minimum_snp,
        ),
        Subcommands::List { json } => list(arguments.config, json),
    };
    result.unwrap_or_else(|e| {
        eprint!("sealpod: {e}");
        let mut source = e.source();
        while let Some(e) = source {
            eprint!(": {e}");
            source = e.source();
        }
        eprintln!();
        ExitCode::FAILURE
    })
}

type Result = std::result::Result<ExitCode, Box<dyn std::error::Error>>;

fn check(options: &check::Options, json: bool) -> Result {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    let report = runtime.block_on(check::check(options));
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(if report.ready {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn measure(
    config: Option<PathBuf>,
    vcpus: u32,
    params: &[String],
    devices: bool,
    minimum_snp: Option<u8>,
) -> Result {
    let config = config::load(config.as_deref())?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // What is found out about this machine is kept where the shims look for it.
    std::fs::create_dir_all(&config.runtime.state_dir)?;
    let launch = runtime.block_on(launch::of_node(&config, vcpus, params, devices));
    let mut references = match launch.predicted()? {
        Some(Predicted::Snp(digest)) => json!({ "snp": { "measurement": [digest] } }),
        Some(Predicted::Tdx {
            mr_td,
            rtmr1,
            rtmr2,
        }) => json!({ "tdx": { "mr_td": [mr_td], "rtmr1": [rtmr1], "rtmr2": rtmr2 } }),
        None => simulated(&launch)?,
    };
    if let Some(svn) = minimum_snp {
        references["snp"]["limits"] = json!({ "minimum_tcb": { "snp": svn } });
    }
    println!("{}", serde_json::to_string_pretty(&references)?);
    eprintln!("command line: {}", launch.cmdline);
    Ok(ExitCode::SUCCESS)
}

/// What simulated guests of either TEE say of themselves.
fn simulated(launch: &Launch) -> std::result::Result<serde_json::Value, LaunchError> {
    let td = launch.td()?;
    let [_, rtmr1, rtmr2, _] = td.registers().map(|register| [hex(&register)]);
    Ok(json!({
        "snp": { "measurement": [hex(&launch.measurement()?)] },
        "tdx": { "mr_td": [hex(&td.mr_td)], "rtmr1": rtmr1, "rtmr2": rtmr2 },
    }))
}

fn list(config: Option<PathBuf>, json: bool) -> Result {
    let config = config::load(config.as_deref())?;
    let pods = podfile::list(&config.runtime.state_dir)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&pods)?);
        return Ok(ExitCode::SUCCESS);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let mut rows = vec![
        [
            "NAMESPACE",
            "POD",
            "SHIM",
            "VM",
            "ACCEL",
            "VCPUS",
            "MEMORY",
            "AGE",
        ]
        .map(String::from),
    ];
    rows.extend(pods.into_iter().map(|p| row(p, now)));
    let widths: [usize; 8] =
        std::array::from_fn(|i| rows.iter().map(|r| r[i].chars().count()).max().unwrap_or(0));
    for row in rows {
        let cells = row.iter().zip(widths).map(|(c, w)| format!("{c:w$}"));
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

fn row(pod: PodFile, now: u64) -> [String; 8] {
    let pid = |pid: u32| match pid {
        0 => "-".into(),
        pid => pid.to_string(),
    };
    let age = now.saturating_sub(pod.created_unix);
    let age = match age {
        0..120 => format!("{age}s"),
        120..7200 => format!("{}m", age / 60),
        7200..172_800 => format!("{}h", age / 3600),
        _ => format!("{}d", age / 86_400),
    };
    [
        pod.namespace,
        pod.id,
        pid(pod.shim_pid),
        pid(pod.vm_pid),
        pod.accelerator,
        pod.vcpus.to_string(),
        format!("{} MiB", pod.memory_mib),
        age,
    ]
}
