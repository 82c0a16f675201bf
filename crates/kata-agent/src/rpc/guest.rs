//! Requests about the guest's machine: details, clock, entropy, processors and memory, volumes.

use std::path::{Path, PathBuf};

use kata_api::agent::{
    AgentDetails, GuestDetailsRequest, GuestDetailsResponse, OnlineCPUMemRequest, SetGuestDateTimeRequest,
};
use kata_api::csi::{VolumeStatsResponse, VolumeUsage, volume_usage};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_settime};

use super::error::RpcError;
use crate::{aside, device, entropy, mount};

const CPUS: &str = "/sys/devices/system/cpu";
const MEMORY: &str = "/sys/devices/system/memory";

/// What this agent and its kernel can do.
///
/// # Errors
/// If the memory block size was asked for and cannot be read.
pub fn details(request: &GuestDetailsRequest) -> Result<GuestDetailsResponse, RpcError> {
    let mut response = GuestDetailsResponse::new();
    let block_size = Path::new(MEMORY).join("block_size_bytes");
    // A kernel without memory hotplug has no such file, and no block size: zero.
    if request.mem_block_size && block_size.exists() {
        let text = read(&block_size)?;
        let bytes = u64::from_str_radix(text.trim(), 16);
        response.mem_block_size_bytes =
            bytes.map_err(|_| RpcError::Invalid(format!("{block_size:?} holds {text:?}")))?;
    }
    response.support_mem_hotplug_probe =
        request.mem_hotplug_probe && Path::new(MEMORY).join("probe").exists();
    let mut agent = AgentDetails::new();
    agent.version = env!("CARGO_PKG_VERSION").to_owned();
    agent.init_daemon = std::process::id() == 1;
    agent.device_handlers = device::DRIVERS.map(str::to_owned).into();
    agent.storage_handlers = mount::DRIVERS.map(str::to_owned).into();
    agent.supports_seccomp = true;
    response.agent_details = Some(agent).into();
    Ok(response)
}

/// Sets the wall clock.
///
/// # Errors
/// A time that is none, or what the system says.
pub fn set_time(request: &SetGuestDateTimeRequest) -> Result<(), RpcError> {
    if !(0..1_000_000).contains(&request.usec) {
        return Err(RpcError::Invalid(format!("{} microseconds", request.usec)));
    }
    let time = Timespec { tv_sec: request.sec, tv_nsec: request.usec * 1000 };
    clock_settime(ClockId::Realtime, time).map_err(RpcError::system("setting the clock"))
}

/// Mixes the host's bytes into the random numbers of the kernel.
///
/// # Errors
/// No bytes, or what the system says.
pub fn reseed(data: &[u8]) -> Result<(), RpcError> {
    if data.is_empty() {
        return Err(RpcError::Invalid("no entropy in the request".to_owned()));
    }
    entropy::add(data).map_err(RpcError::system("reseeding random numbers"))
}

/// Brings hot-plugged processors and memory to use: what is there now.
///
/// # Errors
/// [`RpcError::State`] if fewer processors than `nb_cpus` could be brought up.
pub async fn online(request: OnlineCPUMemRequest) -> Result<(), RpcError> {
    // The kernel starts each processor, and waits for it.
    let what = "bringing up processors and memory";
    aside::within(aside::BOUND, what, move || bring_up(&request)).await?
}

fn bring_up(request: &OnlineCPUMemRequest) -> Result<(), RpcError> {
    let wanted = usize::try_from(request.nb_cpus).unwrap_or(usize::MAX);
    let mut brought = 0;
    for cpu in offline(Path::new(CPUS), "cpu")? {
        if request.nb_cpus > 0 && brought == wanted {
            break;
        }
        std::fs::write(&cpu, "1").map_err(RpcError::file("bringing up", &cpu))?;
        brought += 1;
    }
    if !request.cpu_only && Path::new(MEMORY).exists() {
        for block in offline(Path::new(MEMORY), "memory")? {
            std::fs::write(&block, "1").map_err(RpcError::file("bringing up", &block))?;
        }
    }
    if brought < wanted && request.nb_cpus > 0 {
        return Err(RpcError::State(format!("{brought} of {wanted} processors were there to bring up")));
    }
    Ok(())
}

