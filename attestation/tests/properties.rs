//! Properties of what guest and verifier exchange, over generated values: nothing is lost or
//! confused on the way, and the small readers agree with the large ones.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use sealpod_attestation::binding::{self, EphemeralKey, Nonce};
use sealpod_attestation::challenge::Challenge;
use sealpod_attestation::evidence::{Bundle, GpuEvidence, Tee};
use sealpod_attestation::init_data::InitData;
use sealpod_attestation::snp::{Product, Tcb};
use sealpod_attestation::token;

fn bundle() -> impl Strategy<Value = Bundle> {
    let bytes = || vec(any::<u8>(), 0..200);
    let names = btree_map("[a-zA-Z0-9.:_-]{1,64}", (bytes(), bytes()), 0..4);
    (any::<bool>(), [bytes(), bytes(), bytes(), bytes()], names).prop_map(|(snp, parts, gpus)| {
        let [report, endorsements, event_log, init_data] = parts;
        let key = EphemeralKey::from_random(&[1; 48]).expect("key").public();
        Bundle {
            tee: if snp { Tee::Snp } else { Tee::Tdx },
            report,
            endorsements,
            event_log,
            gpus: gpus
                .into_iter()
                .map(|(device_id, (report, certificates))| GpuEvidence {
                    device_id,
                    report,
                    certificates,
                })
                .collect(),
            key,
            init_data,
        }
    })
}

/// Texts that look like init-data more often than random ones do.
fn documents() -> impl Strategy<Value = String> {
    let piece = prop::sample::select(vec![
        "version = \"0.1.0\"\n",
        "algorithm = \"sha384\"\n",
        "[data]\n",
        "a = ",
        "\"b c\" = ",
        "'d' = ",
        "'x'",
        "\"y\\n\\u00e9\"",
        "'''\nz'\n'''",
        "\"\"\"p \\\n  q\"\"\"",
        "\"\"\"\"\"\"\"",
        "''''''",
        "\n",
        "\r\n",
        " # c\n",
        "\t",
        "\\",
        "'",
        "\"",
        "1",
        ".",
        "e = \"v\"\n",
        "é",
    ]);
    let head = "version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n";
    vec(piece, 0..12).prop_map(move |pieces| format!("{head}{}", pieces.concat()))
}

/// The entries as the `toml` crate reads them.
fn reference(text: &str) -> Option<std::collections::BTreeMap<String, String>> {
    let table: toml::Table = text.parse().ok()?;
    let data = table.get("data")?.as_table()?;
    data.iter()
        .map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
        .collect()
}

proptest! {
    #[test]
    fn written_init_data_is_read_as_it_was(data in btree_map(".{0,20}", ".{0,60}", 0..8)) {
        let init = InitData { data };
        let text = init.to_text();
        let read = InitData::parse(text.as_bytes());
        prop_assert_eq!(read.as_ref(), Ok(&init));
        prop_assert_eq!(reference(&text), Some(init.data));
    }

    #[test]
    fn what_is_read_as_init_data_is_toml_and_says_the_same(text in documents()) {
        if let Ok(init) = InitData::parse(text.as_bytes()) {
            prop_assert_eq!(reference(&text), Some(init.data), "{}", text);
        }
    }

    #[test]
    fn a_bundle_arrives_as_it_was_sent(bundle in bundle()) {
        let json = bundle.to_json().expect("within its caps");
        let read = Bundle::from_json(&json).expect("read");
        prop_assert_eq!(read.digest(), bundle.digest());
        prop_assert_eq!(read, bundle);
    }

    #[test]
    fn bundles_that_differ_have_other_digests(a in bundle(), b in bundle()) {
        prop_assert_eq!(a == b, a.digest() == b.digest());
    }

    #[test]
    fn report_data_differs_with_every_input(
        a in (any::<[u8; 32]>(), any::<u8>(), any::<u8>(), any::<u8>(), ".{0,40}"),
        b in (any::<[u8; 32]>(), any::<u8>(), any::<u8>(), any::<u8>(), ".{0,40}"),
    ) {
        let data = |i: &([u8; 32], u8, u8, u8, String)| {
            binding::report_data(&Nonce(i.0), &[i.1; 48], &[i.2; 48], &[i.3; 48], &i.4)
        };
        prop_assert_eq!(a == b, data(&a) == data(&b));
    }

    #[test]
    fn random_text_is_no_token_no_bundle_and_no_challenge(text in ".{0,300}") {
        prop_assert!(token::authenticate(&text, &[]).is_err());
        prop_assert!(token::peek(&text).is_err());
        prop_assert!(Bundle::from_json(text.as_bytes()).is_err());
        prop_assert!(serde_json::from_str::<Challenge>(&text).is_err());
    }

    #[test]
    fn a_tcb_survives_its_layout(levels in any::<[u8; 5]>()) {
        let [fmc, bootloader, tee, snp, microcode] = levels;
        for product in [Product::Milan, Product::Genoa, Product::Turin] {
            let fmc = if product == Product::Turin { fmc } else { 0 };
            let tcb = Tcb { fmc, bootloader, tee, snp, microcode };
            prop_assert_eq!(Tcb::from_bytes(tcb.to_bytes(product), product), Some(tcb));
        }
    }
}
