//! Generates the protocol code from `proto/` with a parser in Rust: no protoc is needed.

use std::path::{Path, PathBuf};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

const PROTOS: [&str; 11] = [
    "agent",
    "control",
    "cri",
    "csi",
    "evidence",
    "files",
    "guest_services",
    "health",
    "oci",
    "runtime_options",
    "types",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?).join("proto");
    std::fs::create_dir_all(&out)?;
    let inputs: Vec<String> = PROTOS.iter().map(|name| format!("proto/{name}.proto")).collect();
    for input in &inputs {
        println!("cargo::rerun-if-changed={input}");
    }
    Codegen::new()
        .out_dir(&out)
        .inputs(&inputs)
        .include("proto")
        .rust_protobuf()
        .rust_protobuf_customize(ProtobufCustomize::default())
        .customize(Customize { async_all: true, ..Customize::default() })
        .run()?;
    Ok(std::fs::write(out.join("modules.rs"), modules(&out)?)?)
}

/// A list of the generated files as modules: they carry inner attributes, so they cannot be included as text.
fn modules(out: &Path) -> std::io::Result<String> {
    let mut names: Vec<String> = std::fs::read_dir(out)?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .filter(|name| name != "modules" && name != "mod")
        .collect();
    names.sort();
    Ok(names
        .iter()
        .map(|name| format!("#[path = {:?}]\npub mod {name};\n", out.join(format!("{name}.rs"))))
        .collect())
}
