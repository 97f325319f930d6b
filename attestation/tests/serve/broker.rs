//! Clients of Trustee's key broker: the handshake with evidence as its attesters send it, and resources
//! that only the holder of the attested key can read.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce as Iv, UnboundKey};
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey, UnparsedPublicKey, agree};
use aws_lc_rs::digest;
use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use sealpod_attestation::encoding::{base64, base64url, unbase64url};
use sealpod_attestation::evidence::Tee;
use sealpod_attestation::kbs::{Binding, TeePubKey};
use sealpod_attestation::token;
use serde_json::{Value, json};

use crate::client::{Answer, post, send};
use crate::lab::{Server, cpu, gpu};

/// A client with its key.
struct Client {
    private: PrivateKey,
    public: TeePubKey,
}

impl Client {
    fn new() -> Self {
        let private = PrivateKey::generate(&ECDH_P256).unwrap();
        let point = private.compute_public_key().unwrap();
        let (x, y) = point.as_ref()[1..].split_at(32);
        let public = TeePubKey::EC {
            crv: "P-256".into(),
            alg: "ECDH-ES+A256KW".into(),
            x: base64url(x),
            y: base64url(y),
        };
        Self { private, public }
    }

    /// Opens a resource (RFC 7516, RFC 7518 section 4.6).
    fn open(&self, sealed: &Value) -> Vec<u8> {
        let part = |name: &str| unbase64url(sealed[name].as_str().unwrap()).unwrap();
        let header: Value = serde_json::from_slice(&part("protected")).unwrap();
        let member = |name: &str| unbase64url(header["epk"][name].as_str().unwrap()).unwrap();
        let point = [vec![4], member("x"), member("y")].concat();
        let kek = agree(
            &self.private,
            UnparsedPublicKey::new(&ECDH_P256, &point),
            (),
            |z| {
                let fields = [
                    &[0, 0, 0, 1],
                    z,
                    &[0, 0, 0, 14],
                    b"ECDH-ES+A256KW",
                    &[0; 8],
                    &[0, 0, 1, 0],
                ];
                Ok(digest::digest(&digest::SHA256, &fields.concat()))
            },
        );
        let kek = AesKek::new(&AES_256, kek.unwrap().as_ref()).unwrap();
        let mut content = [0; 40];
        let content = kek.unwrap(&part("encrypted_key"), &mut content).unwrap();
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, content).unwrap());
        let mut data = [part("ciphertext"), part("tag")].concat();
        let iv = Iv::try_assume_unique_for_key(&part("iv")).unwrap();
        let aad = Aad::from(sealed["protected"].as_str().unwrap().as_bytes());
        key.open_in_place(iv, aad, &mut data).unwrap().to_vec()
    }
}

/// A session: its cookie and nonce, and the digest that the server chose.
struct Session {
    cookie: String,
    nonce: String,
    binding: Binding,
}

fn cookie(answer: &Answer) -> String {
    let value = answer.header("set-cookie").expect("a cookie");
    assert!(
        value.contains("HttpOnly") && value.contains("Secure"),
        "{value}"
    );
    value.split(';').next().unwrap().to_owned()
}

fn auth(server: &Server, tee: &str, hashes: &[&str]) -> Session {
    let extra = json!({ "supported-hash-algorithms": hashes });
    let body = json!({ "version": "0.4.0", "tee": tee, "extra-params": extra });
    let answer = post(server, "/kbs/v0/auth", &body);
    assert_eq!(answer.status, 200, "{answer:?}");
    let chosen = &answer.json()["extra-params"]["selected-hash-algorithm"];
    Session {
        cookie: cookie(&answer),
        nonce: answer.json()["nonce"].as_str().unwrap().to_owned(),
        binding: match chosen.as_str() {
            Some("sha512") => Binding::Sha512,
            Some("sha384") => Binding::Sha384,
            other => panic!("{other:?}"),
        },
    }
}

/// What a client sends for this session.
fn evidence(session: &Session, client: &Client, tee: Tee, with_gpu: bool) -> Value {
    let (nonce, key) = (&session.nonce, &client.public);
    let additional = if with_gpu {
        let minted = gpu(session.binding.device_nonce(nonce, key));
        let device = json!({
            "arch": "Hopper", "uuid": "GPU-1", "evidence": base64(&minted.report),
            "certificate": base64(&minted.endorsements),
        });
        json!({ "nvidia": ["gpu", { "device_evidence_list": [device] }] }).to_string()
    } else {
        String::new()
    };
    let data = session.binding.report_data(nonce, key, &additional);
    let minted = cpu(tee, data, b"", None);
    let primary = match tee {
        Tee::Tdx => json!({ "quote": base64(&minted.report), "cc_eventlog": null }),
        Tee::Snp => {
            let certificates = sealpod_attestation::snp::cert_table(&minted.endorsements).unwrap();
            let kinds = ["VCEK", "ASK", "ARK"];
            let chain: Vec<Value> = certificates
                .iter()
                .zip(kinds)
                .map(|(data, kind)| json!({ "cert_type": kind, "data": data }))
                .collect();
            json!({ "attestation_report": base64(&minted.report), "cert_chain": chain })
        }
    };
    json!({
        "runtime-data": { "nonce": nonce, "tee-pubkey": key },
        "tee-evidence": { "primary_evidence": primary, "additional_evidence": additional },
    })
}

