//! The token as gates check it: each check refuses by its own name. `jsonwebtoken` is the oracle that
//! what is signed here is the JWT everybody reads, and that what others sign is read here.

use std::collections::BTreeMap;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use sealpod_attestation::binding::{EphemeralKey, Nonce, PublicKey};
use sealpod_attestation::encoding::{base64url, hex};
use sealpod_attestation::signer::Signer;
use sealpod_attestation::token::{
    self, CPU, Claims, Confirmation, Expected, PROFILE, Submodule, Tier, TokenError, TrustVector,
    VerifierId, check,
};

const NOW: u64 = 1_800_000_000;

fn part(device: Option<&str>) -> Submodule {
    Submodule {
        status: Tier::Affirming,
        trust: TrustVector::default(),
        policy: String::new(),
        tee: if device.is_some() { "nvidia" } else { "snp" }.into(),
        sim: false,
        measurement: None,
        device_id: device.map(str::to_owned),
    }
}

fn claims() -> Claims {
    Claims {
        eat_profile: PROFILE.into(),
        iss: "verifier".into(),
        aud: "gate".into(),
        jti: "1".into(),
        iat: NOW,
        nbf: NOW,
        exp: NOW + 300,
        eat_nonce: Nonce([1; 32]),
        verifier: VerifierId {
            build: "test".into(),
            developer: "test".into(),
        },
        submods: BTreeMap::from([
            (CPU.into(), part(None)),
            ("gpu0".into(), part(Some("0000:01:00.0"))),
        ]),
        cnf: Confirmation { jwk: guest() },
        pod_uid: "pod".into(),
        policy_digest: String::new(),
        evidence_digest: String::new(),
        init_data_digest: hex(&[5; 48]),
        devices: vec!["0000:01:00.0".into()],
        sim: false,
    }
}

fn guest() -> PublicKey {
    EphemeralKey::from_random(&[1; 48]).expect("key").public()
}

/// Signs the claims after a change, and checks them as a gate that asks for everything does.
fn gate(signer: &Signer, change: impl Fn(&mut Claims)) -> Result<Claims, TokenError> {
    let mut claims = claims();
    change(&mut claims);
    at_gate(signer, &signer.token(&claims).expect("token"))
}

fn at_gate(signer: &Signer, token: &str) -> Result<Claims, TokenError> {
    let (guest, nonce, devices) = (guest(), Nonce([1; 32]), ["0000:01:00.0".to_owned()]);
    let expected = Expected {
        verifiers: &[*signer.public()],
        audience: "gate",
        pod_uid: "pod",
        confirmation: Some(&guest),
        nonce: Some(&nonce),
        init_data_digest: Some(&[5; 48]),
        now: NOW + 1,
        allow_simulated: false,
        devices: &devices,
    };
    check(token, &expected)
}

#[test]
fn a_token_that_says_what_the_gate_asks_opens_it() {
    let signer = Signer::generate().unwrap();
    assert_eq!(gate(&signer, |_| {}), Ok(claims()));
    let kept = Signer::from_pkcs8(&signer.to_pkcs8().unwrap()).unwrap();
    assert_eq!(gate(&kept, |_| {}), Ok(claims()));
    assert_eq!(kept.public(), signer.public());
}

