//! `simulate`: evidence from a local CA, good or with a named defect, and what a verifier needs for it.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Subcommand, ValueEnum};
use sealpod_attestation::Timestamp;
use sealpod_attestation::simulate::{
    ANCHORS_FILE, Ca, Defect, GpuClaims, Minted, SnpClaims, TdxClaims, TdxForm,
};
use sealpod_attestation::snp::Product;
use sealpod_attestation::verdict::Tee;

use crate::{Done, input, output};

#[derive(Args)]
pub(crate) struct SimulateArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Create a CA: a folder with key files and the anchor file that a verifier has to be given
    Ca {
        /// The folder
        folder: PathBuf,
    },
    /// Mint an SNP report
    Snp(SnpArgs),
    /// Mint a TDX quote
    Tdx(TdxArgs),
    /// Mint the report of a GPU or NVSwitch
    Gpu(GpuArgs),
    /// List the defects that evidence can have, and the check that refuses each
    Defects,
}

#[derive(Args)]
struct Common {
    /// Folder of the CA; made if there is none
    #[arg(long)]
    ca: PathBuf,
    /// Folder for report, endorsements and collateral
    #[arg(long)]
    output: PathBuf,
    /// What is to be wrong with it (see `simulate defects`)
    #[arg(long)]
    defect: Option<String>,
    /// Time of minting, UTC
    #[arg(long)]
    now: Option<Timestamp>,
}

#[derive(Clone, Copy, ValueEnum)]
enum ProductArg {
    Milan,
    Genoa,
    Turin,
}

