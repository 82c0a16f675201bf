//! `-info` and `-v`: what runtime this is.

use std::io::{self, Write};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::Message;

/// The name that containerd's clients select it by.
const RUNTIME: &str = "io.containerd.kata.v2";

/// Writes containerd's `RuntimeInfo` (api/types/introspection.proto). Standard input may hold options, which change nothing.
pub(crate) fn run() -> io::Result<()> {
    let version =
        RuntimeVersion { version: env!("CARGO_PKG_VERSION").to_owned(), ..RuntimeVersion::default() };
    let info =
        RuntimeInfo { name: RUNTIME.to_owned(), version: Some(version).into(), ..RuntimeInfo::default() };
    io::stdout().write_all(&info.write_to_bytes().map_err(io::Error::other)?)
}

/// The version as clients of containerd print it.
pub(crate) fn version() -> String {
    format!("containerd-shim-kata-v2 {}", env!("CARGO_PKG_VERSION"))
}
