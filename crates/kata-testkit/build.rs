//! Generates the messages of `proto/cri.proto` with a parser in Rust: no protoc is needed.

use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/cri.proto");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    protobuf_codegen::Codegen::new().pure().out_dir(&out).include("proto").input("proto/cri.proto").run()?;
    // It carries inner attributes, so it cannot be included as text.
    let module = format!("#[path = {:?}]\npub mod api;\n", out.join("cri.rs"));
    Ok(std::fs::write(out.join("api.rs"), module)?)
}
