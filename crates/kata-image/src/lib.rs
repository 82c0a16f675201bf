//! Guest images: what a virtual machine boots, and how that comes to be.
//!
//! ```text
//!   agent (static program) ─────────────────┐
//!   kernel provider ── vmlinux ── modules ──┤ build      guest-image/
//!     debian │ source │ file                └────────▶     manifest.json   digests, release, capabilities
//!                                                          vmlinux         ELF with a PVH entry
//!                                            manifest      initrd.cpio     /init is the agent
//!   a pod's owner ◀──── Manifest::load ────────────────
//! ```
//!
//! [`manifest`] is always there and is all that a pod's owner links. `build` (a feature) makes images.

#[cfg(feature = "build")]
pub mod build;
pub mod manifest;
