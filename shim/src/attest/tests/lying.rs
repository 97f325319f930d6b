//! An agent that answers the host gate with one lie, and skips its own.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use async_trait::async_trait;
use sealpod_attestation::{
    binding::{EphemeralKey, Nonce, gpu_nonce, key_digest, report_data},
    evidence::{Bundle, GpuEvidence, Tee, gpu_digest},
    init_data,
};
use sealpod_protocol::{
    PROTOCOL_VERSION, agent, agent_ttrpc,
    simulator::{self, Ask, Request},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::r#async::TtrpcContext;

/// How the agent lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lie {
    None,
    /// Evidence over a nonce of before.
    StaleNonce,
    /// The whole answer of before.
    Replay,
    /// Evidence of another pod.
    OtherPod,
    /// A key that the evidence does not bind.
    OtherKey,
    /// Init-data that the evidence does not bind.
    OtherInitData,
    /// No evidence at all.
    Garbage,
    /// Evidence of no device where one was asked for.
    NoDevice,
}

pub(super) struct LyingAgent {
    pub(super) socket: PathBuf,
    pub(super) key: EphemeralKey,
    pub(super) uid: String,
    pub(super) init_data: Vec<u8>,
    /// From the second question on where the first was told the truth.
    pub(super) lie: Arc<Mutex<(Lie, bool)>>,
    pub(super) before: Mutex<Option<(Nonce, Vec<u8>)>>,
    /// How often it was asked to open its gate.
    pub(super) admissions: Arc<AtomicUsize>,
}

impl LyingAgent {
    async fn ask(&self, key: &[u8], ask: Ask) -> (Vec<u8>, Vec<u8>) {
        let mut stream = UnixStream::connect(&self.socket).await.expect("simulator");
        let key = key.try_into().expect("key");
        let request = Request { key, ask }.encode();
        stream.write_all(&request).await.expect("request");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("answer");
        simulator::blobs(&answer).expect("two blobs")
    }

    /// As agent/src/attest does it, but for the lie.
    async fn evidence(&self, request: &agent::AttestRequest, lie: Lie) -> Vec<u8> {
        let asked = Nonce(request.nonce.as_slice().try_into().expect("nonce"));
        let before = self.before.lock().expect("lock").clone();
        let nonce = match (&before, lie) {
            (Some((old, _)), Lie::StaleNonce) => *old,
            (Some((_, answer)), Lie::Replay) => return answer.clone(),
            _ => asked,
        };
        let public = self.key.public();
        let digest = key_digest(&public);
        let mut gpus = Vec::new();
        for id in request.devices.iter().filter(|_| lie != Lie::NoDevice) {
            let ask = Ask::Gpu {
                nonce: gpu_nonce(&nonce, &digest),
                device: id.clone(),
            };
            let (report, certificates) = self.ask(&request.simulator_key, ask).await;
            gpus.push(GpuEvidence {
                device_id: id.clone(),
                report,
                certificates,
            });
        }
        let uid = if lie == Lie::OtherPod {
            "another"
        } else {
            &self.uid
        };
        let init = init_data::digest(&self.init_data);
        let data = report_data(&nonce, &digest, &gpu_digest(&gpus), &init, uid);
        let (report, endorsements) = self.ask(&request.simulator_key, Ask::Report(data)).await;
        let other = EphemeralKey::from_random(&[7; 48]).expect("key").public();
        let bundle = Bundle {
            tee: Tee::Snp,
            report,
            endorsements,
            event_log: Vec::new(),
            gpus,
            key: if lie == Lie::OtherKey { other } else { public },
            init_data: match lie {
                Lie::OtherInitData => {
                    b"version = \"0.1.0\"\nalgorithm = \"sha384\"\n[data]\n".to_vec()
                }
                _ => self.init_data.clone(),
            },
        };
        let json = bundle.to_json().expect("bundle");
        *self.before.lock().expect("lock") = Some((asked, json.clone()));
        json
    }
}

#[async_trait]
impl agent_ttrpc::Agent for LyingAgent {
    async fn hello(
        &self,
        _: &TtrpcContext,
        _: agent::HelloRequest,
    ) -> ttrpc::Result<agent::HelloResponse> {
        Ok(agent::HelloResponse {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        })
    }

    async fn attest(
        &self,
        _: &TtrpcContext,
        request: agent::AttestRequest,
    ) -> ttrpc::Result<agent::AttestResponse> {
        let lie = {
            let mut state = self.lie.lock().expect("lock");
            let now = if state.1 { Lie::None } else { state.0 };
            state.1 = false;
            now
        };
        let bundle = match lie {
            Lie::Garbage => b"{\"tee\":\"snp\"}".to_vec(),
            lie => self.evidence(&request, lie).await,
        };
        Ok(agent::AttestResponse {
            bundle,
            ..Default::default()
        })
    }

    /// Skips its gate.
    async fn admit_devices(
        &self,
        _: &TtrpcContext,
        _: agent::AdmitDevicesRequest,
    ) -> ttrpc::Result<agent::Empty> {
        self.admissions.fetch_add(1, Ordering::SeqCst);
        Ok(agent::Empty::new())
    }
}
