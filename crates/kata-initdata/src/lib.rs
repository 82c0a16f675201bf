//! Initdata: a TOML document of named files that the guest is given with its machine, and that its hardware can vouch for.
//!
//! ```text
//!   annotation ── base64 ── gzip ── TOML ──┬── digest ── host data of the TEE ─────────────┐ compared by the verifiers
//!   (host)                                 └── image ── disk "initdata" ── TOML ── digest ─┘ (guest)
//!                                                                           └── /run/measured-cfg/<key>, if all of them agree
//! ```
//!
//! The digest is that of the TOML's bytes, so they are carried as they are and never written anew. The host is not trusted
//! by the guest and the guest not by the host: both read the document with the same bounds.

mod document;
#[cfg(feature = "guest")]
pub mod guest;
mod image;

pub use document::{Algorithm, DocumentError, Initdata, POLICY};
pub use image::{ImageError, SERIAL, read_image, write_image};