#[test]
fn each_claim_that_differs_is_refused_by_its_name() {
    let s = Signer::generate().unwrap();
    let refused = |change: &dyn Fn(&mut Claims)| gate(&s, change).unwrap_err();
    assert!(matches!(
        refused(&|c| c.aud = "other".into()),
        TokenError::Audience { .. }
    ));
    assert!(matches!(
        refused(&|c| c.pod_uid = "other".into()),
        TokenError::Pod { .. }
    ));
    assert!(matches!(
        refused(&|c| c.eat_profile = "x".into()),
        TokenError::Profile(_)
    ));
    assert_eq!(
        refused(&|c| c.eat_nonce = Nonce([2; 32])),
        TokenError::Nonce
    );
    let other = EphemeralKey::from_random(&[2; 48]).unwrap().public();
    assert_eq!(refused(&|c| c.cnf.jwk = other), TokenError::Confirmation);
    assert_eq!(
        refused(&|c| c.init_data_digest = hex(&[6; 48])),
        TokenError::InitData
    );
    assert_eq!(refused(&|c| c.sim = true), TokenError::Simulated);
    let part_is_simulated = |c: &mut Claims| c.submods.get_mut("gpu0").unwrap().sim = true;
    assert_eq!(refused(&part_is_simulated), TokenError::Simulated);
    assert!(matches!(
        refused(&|c| c.exp = NOW + 1),
        TokenError::Expired(..)
    ));
    assert!(matches!(
        refused(&|c| c.exp = NOW + 301),
        TokenError::Life(301)
    ));
    assert!(matches!(
        refused(&|c| {
            c.nbf = NOW + 100;
        }),
        TokenError::Early(..)
    ));
    for tier in [Tier::None, Tier::Warning, Tier::Contraindicated] {
        for part in [CPU, "gpu0"] {
            let change = |c: &mut Claims| c.submods.get_mut(part).unwrap().status = tier;
            assert!(matches!(refused(&change), TokenError::Status { part: p, .. } if p == part));
        }
    }
    assert!(matches!(
        refused(&|c| drop(c.submods.remove(CPU))),
        TokenError::Status { .. }
    ));
    assert!(matches!(
        refused(&|c| drop(c.submods.remove("gpu0"))),
        TokenError::Status { .. }
    ));
    assert!(matches!(
        refused(&|c| c.devices.clear()),
        TokenError::Status { .. }
    ));
}

#[test]
fn a_token_of_another_verifier_or_with_any_changed_character_is_refused() {
    let (signer, other) = (Signer::generate().unwrap(), Signer::generate().unwrap());
    let token = signer.token(&claims()).unwrap();
    assert!(matches!(at_gate(&other, &token), Err(TokenError::Key(_))));
    // A prime step meets all three parts and every place within a base64 group.
    for at in (0..token.len()).step_by(7) {
        let mut bytes = token.clone().into_bytes();
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(bytes).unwrap();
        assert!(at_gate(&signer, &changed).is_err(), "character {at}");
    }
    for broken in ["", "..", "a.b", "a.b.c.d", &token[..token.len() - 1]] {
        assert!(at_gate(&signer, broken).is_err(), "{broken}");
    }
    assert_eq!(
        at_gate(&signer, &"a".repeat(token::MAX_TOKEN + 1)),
        Err(TokenError::Form("longer than 64 KiB"))
    );
}

#[test]
fn headers_that_choose_an_algorithm_or_extensions_are_refused() {
    let signer = Signer::generate().unwrap();
    let token = signer.token(&claims()).unwrap();
    let body = token.split('.').nth(1).unwrap();
    let kid = signer.public().thumbprint();
    for header in [
        format!(r#"{{"alg":"none","kid":"{kid}","typ":"JWT"}}"#),
        format!(r#"{{"alg":"ES256","kid":"{kid}","typ":"JWT"}}"#),
        format!(r#"{{"alg":"HS384","kid":"{kid}","typ":"JWT"}}"#),
        format!(r#"{{"alg":"ES384","kid":"{kid}","typ":"JWT","crit":["b64"],"b64":false}}"#),
        r#"{"alg":"ES384","typ":"JWT"}"#.into(),
    ] {
        let input = format!("{}.{body}", base64url(header.as_bytes()));
        let signed = token::assemble(&input, &signer.sign(input.as_bytes()).unwrap());
        assert_eq!(
            at_gate(&signer, &signed),
            Err(TokenError::Header),
            "{header}"
        );
    }
}

#[test]
fn jsonwebtoken_reads_what_is_signed_here_and_signs_what_is_read_here() {
    let signer = Signer::generate().unwrap();
    let token = signer.token(&claims()).unwrap();
    let mut validation = Validation::new(Algorithm::ES384);
    validation.set_audience(&["gate"]);
    validation.validate_exp = false;
    let key = DecodingKey::from_ec_der(signer.public().point());
    let read = jsonwebtoken::decode::<Claims>(&token, &key, &validation).unwrap();
    assert_eq!(read.claims, claims());
    assert_eq!(read.header.kid, Some(signer.public().thumbprint()));

    let mut header = Header::new(Algorithm::ES384);
    header.kid = Some(signer.public().thumbprint());
    let key = EncodingKey::from_ec_der(&signer.to_pkcs8().unwrap());
    let token = jsonwebtoken::encode(&header, &claims(), &key).unwrap();
    assert_eq!(at_gate(&signer, &token), Ok(claims()));
}
