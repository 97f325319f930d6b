//! Writes first inputs for the fuzz targets into `<folder>/<target>/`: whole conversations and valid
//! messages, so that fuzzing starts behind the first checks.

#[path = "seeds/attestation.rs"]
mod attestation;

use std::path::{Path, PathBuf};

use protobuf::Message;
use sealpod_protocol::agent as messages;
use sealpod_protocol::streams::{Header as Line, Stdio};
use sealpod_vmm::vsock::{HOST_CID, Header, Op, TYPE_STREAM};

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map(PathBuf::from);
    let folder = folder.ok_or_else(|| std::io::Error::other("Usage: seeds <folder>"))?;
    attestation::seeds(&folder)?;
    write(&folder, "agent_requests", &agent_requests())?;
    write(&folder, "vsock_packets", &vsock_packets())?;
    write(&folder, "vsock_rings", &vsock_rings())
}

pub(crate) fn write(folder: &Path, target: &str, seeds: &[Vec<u8>]) -> std::io::Result<()> {
    let folder = folder.join(target);
    std::fs::create_dir_all(&folder)?;
    for (n, seed) in seeds.iter().enumerate() {
        std::fs::write(folder.join(format!("seed-{n:02}")), seed)?;
    }
    Ok(())
}

const SPEC: &[u8] = br#"{"ociVersion":"1.0.2","process":{"terminal":true,"consoleSize":{"height":25,
"width":80},"user":{"uid":1,"gid":1,"umask":63,"additionalGids":[5,6]},"args":["sh","-c","true"],
"env":["PATH=/bin","A="],"cwd":"/","capabilities":{"bounding":["CAP_KILL"],"effective":["CAP_KILL"]},
"rlimits":[{"type":"RLIMIT_NOFILE","hard":1024,"soft":1024}],"noNewPrivileges":true,"oomScoreAdj":5},
"root":{"path":"rootfs","readonly":true},"hostname":"h","mounts":[{"destination":"/proc","type":
"proc","source":"proc","options":["nosuid","ro"]}],"hooks":{"prestart":[{"path":"/bin/true"}]},
"annotations":{"a":"b"},"linux":{"uidMappings":[{"containerID":0,"hostID":0,"size":1}],"sysctl":{
"net.ipv4.ip_forward":"1"},"resources":{"devices":[{"allow":false,"access":"rwm"}],"memory":{"limit":
1048576},"cpu":{"shares":2,"quota":100,"period":1000,"cpus":"0-1"},"pids":{"limit":10},
"hugepageLimits":[{"pageSize":"2MB","limit":5}]},"cgroupsPath":"/a/b","namespaces":[{"type":"pid"},
{"type":"network","path":"/proc/1/ns/net"}],"devices":[{"path":"/dev/null","type":"c","major":1,
"minor":3,"fileMode":438}],"seccomp":{"defaultAction":"SCMP_ACT_ERRNO","architectures":[
"SCMP_ARCH_X86_64"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,
"value":1,"op":"SCMP_CMP_EQ"}]}]},"maskedPaths":["/proc/kcore"],"readonlyPaths":["/proc/sys"],
"rootfsPropagation":"rslave"}}"#;