/// The `online` files below `directory` that hold 0, of entries called `prefix` and a number.
fn offline(directory: &Path, prefix: &str) -> Result<Vec<PathBuf>, RpcError> {
    let entries = std::fs::read_dir(directory).map_err(RpcError::file("listing", directory))?;
    let mut files: Vec<(u32, PathBuf)> = Vec::new();
    for entry in entries.flatten() {
        let name = entry.file_name();
        let number =
            name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|rest| rest.parse().ok());
        let file = entry.path().join("online");
        if let Some(number) = number
            && std::fs::read_to_string(&file).is_ok_and(|text| text.trim() == "0")
        {
            files.push((number, file));
        }
    }
    files.sort();
    Ok(files.into_iter().map(|(_, file)| file).collect())
}

/// Space and files of the file system that is mounted at `path`.
///
/// # Errors
/// A path that is none of the guest's, or what the system says.
pub async fn volume_stats(path: String) -> Result<VolumeStatsResponse, RpcError> {
    // A file system whose server is away keeps whoever asks.
    let what = format!("reading the statistics of {path:?}");
    aside::within(aside::BOUND, what, move || file_system(&path)).await?
}

fn file_system(path: &str) -> Result<VolumeStatsResponse, RpcError> {
    if !Path::new(path).is_absolute() {
        return Err(RpcError::Invalid(format!("volume {path:?} is not an absolute path")));
    }
    let fs = match rustix::fs::statvfs(path) {
        Ok(fs) => fs,
        Err(Errno::NOENT) => return Err(RpcError::NoVolume(path.to_owned())),
        Err(error) => return Err(RpcError::system(format!("reading the statistics of {path:?}"))(error)),
    };
    let usage = |unit: volume_usage::Unit, total: u64, free: u64, available: u64| VolumeUsage {
        unit: unit.into(),
        total,
        used: total.saturating_sub(free),
        available,
        ..Default::default()
    };
    let bytes = |blocks: u64| blocks.saturating_mul(fs.f_frsize);
    Ok(VolumeStatsResponse {
        usage: vec![
            usage(volume_usage::Unit::BYTES, bytes(fs.f_blocks), bytes(fs.f_bfree), bytes(fs.f_bavail)),
            usage(volume_usage::Unit::INODES, fs.f_files, fs.f_ffree, fs.f_favail),
        ],
        ..Default::default()
    })
}

fn read(path: &Path) -> Result<String, RpcError> {
    std::fs::read_to_string(path).map_err(RpcError::file("reading", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offline_processors_are_found_in_order_of_number() {
        let dir = tempfile::tempdir().unwrap();
        for (name, online) in [("cpu10", "0"), ("cpu2", "0\n"), ("cpu1", "1"), ("cpufreq", "0")] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("online"), online).unwrap();
        }
        std::fs::create_dir(dir.path().join("cpu0")).unwrap();
        let found = offline(dir.path(), "cpu").unwrap();
        assert_eq!(found, ["cpu2/online", "cpu10/online"].map(|file| dir.path().join(file)));
    }

    #[test]
    fn a_volume_has_space_and_files() {
        let stats = file_system("/").unwrap();
        let units: Vec<_> = stats.usage.iter().map(|usage| usage.unit.enum_value_or_default()).collect();
        assert_eq!(units, [volume_usage::Unit::BYTES, volume_usage::Unit::INODES]);
        assert!(stats.usage[0].total >= stats.usage[0].used && stats.usage[0].total > 0);
        assert!(matches!(file_system("/no/such"), Err(RpcError::NoVolume(_))));
        assert!(matches!(file_system("relative"), Err(RpcError::Invalid(_))));
    }

    #[test]
    fn details_name_the_drivers_that_are_served() {
        let request =
            GuestDetailsRequest { mem_block_size: true, mem_hotplug_probe: true, ..Default::default() };
        let details = details(&request).unwrap();
        assert_eq!(details.agent_details.storage_handlers, mount::DRIVERS);
        assert_eq!(details.agent_details.device_handlers, device::DRIVERS);
        assert!(!details.agent_details.init_daemon && details.agent_details.supports_seccomp);
    }

    #[test]
    fn a_time_of_too_many_microseconds_is_refused() {
        let request = SetGuestDateTimeRequest { usec: 1_000_000, ..Default::default() };
        assert!(matches!(set_time(&request), Err(RpcError::Invalid(_))));
    }
}
