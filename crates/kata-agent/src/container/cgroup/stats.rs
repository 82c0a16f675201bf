//! Usage of a cgroup, in the shape of the agent protocol (upstream's, which follows cgroup v1 names).

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;

use kata_api::agent::{
    BlkioStats, BlkioStatsEntry, CgroupStats, CpuStats, CpuUsage, HugetlbStats, MemoryData, MemoryStats,
    PidsStats, ThrottlingData,
};
use protobuf::MessageField;

use super::{CgroupError, flat_key};

/// Reads what there is; files of controllers that the kernel lacks leave their part out.
pub(super) fn read(cgroup: &Path) -> Result<CgroupStats, CgroupError> {
    let file = |name: &str| text(cgroup, name);
    Ok(CgroupStats {
        cpu_stats: file("cpu.stat")?.map(|text| cpu(&text)).into(),
        memory_stats: memory(cgroup)?.into(),
        pids_stats: pids(file("pids.current")?.as_deref(), file("pids.max")?.as_deref()).into(),
        blkio_stats: file("io.stat")?.map(|text| block(&text)).into(),
        hugetlb_stats: hugetlb(cgroup)?,
        ..Default::default()
    })
}

fn text(cgroup: &Path, name: &str) -> Result<Option<String>, CgroupError> {
    let path = cgroup.join(name);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CgroupError::file("read", path, error)),
    }
}

fn number(text: Option<&str>) -> u64 {
    text.and_then(|text| text.trim().parse().ok()).unwrap_or_default()
}

/// No limit is the largest number, as it was in cgroup v1.
fn limit(text: Option<&str>) -> u64 {
    if text.map(str::trim) == Some("max") { u64::MAX } else { number(text) }
}

/// cgroup v2 counts in microseconds, the protocol in nanoseconds.
fn nanoseconds(text: &str, key: &str) -> u64 {
    number(flat_key(text, key)).saturating_mul(1000)
}

fn cpu(text: &str) -> CpuStats {
    let usage = CpuUsage {
        total_usage: nanoseconds(text, "usage_usec"),
        usage_in_kernelmode: nanoseconds(text, "system_usec"),
        usage_in_usermode: nanoseconds(text, "user_usec"),
        ..Default::default()
    };
    let throttling = ThrottlingData {
        periods: number(flat_key(text, "nr_periods")),
        throttled_periods: number(flat_key(text, "nr_throttled")),
        throttled_time: nanoseconds(text, "throttled_usec"),
        ..Default::default()
    };
    CpuStats {
        cpu_usage: MessageField::some(usage),
        throttling_data: MessageField::some(throttling),
        ..Default::default()
    }
}

fn memory(cgroup: &Path) -> Result<Option<MemoryStats>, CgroupError> {
    let Some(current) = text(cgroup, "memory.current")? else { return Ok(None) };
    let read = |name: &str| text(cgroup, name);
    let stat = read("memory.stat")?.unwrap_or_default();
    let events = read("memory.events")?.unwrap_or_default();
    let usage = MemoryData {
        usage: number(Some(&current)),
        max_usage: number(read("memory.peak")?.as_deref()),
        failcnt: number(flat_key(&events, "max")),
        limit: limit(read("memory.max")?.as_deref()),
        ..Default::default()
    };
    // By the protocol, swap usage and its limit count memory in.
    let swap = read("memory.swap.current")?.map(|current| {
        Ok::<_, CgroupError>(MemoryData {
            usage: number(Some(&current)).saturating_add(usage.usage),
            limit: limit(read("memory.swap.max")?.as_deref()).saturating_add(usage.limit),
            ..Default::default()
        })
    });
    let kernel =
        MemoryData { usage: number(flat_key(&stat, "kernel")), limit: u64::MAX, ..Default::default() };
    Ok(Some(MemoryStats {
        cache: number(flat_key(&stat, "file")),
        usage: MessageField::some(usage),
        swap_usage: swap.transpose()?.into(),
        kernel_usage: MessageField::some(kernel),
        use_hierarchy: true,
        stats: flat(&stat),
        ..Default::default()
    }))
}

fn flat(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs.filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?))).collect()
}

fn pids(current: Option<&str>, max: Option<&str>) -> Option<PidsStats> {
    let current = current?;
    // Here, unlike for memory, the protocol says "none" with a zero.
    let limit = if max.map(str::trim) == Some("max") { 0 } else { number(max) };
    Some(PidsStats { current: number(Some(current)), limit, ..Default::default() })
}

