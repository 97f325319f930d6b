//! `inspect`: decodes a file and prints what it says. Nothing is verified, and the output says so.

use std::path::PathBuf;

use clap::Args;
use sealpod_attestation::nvidia::{self, Rim};
use sealpod_attestation::ocsp::OcspResponse;
use sealpod_attestation::snp::{Report, Vek};
use sealpod_attestation::tdx::{self, Bundle, Pck, Quote, TdReport};
use sealpod_attestation::verdict::{Tee, chain_text};
use sealpod_attestation::x509::{Certificate, Crl};
use sealpod_attestation::{anchors, der, encoding};
use serde_json::{Value, json};

use crate::{Done, input, output};

#[derive(Args)]
pub(crate) struct InspectArgs {
    /// The file to decode; `-` for standard input
    file: PathBuf,
}

pub(crate) fn run(args: &InspectArgs) -> anyhow::Result<Done> {
    let bytes = input::read_evidence(&args.file)?;
    let (kind, value) = decode(&bytes)
        .map_err(|e| anyhow::anyhow!("{}: {}", args.file.display(), output::clean(&e)))?;
    let text = serde_json::to_string_pretty(
        &json!({ "kind": kind, "verified": false, "content": value }),
    )?;
    output::print(
        &(text
            + "
"),
    )?;
    Ok(Done::Accepted)
}

type Decoded = (&'static str, Value);

fn decode(bytes: &[u8]) -> Result<Decoded, String> {
    let text = std::str::from_utf8(bytes).ok().map(str::trim_start);
    match text {
        Some(t) if t.starts_with('<') => return rim(bytes),
        Some(t) if t.starts_with('{') || t.starts_with('[') => return json_text(t),
        Some(t) if t.contains("-----BEGIN ") => return pem(t),
        Some(t) if t.split('.').count() == 3 && t.len() < 65536 => return token(t.trim()),
        _ => {}
    }
    if tdx::looks_like_event_log(bytes) {
        return event_log(bytes);
    }
    if let Ok(report) = TdReport::parse(bytes) {
        return Ok(("tdx-tdreport", report.claims()));
    }
    match input::detect(bytes) {
        Some(Tee::Snp) => {
            let report = Report::parse(bytes).map_err(|e| chain_text(&e))?;
            Ok(("snp-report", report.claims(report.product())))
        }
        Some(Tee::Tdx) => Ok((
            "tdx-quote",
            quote(&Quote::parse(bytes).map_err(|e| chain_text(&e))?),
        )),
        Some(Tee::Nvidia) => Ok((
            "nvidia-report",
            nvidia::Report::parse(bytes)
                .map_err(|e| chain_text(&e))?
                .claims(),
        )),
        None => binary(bytes),
    }
}

fn quote(quote: &Quote<'_>) -> Value {
    let mut claims = quote.claims();
    if let Value::Object(map) = &mut claims {
        let chain = pem(quote.pck_chain).map_or_else(Value::from, |(_, v)| v);
        map.insert("pck_chain".into(), chain);
    }
    claims
}

fn binary(bytes: &[u8]) -> Result<Decoded, String> {
    if let Ok(response) = OcspResponse::parse(bytes) {
        return Ok(("ocsp-response", Value::Array(response.describe())));
    }
    if let Ok(crl) = Crl::parse(bytes) {
        return Ok(("crl", describe_crl(&crl)));
    }
    match Certificate::parse(bytes) {
        Ok(certificate) => Ok(("certificate", describe(&certificate))),
        Err(_) => Err("Not a report, quote, certificate, CRL, OCSP response, RIM, event log or token that is known".into()),
    }
}

fn pem(text: &str) -> Result<Decoded, String> {
    let mut list = Vec::new();
    for (label, bytes) in encoding::pem_blocks(text).map_err(|e| chain_text(&e))? {
        list.push(match label.as_str() {
            "CERTIFICATE" => describe(&Certificate::parse(&bytes).map_err(|e| chain_text(&e))?),
            "X509 CRL" => describe_crl(&Crl::parse(&bytes).map_err(|e| chain_text(&e))?),
            _ => json!({ "label": label, "bytes": bytes.len() }),
        });
    }
    Ok(("pem", Value::Array(list)))
}

fn describe(certificate: &Certificate<'_>) -> Value {
    let vek = Vek::from_certificate(certificate).ok().map(|v| {
        json!({ "kind": v.kind, "product": v.product, "tcb": v.tcb, "hwid": v.hwid.as_deref().map(encoding::hex), "csp_id": v.csp_id })
    });
    let pck = Pck::from_certificate(certificate).ok().map(|p| {
        json!({
            "fmspc": encoding::hex(&p.fmspc), "ppid": encoding::hex(&p.ppid), "pce_id": encoding::hex(&p.pce_id),
            "cpu_svn": encoding::hex(&p.cpu_svn), "pce_svn": p.pce_svn,
        })
    });
    json!({
        "subject": certificate.label(),
        "serial": encoding::hex(certificate.serial),
        "not_before": certificate.not_before.to_string(),
        "not_after": certificate.not_after.to_string(),
        "pin": anchors::pin_text(certificate),
        "extensions": certificate.extensions.iter().map(|e| der::oid_text(e.oid)).collect::<Vec<_>>(),
        "amd": vek,
        "intel": pck,
    })
}

fn describe_crl(crl: &Crl<'_>) -> Value {
    json!({ "this_update": crl.this_update.to_string(), "next_update": crl.next_update.to_string(), "revoked": crl.revoked().map(encoding::hex).collect::<Vec<_>>() })
}

fn rim(bytes: &[u8]) -> Result<Decoded, String> {
    let rim = Rim::parse(bytes).map_err(|e| chain_text(&e))?;
    let golden: serde_json::Map<String, Value> = rim
        .golden
        .iter()
        .map(|(i, v)| {
            (
                i.to_string(),
                v.iter()
                    .map(|h| encoding::hex(h))
                    .collect::<Vec<_>>()
                    .into(),
            )
        })
        .collect();
    let chain: Vec<Value> = rim
        .chain
        .iter()
        .filter_map(|der| Certificate::parse(der).ok().map(|c| describe(&c)))
        .collect();
    Ok((
        "nvidia-rim",
        json!({ "product": rim.product, "version": rim.version, "kind": format!("{:?}", rim.kind), "golden": golden, "chain": chain }),
    ))
}

fn json_text(text: &str) -> Result<Decoded, String> {
    if let Ok(devices) = nvidia::parse_evidence_json(text) {
        let list: Result<Vec<Value>, String> = devices
            .iter()
            .map(|d| Ok(json!({ "name": d.name, "report": nvidia::Report::parse(&d.report).map_err(|e| chain_text(&e))?.claims(), "certificates": d.chain.len() })))
            .collect();
        return Ok(("nvidia-evidence", Value::Array(list?)));
    }
    let bundle = Bundle::parse(text).map_err(|e| chain_text(&e))?;
    let parse = |t: &str| serde_json::from_str::<Value>(t).map_err(|e| chain_text(&e));
    Ok((
        "tdx-collateral",
        json!({ "tcb_info": parse(&bundle.tcb_info_text)?, "qe_identity": parse(&bundle.qe_identity_text)? }),
    ))
}

fn event_log(bytes: &[u8]) -> Result<Decoded, String> {
    let events = tdx::parse_event_log(bytes).map_err(|e| chain_text(&e))?;
    let replayed = tdx::replay(&events);
    let list: Vec<Value> = events
        .iter()
        .map(|e| json!({ "register": e.register, "type": format!("0x{:x}", e.kind), "digest": encoding::hex(&e.digest), "bytes": e.data.len() }))
        .collect();
    Ok((
        "tdx-event-log",
        json!({ "rtmr": replayed.iter().map(|r| encoding::hex(r)).collect::<Vec<_>>(), "events": list }),
    ))
}

fn token(text: &str) -> Result<Decoded, String> {
    let part = |p: &str| {
        let bytes = encoding::unbase64url(p).map_err(|e| chain_text(&e))?;
        serde_json::from_slice::<Value>(&bytes).map_err(|e| chain_text(&e))
    };
    let parts: Vec<&str> = text.split('.').collect();
    Ok((
        "token",
        json!({ "header": part(parts[0])?, "claims": part(parts[1])? }),
    ))
}
