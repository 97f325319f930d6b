//! Properties of every parser: whatever the bytes, it answers and does not panic; a real file cut
//! anywhere is not accepted as the whole one. The bytes come from a fixed generator, so that a
//! failure can be repeated.

use std::path::{Path, PathBuf};

use sealpod_attestation::init_data::InitData;
use sealpod_attestation::nvidia::{self, Device, Element, NvidiaPolicy, Rim};
use sealpod_attestation::ocsp::OcspResponse;
use sealpod_attestation::policy::Policy;
use sealpod_attestation::reference::ReferenceValues;
use sealpod_attestation::snp::{self, SnpPolicy};
use sealpod_attestation::tdx::{self, Bundle, TdReport, TdxPolicy};
use sealpod_attestation::x509::{Certificate, Crl};
use sealpod_attestation::{
    Collateral, Timestamp, TrustAnchors, encoding, evidence, measure, token,
};

/// Xorshift: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

/// Hands the bytes to everything that reads bytes from outside. Returns whether any verifier
/// accepted them, which none may without endorsements.
fn feed(bytes: &[u8]) -> bool {
    let anchors = TrustAnchors::production();
    let none = Collateral::default();
    let now = Timestamp(1_795_000_000);
    let _ = Certificate::parse(bytes);
    let _ = Crl::parse(bytes);
    let _ = OcspResponse::parse(bytes);
    let _ = Rim::parse(bytes);
    let _ = Element::parse(bytes).map(|e| e.canonical(&|_| false));
    let _ = TdReport::parse(bytes);
    let _ = measure::mr_td(bytes);
    let _ = measure::rtmr1(bytes);
    let _ = InitData::parse(bytes);
    let _ = evidence::Bundle::from_json(bytes);
    let _ = snp::cert_table(bytes);
    let _ = tdx::parse_event_log(bytes).map(|e| tdx::replay(&e));
    let _ = Collateral::default().add(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = Bundle::parse(text);
        let _ = ReferenceValues::parse(text);
        let _ = TrustAnchors::from_file_text(text);
        let _ = nvidia::parse_evidence_json(text);
        let _ = encoding::pem_blocks(text);
        let _ = token::peek(text);
        let _ = Policy::from_rego(text);
        let _ = text.parse::<Timestamp>();
    }
    let device = Device {
        report: bytes.to_vec(),
        ..Device::default()
    };
    snp::verify(bytes, &none, &SnpPolicy::default(), &anchors, now).accepted()
        || tdx::verify(bytes, &none, &TdxPolicy::default(), &anchors, now).accepted()
        || nvidia::verify(&[device], &none, &NvidiaPolicy::default(), &anchors, now).accepted()
}

#[test]
fn random_bytes_are_answered_and_never_accepted() {
    // Beginnings that lead deep into each parser.
    let starts: [&[u8]; 9] = [
        b"",
        &[0x30, 0x82, 0x01, 0x00, 0x30, 0x81, 0x80, 0xa0, 3, 2, 1, 2],
        b"<SoftwareIdentity xmlns='http://standards.iso.org/iso/19770/-2/2015/schema.xsd'><Payload>",
        b"{\"tcb_info\":\"",
        b"-----BEGIN CERTIFICATE-----\n",
        &[0x11, 0xe0, 1, 0xff],
        &[3, 0, 0, 0],
        &[4, 0, 2, 0, 0x81, 0, 0, 0, 0, 0, 0, 0, 0x93, 0x9a, 0x72, 0x33, 0xf7, 0x9c, 0x4c, 0xa9, 0x94, 0x0a, 0x0d, 0xb3, 0x95, 0x7f, 6, 7],
        &[0x81; 32],
    ];
    let mut random = Random(0x5ea1_90d5);
    for round in 0..4000 {
        let length = random.below(if round % 10 == 0 { 6000 } else { 300 });
        let start = starts[random.below(starts.len())];
        let bytes = [start, &random.bytes(length)].concat();
        assert!(!feed(&bytes), "round {round}: {bytes:02x?}");
    }
}

#[test]
fn cut_doubled_and_mixed_real_files_are_answered_and_never_accepted() {
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/evidence");
    let root = std::env::var_os("SEALPOD_EVIDENCE_DIR").map_or(default, PathBuf::from);
    if !root.is_dir() {
        eprintln!(
            "\n*** SKIPPED: no evidence folder at {}; set SEALPOD_EVIDENCE_DIR ***\n",
            root.display()
        );
        return;
    }
    let names = [
        "snp/turin-v5/report.bin",
        "snp/milan-v2b/vcek.der",
        "snp/ca/milan-ask.pem",
        "tdx/v5-td15-uptodate/quote.bin",
        "tdx/tdreport.bin",
        "tdx/v4-emr-uptodate/collateral.json",
        "gpu/h100-550.90-GREEN/report.bin",
        "gpu/h100-550.90-GREEN/ocsp/gpu_rim_l2.der",
        "gpu/h100-550.90-GREEN/driver-rim.xml",
        "gpu/switch-ls10-GREEN/evidence.json",
    ];
    let files: Vec<Vec<u8>> = names
        .iter()
        .map(|n| std::fs::read(root.join(n)).expect("file of the evidence folder"))
        .collect();
    let mut random = Random(0x0ff1_ce00);
    for round in 0..1500 {
        let (a, b) = (
            &files[random.below(files.len())],
            &files[random.below(files.len())],
        );
        let bytes = match round % 3 {
            0 => a[..random.below(a.len())].to_vec(),
            1 => [&a[..random.below(a.len())], &b[random.below(b.len())..]].concat(),
            _ => {
                let mut bytes = a.clone();
                for _ in 0..=random.below(8) {
                    let at = random.below(bytes.len());
                    bytes[at] = random.next() as u8;
                }
                bytes
            }
        };
        assert!(!feed(&bytes), "round {round}");
    }
}
