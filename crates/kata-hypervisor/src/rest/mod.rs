//! What the drivers of VMMs with an HTTP interface have in common.
//!
//! ```text
//!   boot: room ─▶ VMM ─▶ requests over HTTP ─▶ guest runs
//!           │              └─ client
//!           └─ what the VMM makes or finds by name
//! ```

mod client;
#[cfg(test)]
pub(crate) mod fake;
mod room;

pub use self::client::ApiError;
pub(crate) use self::client::{Address, Call, Client};
pub(crate) use self::room::{Named, Room};

/// The threads of process `pid` that run the guest's CPUs, in the order of the CPUs: those called `name` and a number.
pub(crate) fn vcpu_threads(pid: u32, name: &str) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut found: Vec<(u32, u32)> = threads
        .filter_map(|thread| {
            let comm = std::fs::read_to_string(thread.path().join("comm")).ok()?;
            let cpu = comm.trim_end().strip_prefix(name)?.trim_start().parse().ok()?;
            Some((cpu, thread.file_name().to_str()?.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, thread)| thread).collect()
}

#[cfg(test)]
mod tests;