fn agent_requests() -> Vec<Vec<u8>> {
    let exec = br#"{"args":["true"],"cwd":"/","env":[],"user":{"uid":0,"gid":0}}"#;
    let resources = br#"{"memory":{"limit":1048576,"swap":-1},"cpu":{"quota":-1,"cpus":"0"}}"#;
    let setup = messages::SetupSandboxRequest {
        hostname: "pod".into(),
        entropy: vec![7; 32],
        sysctls: [("net.core.somaxconn".to_owned(), "1".to_owned())].into(),
        network: Some(network()).into(),
        ..Default::default()
    };
    let create = messages::CreateContainerRequest {
        container_id: "c1".into(),
        spec: SPEC.to_vec(),
        rootfs: "c1/rootfs".into(),
        block_devices: vec![messages::BlockDevice {
            serial: "disk".into(),
            path: "/dev/x".into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let exec_request = messages::ExecRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process: exec.to_vec(),
        ..Default::default()
    };
    let update = messages::UpdateRequest {
        container_id: "c1".into(),
        resources: resources.to_vec(),
        ..Default::default()
    };
    let process = messages::ProcessRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        ..Default::default()
    };
    let hello = messages::HelloRequest {
        protocol_version: 1,
        ..Default::default()
    };
    let line = Line::Stdio {
        stream: Stdio::Stdin,
        container_id: "c1".into(),
        exec_id: String::new(),
    };
    let encoded: [(u8, Option<Vec<u8>>); 7] = [
        (0, hello.write_to_bytes().ok()),
        (1, setup.write_to_bytes().ok()),
        (2, network().write_to_bytes().ok()),
        (3, create.write_to_bytes().ok()),
        (5, exec_request.write_to_bytes().ok()),
        (6, process.write_to_bytes().ok()),
        (9, update.write_to_bytes().ok()),
    ];
    let plain: [(u8, &[u8]); 6] = [
        (10, SPEC),
        (11, exec),
        (12, resources),
        (14, b"stdout c1 e1\n"),
        (14, b"tcp 80\n"),
        (14, b"console\n"),
    ];
    let encoded = encoded
        .into_iter()
        .filter_map(|(n, bytes)| Some((n, bytes?)));
    let plain = plain.into_iter().map(|(n, bytes)| (n, bytes.to_vec()));
    encoded
        .chain(plain)
        .chain([(14, line.encode().into_bytes())])
        .map(|(choice, bytes)| [&[choice][..], &bytes].concat())
        .collect()
}

fn network() -> messages::Network {
    messages::Network {
        interfaces: vec![messages::Interface {
            hardware_address: "02:00:00:00:00:01".into(),
            name: "eth0".into(),
            mtu: 1500,
            addresses: vec!["10.0.0.2/24".into(), "fd00::2/64".into()],
            ..Default::default()
        }],
        routes: vec![messages::Route {
            destination: "0.0.0.0/0".into(),
            gateway: "10.0.0.1".into(),
            interface: "eth0".into(),
            ..Default::default()
        }],
        ..Default::default()
    }
}

/// Conversations in the language of `vsock_packets.rs`.
fn vsock_packets() -> Vec<Vec<u8>> {
    const EVENTS: &[u8] = &[9];
    const TAKE: &[u8] = &[4, 0, 16, 0, 0];
    const CONNECT: &[u8] = &[5, 7];
    const RESPONSE: &[u8] = &[0, Op::Response as u8, 0, 0];
    let data = |length: u16| {
        let [low, high] = length.to_le_bytes();
        vec![0, Op::Rw as u8, 0, low, high, 0, 0, 0]
    };
    let packet = |op: Op, which: u8| vec![0, op as u8, which, 0];
    let write = [6, 0, 8, 0, 0, 0].as_slice();
    let read = [7, 0, 8, 0, 0, 0].as_slice();
    let open = [CONNECT, EVENTS, TAKE, RESPONSE, EVENTS].concat();
    let raw = Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 7,
        dst_port: 1024,
        type_: TYPE_STREAM,
        op: Op::Request as u16,
        buf_alloc: 4096,
        ..Header::default()
    };
    vec![
        open.clone(),
        [&open[..], &data(100), read, write, EVENTS, TAKE, TAKE].concat(),
        [
            &open[..],
            &data(60_000),
            &data(60_000),
            &packet(Op::Shutdown, 3),
            TAKE,
            read,
        ]
        .concat(),
        [
            &open[..],
            write,
            &[8, 1, 0],
            EVENTS,
            TAKE,
            TAKE,
            &[8, 2, 0],
            EVENTS,
            TAKE,
        ]
        .concat(),
        [
            &open[..],
            &packet(Op::CreditRequest, 0),
            TAKE,
            &packet(Op::Rst, 0),
        ]
        .concat(),
        [
            &packet(Op::Request, 200)[..],
            TAKE,
            &data(5000),
            EVENTS,
            &[8, 2, 0],
            EVENTS,
            TAKE,
        ]
        .concat(),
        [&[3][..], &raw.encode(), &[0; 4], TAKE, EVENTS].concat(),
        [&open[..], &open, &open, &[8, 0], EVENTS, &open].concat(),
        [&[5, 200, b'C', b'O', b'N'][..], EVENTS].concat(),
    ]
}

/// One transmitted packet and one receive buffer, at the places of `vsock_rings.rs`.
fn vsock_rings() -> Vec<Vec<u8>> {
    let mut image = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let descriptor = |address: u64, length: u32, flags: u16, next: u16| {
        let [address, tail] = [address, u64::from(length)].map(u64::to_le_bytes);
        let rest = [flags.to_le_bytes(), next.to_le_bytes()].concat();
        [&address[..], &tail[..4], &rest].concat()
    };
    // Receive queue: one buffer in two pieces.
    put(0, &descriptor(0x2000, 44, 3, 1));
    put(16, &descriptor(0x2100, 4096, 2, 0));
    put(0x100 + 2, &[1, 0, 0, 0]);
    // Transmit queue: a request for port 1.
    let header = Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: 5,
        dst_port: 1,
        type_: TYPE_STREAM,
        op: Op::Request as u16,
        ..Header::default()
    };
    put(0x400, &descriptor(0x200 + 0x800, 44, 0, 0));
    put(0x400 + 0x100 + 2, &[1, 0, 0, 0]);
    put(0x800, &header.encode());
    let mut indirect = image.clone();
    indirect[0x400..0x410].copy_from_slice(&descriptor(0xc00, 32, 4, 0));
    indirect[0xa00..0xa10].copy_from_slice(&descriptor(0xa00, 20, 1, 1));
    indirect[0xa10..0xa20].copy_from_slice(&descriptor(0xa14, 24, 0, 0));
    vec![image.clone(), indirect, [image.clone(), image].concat()]
}
