//! The predicted SNP launch digest against that of another implementation, the crate `sev`: the same
//! image, files and settings have to give the same digest, whatever they are.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use sealpod_attestation::measure::{
    CpuType, KernelHashes, MeasureError, SnpLaunch, snp_launch_digest, stand_in,
};
use sev::measurement::snp::{SnpMeasurementArgs, snp_calc_launch_digest};
use sev::measurement::vcpu_types::CpuType as Model;
use sev::measurement::vmsa::{GuestFeatures, VMMType};

/// Every name that QEMU has for a processor.
const MODELS: [&str; 18] = [
    "EPYC",
    "EPYC-v1",
    "EPYC-v2",
    "EPYC-IBPB",
    "EPYC-v3",
    "EPYC-v4",
    "EPYC-Rome",
    "EPYC-Rome-v1",
    "EPYC-Rome-v2",
    "EPYC-Rome-v3",
    "EPYC-Milan",
    "EPYC-Milan-v1",
    "EPYC-Milan-v2",
    "EPYC-Genoa",
    "EPYC-Genoa-v1",
    "EPYC-Turin",
    "EPYC-Turin-v1",
    "EPYC-Turin-v2",
];
/// SNP alone; with debug-swap; with what the other crate knows by name.
const FEATURES: [u64; 3] = [0x1, 0x21, 0xd7ff];
/// Where distributions put OVMF.
const REAL: [&str; 4] = [
    "/usr/share/ovmf/OVMF.amdsev.fd",
    "/usr/share/OVMF/OVMF.amdsev.fd",
    "/usr/share/ovmf/OVMF.fd",
    "/usr/share/OVMF/OVMF_CODE_4M.fd",
];

/// What is booted directly: kernel, initial RAM disk, command line.
type Boot<'a> = (&'a [u8], Option<&'a [u8]>, &'a str);

/// Both digests of one guest.
fn digests(
    ovmf: &Path,
    boot: Option<Boot<'_>>,
    vcpus: u32,
    model: &str,
    features: u64,
) -> (Result<[u8; 48], MeasureError>, Option<Vec<u8>>) {
    let image = std::fs::read(ovmf).unwrap();
    let launch = SnpLaunch {
        ovmf: &image,
        kernel: boot.map(|(kernel, initrd, line)| KernelHashes::new(kernel, initrd, line)),
        vcpus,
        cpu: model.parse::<CpuType>().unwrap(),
        guest_features: features,
    };
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let theirs = snp_calc_launch_digest(SnpMeasurementArgs {
        vcpus,
        vcpu_type: Model::try_from(model).unwrap(),
        ovmf_file: ovmf.into(),
        guest_features: GuestFeatures(features),
        kernel_file: boot.map(|b| file("kernel", b.0)),
        initrd_file: boot.and_then(|b| Some(file("initrd", b.1?))),
        append: boot.map(|b| b.2),
        ovmf_hash_str: None,
        vmm_type: Some(VMMType::QEMU),
    });
    let theirs = theirs.ok().map(|digest| digest.try_into().unwrap());
    (snp_launch_digest(&launch), theirs)
}

/// Compares all of the matrix: how many guests that were, and how many digests.
fn compare(
    ovmf: &Path,
    boots: &[Option<Boot<'_>>],
    vcpus: &[u32],
    models: &[&str],
) -> (usize, usize) {
    let mut seen = BTreeSet::new();
    let mut count = 0;
    for (boot, vcpus) in boots
        .iter()
        .flat_map(|b| vcpus.iter().map(move |v| (b, *v)))
    {
        for (model, features) in models.iter().flat_map(|m| FEATURES.map(|f| (m, f))) {
            let (ours, theirs) = digests(ovmf, *boot, vcpus, model, features);
            let named = format!("{boot:?}, {vcpus} of {model}, 0x{features:x}");
            let ours = ours.unwrap_or_else(|e| panic!("{named}: {e}"));
            assert_eq!(Some(ours.to_vec()), theirs, "{named}");
            seen.insert(ours);
            count += 1;
        }
    }
    (count, seen.len())
}

#[test]
fn the_snp_launch_digest_is_the_one_that_the_crate_sev_computes() {
    let dir = tempfile::tempdir().unwrap();
    let ovmf = dir.path().join("ovmf");
    std::fs::write(&ovmf, stand_in()).unwrap();
    let boots: [Option<Boot<'_>>; 4] = [
        None,
        Some((b"a kernel", None, "")),
        Some((b"a kernel", Some(b"an initrd"), "console=ttyS0")),
        Some((b"a kernel", Some(b""), "quiet  \"two words\" \u{e4}")),
    ];
    let (count, different) = compare(&ovmf, &boots, &[1, 2, 5], &MODELS);
    assert_eq!(count, 4 * 3 * MODELS.len() * FEATURES.len());
    // Versions of a model are one of five processors.
    assert_eq!(different, 4 * 3 * 5 * FEATURES.len());
    let (ours, theirs) = digests(&ovmf, boots[2], 255, "EPYC-Turin", 1);
    assert_eq!(ours.ok().map(Vec::from), theirs);
}

#[test]
fn of_real_firmware_too_where_there_is_any() {
    let named = std::env::var_os("SEALPOD_OVMF").map(PathBuf::from);
    let found: Vec<PathBuf> = named
        .into_iter()
        .chain(REAL.map(PathBuf::from))
        .filter(|path| path.exists())
        .collect();
    let mut compared = 0;
    for path in &found {
        // Firmware without a place for kernel hashes is refused by both, with them.
        let boot = Some((&b"a kernel"[..], None, "x"));
        let (ours, theirs) = digests(path, boot, 1, "EPYC-Milan", 1);
        assert_eq!(ours.is_ok(), theirs.is_some(), "{}", path.display());
        let (plain, theirs) = digests(path, None, 1, "EPYC-Milan", 1);
        assert_eq!(plain.is_ok(), theirs.is_some(), "{}", path.display());
        if plain.is_err() {
            println!("not for SNP: {}", path.display());
            continue;
        }
        let boots: &[_] = if ours.is_ok() { &[None, boot] } else { &[None] };
        let (count, _) = compare(path, boots, &[3], &["EPYC-v4", "EPYC-Milan", "EPYC-Turin"]);
        println!("compared: {count} guests of {}", path.display());
        compared += 1;
    }
    if compared == 0 {
        eprintln!(
            "SKIPPED: no OVMF for SNP; SEALPOD_OVMF=<file> names one, of {REAL:?} none is there"
        );
    }
}
