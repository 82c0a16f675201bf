//! `linux.resources` of a spec as writes to cgroup v2 files.
//!
//! A limit that cgroup v2 cannot hold is refused; one that this kernel has no file for is an error that names both.

use std::fs;
use std::io;
use std::path::Path;

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use super::CgroupError;
use crate::container::EngineError;

/// One write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// Key path in the spec.
    key: String,
    /// File and value; later ones are tried where the kernel does not have the file.
    writes: Vec<(String, String)>,
    /// Whether a kernel without the file has the wanted state anyway.
    absent_is_fine: bool,
}

impl Setting {
    fn new(key: &str, file: &str, value: impl Into<String>) -> Self {
        let key = format!("linux.resources.{key}");
        Self { key, writes: vec![(file.to_owned(), value.into())], absent_is_fine: false }
    }

    fn or(mut self, file: &str, value: impl Into<String>) -> Self {
        self.writes.push((file.to_owned(), value.into()));
        self
    }

    fn fine_if_absent(mut self) -> Self {
        self.absent_is_fine = true;
        self
    }

    /// Writes it below the cgroup directory.
    pub(super) fn apply(&self, cgroup: &Path) -> Result<(), CgroupError> {
        for (file, value) in &self.writes {
            let path = cgroup.join(file);
            let value = complete(&path, value);
            match write(&path, &value) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(CgroupError::file(format!("write {value:?} ({}) to", self.key), path, error));
                }
            }
        }
        if self.absent_is_fine {
            return Ok(());
        }
        let file = self.writes.first().map(|(file, _)| file.clone()).unwrap_or_default();
        Err(CgroupError::NoController { key: self.key.clone(), file })
    }
}

