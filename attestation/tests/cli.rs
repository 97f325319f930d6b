//! The program as a pipeline sees it: exit codes, one clear line for what cannot be read, JSON and
//! JUnit. Real evidence where the folder is there, broken files always.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sealpod-attest"))
        .args(arguments)
        .output()
        .expect("sealpod-attest starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("not killed by a signal")
}

fn evidence() -> Option<PathBuf> {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/evidence");
    let root = std::env::var_os("SEALPOD_EVIDENCE_DIR").map_or(default, PathBuf::from);
    if !root.is_dir() {
        eprintln!(
            "\n*** SKIPPED: no evidence folder at {}; set SEALPOD_EVIDENCE_DIR ***\n",
            root.display()
        );
        return None;
    }
    Some(root)
}

#[test]
fn malformed_files_of_every_kind_give_exit_2_and_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let deep = "<a>".repeat(100_000);
    let random: Vec<u8> = (0u32..5000)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let files: [(&str, &[u8]); 9] = [
        ("empty", b""),
        ("random", &random),
        ("huge", &vec![0x41; 9 << 20]),
        ("deep.xml", deep.as_bytes()),
        (
            "wrong.pem",
            b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ),
        ("cut.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n"),
        ("zeros", &[0; 1184]),
        ("list.json", b"[]"),
        ("deep.json", "[".repeat(200_000).leak().as_bytes()),
    ];
    for (name, bytes) in files {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let path = path.to_str().unwrap();
        for arguments in [
            vec!["verify", path],
            vec!["verify", "--tee", "snp", path],
            vec!["verify", "--tee", "tdx", path],
            vec!["verify", "--tee", "nvidia", path],
            vec!["inspect", path],
            vec!["verify", "--tee", "snp", path, "--endorsement", path],
        ] {
            let output = run(&arguments);
            let lines = output.stderr.iter().filter(|b| **b == b'\n').count();
            assert!(
                code(&output) == 2 && lines == 1 && output.stderr.len() < 2000,
                "{arguments:?}: {output:?}"
            );
            assert!(output.stdout.is_empty(), "{arguments:?}: {output:?}");
        }
        assert_eq!(code(&run(&["inspect", path])), 2, "{name}");
        assert_eq!(code(&run(&["verify", path])), 2, "{name}");
    }
    assert_eq!(code(&run(&["verify", "/nonexistent"])), 2);
    assert_eq!(code(&run(&["verify"])), 2);
    assert_eq!(code(&run(&["verify", "--now", "yesterday", "x"])), 2);
}

#[test]
fn real_evidence_is_accepted_and_refused_with_exit_codes() {
    let Some(root) = evidence() else { return };
    let file = |name: &str| root.join(name).to_str().unwrap().to_owned();
    let (report, vcek, ca) = (
        file("snp/milan-v3/report.bin"),
        file("snp/milan-v3/vcek.pem"),
        file("snp/ca"),
    );
    let base = [
        "verify",
        &report,
        "--endorsement",
        &vcek,
        "--endorsement",
        &ca,
        "--now",
        "2026-11-21",
    ];
    let with = |more: &[&str]| run(&[&base[..], more].concat());

    let accepted = with(&[]);
    assert_eq!(code(&accepted), 0, "{accepted:?}");
    assert!(String::from_utf8_lossy(&accepted.stdout).contains("ACCEPTED"));
    let strict = with(&["--strict"]);
    assert_eq!(
        code(&strict),
        1,
        "a measurement nobody compared is refused by --strict"
    );
    let other = with(&["--report-data", &"01".repeat(64)]);
    assert_eq!(code(&other), 1);
    assert!(String::from_utf8_lossy(&other.stdout).contains("FAIL report-data"));
    assert_eq!(
        code(&with(&["--report-data", "00"])),
        2,
        "short report data is misuse, not padded"
    );
    assert_eq!(
        code(&with(&["--nonce", &"00".repeat(32)])),
        2,
        "an option for other evidence is misuse"
    );

    let folder = tempfile::tempdir().unwrap();
    let junit = folder.path().join("junit.xml");
    let json = with(&["--json", "--junit", junit.to_str().unwrap()]);
    let verdict: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (verdict["status"].as_str(), verdict["simulated"].as_bool()),
        (Some("accepted"), Some(false))
    );
    let measurement = verdict["claims"]["measurement"].as_str().unwrap();
    assert!(
        std::fs::read_to_string(&junit)
            .unwrap()
            .contains("failures=\"0\"")
    );

    let references = folder.path().join("references.json");
    for (value, expected) in [
        (measurement.to_owned(), 0),
        ("11".repeat(48), 1),
        ("11".into(), 2),
    ] {
        std::fs::write(
            &references,
            format!(r#"{{"snp":{{"measurement":["{value}"]}}}}"#),
        )
        .unwrap();
        assert_eq!(
            code(&with(&["--reference-values", references.to_str().unwrap()])),
            expected,
            "{value}"
        );
    }
    let anchors = folder.path().join("anchors.json");
    std::fs::write(&anchors, "{}").unwrap();
    let none = with(&["--anchors", anchors.to_str().unwrap()]);
    assert_eq!(
        code(&none),
        1,
        "an anchor file replaces the production anchors"
    );
    assert!(String::from_utf8_lossy(&none.stdout).contains("SIMULATED"));
}

#[test]
fn an_impossible_measurement_is_misuse() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("ovmf.fd");
    std::fs::write(&image, [0; 8192]).unwrap();
    let output = run(&["measure", "--ovmf", image.to_str().unwrap()]);
    assert_eq!(code(&output), 2);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no OVMF with SEV support"));
    assert_eq!(
        code(&run(&[
            "measure",
            "--ovmf",
            image.to_str().unwrap(),
            "--vcpu-type",
            "Pentium"
        ])),
        2
    );
}

#[test]
fn every_file_that_can_be_decoded_is_inspected() {
    let Some(root) = evidence() else { return };
    for name in [
        "snp/turin-v5/report.bin",
        "snp/turin-v5/vcek.pem",
        "snp/milan-v2b/vcek.der",
        "tdx/v4-mrconfigid/quote.hex",
        "tdx/v5-td15-uptodate/quote.bin",
        "tdx/tdreport.bin",
        "tdx/v4-live-ccel/ccel-good.bin",
        "tdx/v4-emr-uptodate/collateral.json",
        "gpu/h100-550.90-GREEN/report.bin",
        "gpu/h100-550.90-GREEN/driver-rim.xml",
        "gpu/h100-550.90-GREEN/ocsp/gpu_rim_l2.der",
        "gpu/blackwell-8gpu-mpt.json",
    ] {
        let output = run(&["inspect", root.join(name).to_str().unwrap()]);
        assert_eq!(code(&output), 0, "{name}: {output:?}");
        assert!(
            serde_json::from_slice::<serde_json::Value>(&output.stdout).is_ok(),
            "{name}"
        );
    }
    let tdreport = run(&["verify", root.join("tdx/tdreport.bin").to_str().unwrap()]);
    assert_eq!(code(&tdreport), 2, "a TDREPORT cannot be verified remotely");
}