/// Lines like `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn block(text: &str) -> BlkioStats {
    let mut stats = BlkioStats::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let device = words.next().and_then(|number| number.split_once(':'));
        let Some((major, minor)) = device else { continue };
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            let (list, op) = match key {
                "rbytes" => (&mut stats.io_service_bytes_recursive, "Read"),
                "wbytes" => (&mut stats.io_service_bytes_recursive, "Write"),
                "dbytes" => (&mut stats.io_service_bytes_recursive, "Discard"),
                "rios" => (&mut stats.io_serviced_recursive, "Read"),
                "wios" => (&mut stats.io_serviced_recursive, "Write"),
                "dios" => (&mut stats.io_serviced_recursive, "Discard"),
                _ => continue,
            };
            list.push(BlkioStatsEntry {
                major: number(Some(major)),
                minor: number(Some(minor)),
                op: op.to_owned(),
                value: number(Some(value)),
                ..Default::default()
            });
        }
    }
    stats
}

fn hugetlb(cgroup: &Path) -> Result<HashMap<String, HugetlbStats>, CgroupError> {
    let mut all = HashMap::new();
    let entries = fs::read_dir(cgroup).map_err(|error| CgroupError::file("list", cgroup, error))?;
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let size = name.strip_prefix("hugetlb.").and_then(|rest| rest.strip_suffix(".current"));
        let Some(size) = size.filter(|size| !size.ends_with(".rsvd")) else { continue };
        let events = text(cgroup, &format!("hugetlb.{size}.events"))?.unwrap_or_default();
        let stats = HugetlbStats {
            usage: number(text(cgroup, &name)?.as_deref()),
            failcnt: number(flat_key(&events, "max")),
            ..Default::default()
        };
        all.insert(size.to_owned(), stats);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup(files: &[(&str, &str)]) -> CgroupStats {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        read(directory.path()).unwrap()
    }

    #[test]
    fn absent_controllers_leave_their_part_out() {
        let stats = cgroup(&[("cpu.stat", "usage_usec 5\nuser_usec 3\nsystem_usec 2\n")]);
        assert_eq!(stats.cpu_stats.cpu_usage.total_usage, 5000);
        assert!(stats.memory_stats.is_none() && stats.pids_stats.is_none() && stats.blkio_stats.is_none());
    }

    #[test]
    fn memory_counts_limit_peak_and_swap_with_memory() {
        let stats = cgroup(&[
            ("memory.current", "100\n"),
            ("memory.peak", "200\n"),
            ("memory.max", "max\n"),
            ("memory.events", "low 0\nhigh 0\nmax 4\noom 1\noom_kill 1\n"),
            ("memory.stat", "anon 1\nfile 42\nkernel 7\n"),
            ("memory.swap.current", "11\n"),
            ("memory.swap.max", "50\n"),
        ]);
        let memory = stats.memory_stats.unwrap();
        assert_eq!((memory.usage.usage, memory.usage.max_usage, memory.usage.failcnt), (100, 200, 4));
        assert_eq!((memory.usage.limit, memory.swap_usage.usage), (u64::MAX, 111));
        assert_eq!((memory.cache, memory.kernel_usage.usage, memory.stats["anon"]), (42, 7, 1));
    }

    #[test]
    fn io_is_listed_by_device_and_direction() {
        let stats =
            cgroup(&[("io.stat", "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\nbroken\n")]);
        let bytes = &stats.blkio_stats.io_service_bytes_recursive;
        assert_eq!((bytes[0].major, bytes[0].op.as_str(), bytes[0].value), (254, "Read", 4096));
        assert_eq!((bytes[1].op.as_str(), bytes[1].value), ("Write", 8192));
    }

    #[test]
    fn huge_pages_are_keyed_by_size() {
        let stats = cgroup(&[
            ("hugetlb.2MB.current", "4194304\n"),
            ("hugetlb.2MB.events", "max 3\n"),
            ("hugetlb.2MB.rsvd.current", "9\n"),
        ]);
        assert_eq!(stats.hugetlb_stats.len(), 1);
        assert_eq!((stats.hugetlb_stats["2MB"].usage, stats.hugetlb_stats["2MB"].failcnt), (4_194_304, 3));
    }
}