/// Without `O_CREAT`, which cgroupfs answers with a misleading error.
fn write(path: &Path, value: &str) -> io::Result<()> {
    use std::io::Write;
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// A new period keeps the quota that is set.
const KEEP_QUOTA: &str = "keep ";

fn complete(path: &Path, value: &str) -> String {
    let Some(period) = value.strip_prefix(KEEP_QUOTA) else { return value.to_owned() };
    let present = fs::read_to_string(path).unwrap_or_default();
    format!("{} {period}", present.split_whitespace().next().unwrap_or("max"))
}

/// All writes that `resources` ask for, in an order that the kernel accepts. Device rules are not among them.
pub(super) fn settings(resources: &LinuxResources) -> Result<Vec<Setting>, EngineError> {
    let mut settings = Vec::new();
    if let Some(memory) = resources.memory() {
        memory_settings(memory, &mut settings)?;
    }
    if let Some(cpu) = resources.cpu() {
        cpu_settings(cpu, &mut settings)?;
    }
    if let Some(pids) = resources.pids()
        && pids.limit() != 0
    {
        settings.push(Setting::new("pids.limit", "pids.max", or_max(pids.limit())));
    }
    if let Some(block) = resources.block_io() {
        block_settings(block, &mut settings)?;
    }
    for limit in resources.hugepage_limits().iter().flatten() {
        settings.extend(hugepage_settings(limit.page_size(), limit.limit())?);
    }
    if let Some(network) = resources.network()
        && (network.class_id().unwrap_or(0) != 0
            || network.priorities().as_ref().is_some_and(|all| !all.is_empty()))
    {
        return Err(unsupported("network", "cgroup v2 does not mark packets"));
    }
    for (device, limit) in resources.rdma().iter().flatten() {
        let mut words = vec![plain("rdma", device)?.to_owned()];
        words.extend(limit.hca_handles().map(|limit| format!("hca_handle={limit}")));
        words.extend(limit.hca_objects().map(|limit| format!("hca_object={limit}")));
        settings.push(Setting::new("rdma", "rdma.max", words.join(" ")));
    }
    for (file, value) in resources.unified().iter().flatten() {
        settings.push(unified(file, value)?);
    }
    Ok(settings)
}

fn unsupported(key: &str, reason: &str) -> EngineError {
    EngineError::unsupported(format!("linux.resources.{key}"), reason)
}

fn invalid(key: &str, reason: &str) -> EngineError {
    EngineError::invalid(format!("linux.resources.{key}"), reason)
}

/// Negative is "no limit".
fn or_max(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn memory_settings(memory: &LinuxMemory, settings: &mut Vec<Setting>) -> Result<(), EngineError> {
    for (key, asked) in [
        ("memory.kernel", memory.kernel().unwrap_or(0) > 0),
        ("memory.kernelTCP", memory.kernel_tcp().unwrap_or(0) > 0),
        ("memory.swappiness", memory.swappiness().unwrap_or(0) > 0),
        ("memory.disableOOMKiller", memory.disable_oom_killer().unwrap_or(false)),
    ] {
        if asked {
            return Err(unsupported(key, "cgroup v2 has no such limit"));
        }
    }
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = swap(memory.swap().filter(|swap| *swap != 0), limit)? {
        let setting = Setting::new("memory.swap", "memory.swap.max", or_max(swap));
        // A kernel without swap gives none, and has no bound to lift.
        settings.push(if swap <= 0 { setting.fine_if_absent() } else { setting });
    }
    if let Some(limit) = limit {
        settings.push(Setting::new("memory.limit", "memory.max", or_max(limit)));
    }
    if let Some(reservation) = memory.reservation().filter(|value| *value != 0) {
        settings.push(Setting::new("memory.reservation", "memory.low", or_max(reservation)));
    }
    Ok(())
}

/// In the spec swap is memory and swap together; in cgroup v2 it is swap alone.
fn swap(both: Option<i64>, limit: Option<i64>) -> Result<Option<i64>, EngineError> {
    match (both, limit) {
        (None, Some(-1)) => Ok(Some(-1)),
        (None, _) => Ok(None),
        (Some(-1), _) => Ok(Some(-1)),
        (Some(_), None | Some(-1)) => Err(invalid("memory.swap", "needs a memory limit")),
        (Some(both), Some(limit)) if both < limit => {
            Err(invalid("memory.swap", "is less than the memory limit"))
        }
        (Some(both), Some(limit)) => Ok(Some(both - limit)),
    }
}

/// Refuses a limit below usage, where the spec asks for that.
pub(super) fn check_usage(cgroup: &Path, resources: &LinuxResources) -> Result<(), CgroupError> {
    let Some(memory) = resources.memory() else { return Ok(()) };
    let limit = memory.limit().filter(|limit| *limit > 0 && memory.check_before_update() == Some(true));
    let Some(limit) = limit else { return Ok(()) };
    let used =
        fs::read_to_string(cgroup.join("memory.current")).ok().and_then(|text| text.trim().parse().ok());
    match used {
        Some(used) if u64::try_from(limit).is_ok_and(|limit| limit < used) => {
            Err(CgroupError::BelowUsage { limit, used })
        }
        _ => Ok(()),
    }
}

fn cpu_settings(cpu: &LinuxCpu, settings: &mut Vec<Setting>) -> Result<(), EngineError> {
    if cpu.realtime_runtime().unwrap_or(0) != 0 || cpu.realtime_period().unwrap_or(0) != 0 {
        return Err(unsupported("cpu.realtimeRuntime", "cgroup v2 does not share out real-time"));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        settings.push(Setting::new("cpu.shares", "cpu.weight", weight_of_shares(shares).to_string()));
    }
    if let Some(idle) = cpu.idle() {
        settings.push(Setting::new("cpu.idle", "cpu.idle", idle.to_string()));
    }
    let (quota, period) =
        (cpu.quota().filter(|quota| *quota != 0), cpu.period().filter(|period| *period != 0));
    let max = match (quota, period) {
        (None, None) => None,
        (Some(quota), None) => Some(or_max(quota)),
        (Some(quota), Some(period)) => Some(format!("{} {period}", or_max(quota))),
        (None, Some(period)) => Some(format!("{KEEP_QUOTA}{period}")),
    };
    if let Some(burst) = cpu.burst().filter(|burst| *burst != 0) {
        // A burst may not be above the quota, old or new, while either is written.
        settings.push(Setting::new("cpu.burst", "cpu.max.burst", "0"));
        settings.extend(max.map(|max| Setting::new("cpu.quota", "cpu.max", max)));
        settings.push(Setting::new("cpu.burst", "cpu.max.burst", burst.to_string()));
    } else {
        settings.extend(max.map(|max| Setting::new("cpu.quota", "cpu.max", max)));
    }
    let sets = [("cpu.cpus", "cpuset.cpus", cpu.cpus()), ("cpu.mems", "cpuset.mems", cpu.mems())];
    for (key, file, set) in sets {
        if let Some(set) = set.as_ref().filter(|set| !set.is_empty()) {
            settings.push(Setting::new(key, file, plain(key, set)?));
        }
    }
    Ok(())
}

/// `cpu.shares` (2 to 262144, default 1024) as `cpu.weight` (1 to 10000, default 100).
///
/// The curve goes through both ends and both defaults, as other runtimes have it: quadratic in the logarithms, because a
/// straight line gives a container of default shares a weight of 39. The three pairs determine it:
/// `log10(weight) = (l² + 125·l − 126) / 612` with `l = log2(shares)`.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = u32::try_from(shares).unwrap_or(u32::MAX).clamp(2, 262_144);
    let l = f64::from(shares).log2();
    let weight = 10_f64.powf((l * l + 125.0 * l - 126.0) / 612.0);
    // Up to the next whole number; the slack is for what the powers round.
    let digits = format!("{:.0}", (weight - 1e-6).ceil());
    digits.parse().unwrap_or(10_000).clamp(1, 10_000)
}

fn block_settings(block: &LinuxBlockIo, settings: &mut Vec<Setting>) -> Result<(), EngineError> {
    if block.leaf_weight().unwrap_or(0) != 0 {
        return Err(unsupported("blockIO.leafWeight", "cgroup v2 has no leaf weights"));
    }
    if let Some(weight) = block.weight().filter(|weight| *weight != 0) {
        let default = format!("default {}", io_weight(weight));
        settings.push(
            Setting::new("blockIO.weight", "io.bfq.weight", weight.to_string()).or("io.weight", default),
        );
    }
    for device in block.weight_device().iter().flatten() {
        if device.leaf_weight().unwrap_or(0) != 0 {
            return Err(unsupported("blockIO.weightDevice.leafWeight", "cgroup v2 has no leaf weights"));
        }
        let Some(weight) = device.weight().filter(|weight| *weight != 0) else { continue };
        let number = format!("{}:{}", device.major(), device.minor());
        let bfq = format!("{number} {weight}");
        let setting = Setting::new("blockIO.weightDevice", "io.bfq.weight", bfq);
        settings.push(setting.or("io.weight", format!("{number} {}", io_weight(weight))));
    }
    let throttles: [(&str, &str, &Option<Vec<LinuxThrottleDevice>>); 4] = [
        ("blockIO.throttleReadBpsDevice", "rbps", block.throttle_read_bps_device()),
        ("blockIO.throttleWriteBpsDevice", "wbps", block.throttle_write_bps_device()),
        ("blockIO.throttleReadIOPSDevice", "riops", block.throttle_read_iops_device()),
        ("blockIO.throttleWriteIOPSDevice", "wiops", block.throttle_write_iops_device()),
    ];
    for (key, word, list) in throttles {
        for device in list.iter().flatten() {
            let rate = if device.rate() == 0 { "max".to_owned() } else { device.rate().to_string() };
            let value = format!("{}:{} {word}={rate}", device.major(), device.minor());
            settings.push(Setting::new(key, "io.max", value));
        }
    }
    Ok(())
}

/// 10 to 1000 onto 1 to 10000, in proportion.
fn io_weight(weight: u16) -> u32 {
    1 + u32::from(weight.clamp(10, 1000) - 10) * 9999 / 990
}

fn hugepage_settings(size: &str, limit: i64) -> Result<[Setting; 2], EngineError> {
    let digits = size.trim_end_matches(['K', 'M', 'G', 'B']);
    let known = ["KB", "MB", "GB"].iter().any(|unit| size.strip_prefix(digits) == Some(*unit));
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) || !known {
        return Err(invalid("hugepageLimits", &format!("{size:?} is not a page size")));
    }
    Ok([
        Setting::new("hugepageLimits", &format!("hugetlb.{size}.max"), or_max(limit)),
        // Reservations have a bound of their own on newer kernels.
        Setting::new("hugepageLimits", &format!("hugetlb.{size}.rsvd.max"), or_max(limit)).fine_if_absent(),
    ])
}

/// A raw file of a controller. The files that manage the cgroup itself are the engine's.
fn unified(file: &str, value: &str) -> Result<Setting, EngineError> {
    let named = file.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if !named || !file.contains('.') || file.starts_with('.') {
        return Err(invalid("unified", &format!("{file:?} is not a file of a controller")));
    }
    if file.starts_with("cgroup.") && !file.starts_with("cgroup.max.") {
        return Err(unsupported("unified", &format!("{file} manages the cgroup itself")));
    }
    Ok(Setting::new(&format!("unified[{file:?}]"), file, value))
}

/// Text that becomes part of a line.
fn plain<'text>(key: &str, text: &'text str) -> Result<&'text str, EngineError> {
    let bad = text.chars().any(|c| c.is_control() || c.is_whitespace());
    if bad { Err(invalid(key, &format!("{text:?} is not one word"))) } else { Ok(text) }
}

#[cfg(test)]
mod tests;
