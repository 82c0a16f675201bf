//! vsock ports. All but [`READY`] are listened on by the guest, and are upstream's numbers.

/// Agent and health services (ttrpc).
pub const AGENT: u32 = 1024;
/// The agent's log, one JSON object a line.
pub const LOG: u32 = 1025;
/// An interactive shell for debugging, if the image has one and the administrator enabled it.
pub const DEBUG_CONSOLE: u32 = 1026;
/// Standard streams of processes. The host opens one connection per stream; the guest knows each by the port the
/// host side got, and requests name these ports in `stdin_port`, `stdout_port` and `stderr_port`.
pub const STREAM: u32 = 1027;
/// Listened on by the host: the agent dials it once it serves, and writes an [`Announcement`](crate::Announcement).
pub const READY: u32 = 1028;
/// Ways to what listens on the guest's loopback, one connection each: see [`Forward`](crate::Forward).
pub const FORWARD: u32 = 1029;