fn attest(server: &Server, cookie: &str, body: &Value) -> Answer {
    let headers = format!("Cookie: other=1; {cookie}\r\n");
    send(
        server,
        "POST",
        "/kbs/v0/attest",
        &headers,
        &body.to_string(),
    )
}

fn resource(server: &Server, cookie: &str, path: &str) -> Answer {
    let path = format!("/kbs/v0/resource/{path}");
    send(server, "GET", &path, &format!("Cookie: {cookie}\r\n"), "")
}

#[test]
fn a_client_that_proves_itself_gets_its_resource_and_nobody_else_can_read_it() {
    let server = Server::start();
    for (tee, name, hashes, with_gpu) in [
        (Tee::Snp, "snp", &["sha256", "sha384"][..], false),
        (Tee::Tdx, "tdx", &["sha384", "sha512"], false),
        (Tee::Snp, "snp", &["sha512"], true),
    ] {
        let client = Client::new();
        let session = auth(&server, name, hashes);
        let body = evidence(&session, &client, tee, with_gpu);
        let answer = attest(&server, &session.cookie, &body);
        assert_eq!(answer.status, 200, "{answer:?}");
        let text = answer.json()["token"].as_str().unwrap().to_owned();
        let (_, claims) = token::peek(&text).unwrap();
        assert_eq!(claims["cnf"]["jwk"], json!(client.public), "{claims}");
        assert_eq!(claims["aud"], "kbs");
        assert_eq!(
            claims["submods"].as_object().unwrap().len(),
            1 + usize::from(with_gpu)
        );
        let given = resource(&server, &session.cookie, "default/key/one");
        assert_eq!(given.status, 200, "{given:?}");
        assert!(!given.body.contains("a secret"));
        assert_eq!(client.open(&given.json()), b"a secret");
    }
    let events: Vec<String> = server.records().into_iter().map(|r| r.event).collect();
    assert_eq!(events, ["client-appraisal", "resource"].repeat(3));
}

#[test]
fn a_session_is_attested_once_by_evidence_for_it_and_gives_nothing_before() {
    let server = Server::start();
    let client = Client::new();
    let session = auth(&server, "snp", &["sha512"]);
    // Before evidence, with no cookie, with another's.
    for cookie in [
        session.cookie.as_str(),
        "kbs-session-id=",
        "kbs-session-id=guess",
        "a=b",
    ] {
        assert_eq!(resource(&server, cookie, "default/key/one").status, 401);
    }
    let good = evidence(&session, &client, Tee::Snp, false);
    assert_eq!(attest(&server, "kbs-session-id=guess", &good).status, 401);
    // Evidence for another session's nonce uses this session up.
    let other = auth(&server, "snp", &["sha512"]);
    assert_eq!(attest(&server, &other.cookie, &good).status, 401);
    assert_eq!(
        attest(
            &server,
            &other.cookie,
            &evidence(&other, &client, Tee::Snp, false)
        )
        .status,
        401
    );
    // Another key than the one that the evidence vouches for.
    let third = auth(&server, "snp", &["sha512"]);
    let mut stolen = evidence(&third, &client, Tee::Snp, false);
    stolen["runtime-data"]["tee-pubkey"] = json!(Client::new().public);
    let refused = attest(&server, &third.cookie, &stolen);
    assert_eq!(refused.status, 401);
    assert!(refused.body.contains("report-data"), "{refused:?}");
    // The first is still good, once.
    assert_eq!(attest(&server, &session.cookie, &good).status, 200);
    assert_eq!(attest(&server, &session.cookie, &good).status, 401);
    assert_eq!(
        resource(&server, &session.cookie, "default/key/one").status,
        200
    );
}

#[test]
fn no_path_leads_out_of_the_store() {
    let server = Server::start();
    let client = Client::new();
    let session = auth(&server, "tdx", &["sha384"]);
    let answer = attest(
        &server,
        &session.cookie,
        &evidence(&session, &client, Tee::Tdx, false),
    );
    assert_eq!(answer.status, 200, "{answer:?}");
    let key = server.dir.path().join("resources/default/key");
    std::os::unix::fs::symlink("../../../state/verifier-key.p8", key.join("link")).unwrap();
    for path in [
        "../state/verifier-key.p8",
        "default/../../state",
        "default/key/../../../state/verifier-key.p8",
        "default/key/%2e%2e",
        "%2e%2e/state/verifier-key.p8",
        "default/key/link",
        "default/key/.hidden",
        "default/key/two",
        "default/key",
        "",
        "//",
        "default/key/one/",
        "default/key/one%00",
    ] {
        let answer = resource(&server, &session.cookie, path);
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
    }
    // What is looked up is the path alone.
    assert_eq!(
        resource(&server, &session.cookie, "default/key/one?x=../y").status,
        200
    );
    let released: Vec<String> = (server.records().into_iter())
        .filter(|r| r.event == "resource")
        .map(|r| r.audience)
        .collect();
    assert_eq!(released, ["default/key/one"]);
}