#[derive(Args)]
struct SnpArgs {
    #[command(flatten)]
    common: Common,
    /// Product line
    #[arg(long, default_value = "milan")]
    product: ProductArg,
    /// Report version, 2 to 5
    #[arg(long, default_value_t = 3)]
    report_version: u32,
    /// Sign with a loaded key (VLEK) in place of the chip's
    #[arg(long)]
    vlek: bool,
    /// REPORT_DATA, 64 bytes: hexadecimal or @FILE
    #[arg(long)]
    report_data: Option<String>,
    /// MEASUREMENT, 48 bytes: hexadecimal or @FILE
    #[arg(long)]
    measurement: Option<String>,
    /// HOST_DATA, 32 bytes: hexadecimal or @FILE
    #[arg(long)]
    host_data: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum FormArg {
    /// Version 4, TD 1.0
    V4,
    /// Version 5, TD 1.0
    V5Td10,
    /// Version 5, TD 1.5
    V5Td15,
    /// Version 5, TD 1.5ex
    V5Td15ex,
}

#[derive(Args)]
struct TdxArgs {
    #[command(flatten)]
    common: Common,
    /// Layout of the quote
    #[arg(long, default_value = "v4")]
    form: FormArg,
    /// REPORTDATA, 64 bytes: hexadecimal or @FILE
    #[arg(long)]
    report_data: Option<String>,
    /// MRTD, 48 bytes: hexadecimal or @FILE
    #[arg(long)]
    mr_td: Option<String>,
    /// MRCONFIGID, 48 bytes: hexadecimal or @FILE
    #[arg(long)]
    mr_config_id: Option<String>,
}

#[derive(Args)]
struct GpuArgs {
    #[command(flatten)]
    common: Common,
    /// Chip: GH100 (Hopper), GB100 (Blackwell), LS10 (NVSwitch), …
    #[arg(long, default_value = "GH100")]
    chip: String,
    /// Nonce, 32 bytes: hexadecimal or @FILE
    #[arg(long)]
    nonce: Option<String>,
}

pub(crate) fn run(args: &SimulateArgs) -> anyhow::Result<Done> {
    match &args.command {
        Command::Ca { folder } => {
            Ca::create(folder, input::now(None))?;
            let anchors = folder.join(ANCHORS_FILE);
            output::print(&format!("anchors: {}\n", anchors.display()))?;
        }
        Command::Snp(args) => snp(args)?,
        Command::Tdx(args) => tdx(args)?,
        Command::Gpu(args) => gpu(args)?,
        Command::Defects => output::print(&defects())?,
    }
    Ok(Done::Accepted)
}

fn defects() -> String {
    let mut text = format!(
        "{:<24} {:<32} {:<20} {}\n",
        "defect", "snp", "tdx", "gpu: refused by"
    );
    for defect in Defect::ALL {
        let check = |tee| defect.check(tee).unwrap_or("-");
        text += &format!(
            "{:<24} {:<32} {:<20} {}\n",
            defect.name(),
            check(Tee::Snp),
            check(Tee::Tdx),
            check(Tee::Nvidia)
        );
    }
    text
}

fn open(common: &Common, tee: Tee) -> anyhow::Result<(Ca, Option<Defect>)> {
    let defect = common.defect.as_deref();
    let defect = defect.map(|d| Defect::from_name(d, tee)).transpose()?;
    let now = input::now(common.now);
    let ca = if common.ca.join(ANCHORS_FILE).exists() {
        Ca::open(&common.ca, now)?
    } else {
        Ca::create(&common.ca, now)?
    };
    Ok((ca, defect))
}

fn snp(args: &SnpArgs) -> anyhow::Result<()> {
    let (ca, defect) = open(&args.common, Tee::Snp)?;
    let claims = SnpClaims {
        product: match args.product {
            ProductArg::Milan => Product::Milan,
            ProductArg::Genoa => Product::Genoa,
            ProductArg::Turin => Product::Turin,
        },
        version: args.report_version,
        vlek: args.vlek,
        report_data: bytes("report-data", args.report_data.as_ref())?,
        measurement: bytes("measurement", args.measurement.as_ref())?,
        host_data: bytes("host-data", args.host_data.as_ref())?,
        ..SnpClaims::default()
    };
    write(
        args.common.output.as_path(),
        "certificates.bin",
        &ca.mint_snp(&claims, defect)?,
    )
}

fn tdx(args: &TdxArgs) -> anyhow::Result<()> {
    let (ca, defect) = open(&args.common, Tee::Tdx)?;
    let claims = TdxClaims {
        form: match args.form {
            FormArg::V4 => TdxForm::V4,
            FormArg::V5Td10 => TdxForm::V5Td10,
            FormArg::V5Td15 => TdxForm::V5Td15,
            FormArg::V5Td15ex => TdxForm::V5Td15Ex,
        },
        report_data: bytes("report-data", args.report_data.as_ref())?,
        mr_td: bytes("mr-td", args.mr_td.as_ref())?,
        mr_config_id: bytes("mr-config-id", args.mr_config_id.as_ref())?,
        ..TdxClaims::default()
    };
    write(&args.common.output, "", &ca.mint_tdx(&claims, defect)?)
}

fn gpu(args: &GpuArgs) -> anyhow::Result<()> {
    let (ca, defect) = open(&args.common, Tee::Nvidia)?;
    let claims = GpuClaims {
        chip: args.chip.clone(),
        nonce: bytes("nonce", args.nonce.as_ref())?,
        ..GpuClaims::default()
    };
    write(
        &args.common.output,
        "chain.pem",
        &ca.mint_gpu(&claims, defect)?,
    )
}

/// A value, or zeros.
fn bytes<const N: usize>(option: &str, value: Option<&String>) -> anyhow::Result<[u8; N]> {
    Ok(input::exact(option, value)?.unwrap_or([0; N]))
}

/// `report.bin`, and the rest in a folder that `verify --collateral` takes as it is.
fn write(folder: &Path, endorsements: &str, minted: &Minted) -> anyhow::Result<()> {
    let collateral = folder.join("collateral");
    std::fs::create_dir_all(&collateral)
        .with_context(|| format!("Cannot create {}", collateral.display()))?;
    let put = |path: PathBuf, bytes: &[u8]| {
        std::fs::write(&path, bytes).with_context(|| format!("Cannot write {}", path.display()))
    };
    put(folder.join("report.bin"), &minted.report)?;
    if !minted.endorsements.is_empty() {
        put(collateral.join(endorsements), &minted.endorsements)?;
    }
    for (name, bytes) in &minted.collateral {
        put(collateral.join(name), bytes)?;
    }
    output::print(&format!("{}\n", folder.join("report.bin").display()))?;
    Ok(())
}
