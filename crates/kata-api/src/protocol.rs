//! Generated code, one module per file of `proto/`.
#![allow(missing_docs, clippy::all, clippy::expect_used, clippy::unwrap_used, reason = "generated")]

include!(concat!(env!("OUT_DIR"), "/proto/modules.rs"));
