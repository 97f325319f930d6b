//! Generates the Rust side of `proto/`, without protoc.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> std::io::Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let out = std::env::var("OUT_DIR").map_err(std::io::Error::other)?;
    Codegen::new()
        .out_dir(&out)
        .inputs(["proto/agent.proto", "proto/cri.proto", "proto/vmm.proto"])
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .customize(Customize {
            async_all: true,
            gen_mod: false,
            ..Default::default()
        })
        .run()?;
    // The generated files begin with inner attributes: they can only be read as files of their own.
    let modules =
        "pub mod agent;\npub mod agent_ttrpc;\npub mod cri;\npub mod vmm;\npub mod vmm_ttrpc;\n";
    std::fs::write(std::path::Path::new(&out).join("mod.rs"), modules)
}
