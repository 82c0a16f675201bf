//! The guest's cgroup figures in the shape that containerd's clients know: `io.containerd.cgroups.v2.Metrics`.

use std::collections::HashMap;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use kata_api::agent::{BlkioStats, CgroupStats, CpuStats, MemoryStats, NetworkStats, StatsContainerResponse};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The figures, packed for `StatsResponse`.
pub(crate) fn packed(stats: &StatsContainerResponse) -> Result<Any, protobuf::Error> {
    let value = metrics(&stats.cgroup_stats, &stats.network_stats).write_to_bytes()?;
    Ok(Any { type_url: TYPE_URL.to_owned(), value, ..Any::default() })
}

fn metrics(cgroup: &CgroupStats, network: &[NetworkStats]) -> Metrics {
    let pids = &cgroup.pids_stats;
    Metrics {
        pids: MessageField::some(PidsStat {
            current: pids.current,
            limit: pids.limit,
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(&cgroup.cpu_stats)),
        memory: MessageField::some(memory(&cgroup.memory_stats)),
        memory_events: MessageField::some(MemoryEvents {
            max: cgroup.memory_stats.usage.failcnt,
            ..MemoryEvents::default()
        }),
        io: MessageField::some(IOStat { usage: io(&cgroup.blkio_stats), ..IOStat::default() }),
        hugetlb: cgroup
            .hugetlb_stats
            .iter()
            .map(|(size, huge)| HugeTlbStat {
                pagesize: size.clone(),
                current: huge.usage,
                max: huge.max_usage,
                failcnt: huge.failcnt,
                ..HugeTlbStat::default()
            })
            .collect(),
        network: network.iter().map(interface).collect(),
        ..Metrics::default()
    }
}

/// The agent counts in nanoseconds, as its protocol does since cgroup v1; cgroup v2 speaks of microseconds.
fn cpu(stats: &CpuStats) -> CPUStat {
    let (usage, throttling) = (&stats.cpu_usage, &stats.throttling_data);
    CPUStat {
        usage_usec: usage.total_usage / 1000,
        user_usec: usage.usage_in_usermode / 1000,
        system_usec: usage.usage_in_kernelmode / 1000,
        nr_periods: throttling.periods,
        nr_throttled: throttling.throttled_periods,
        throttled_usec: throttling.throttled_time / 1000,
        ..CPUStat::default()
    }
}

/// `memory.stat` comes as a map under the kernel's names, which are also those of the message's fields.
fn memory(stats: &MemoryStats) -> MemoryStat {
    macro_rules! named {
        ($($field:ident),+ $(,)?) => {
            MemoryStat {
                $($field: value(&stats.stats, stringify!($field)),)+
                usage: stats.usage.usage,
                usage_limit: stats.usage.limit,
                max_usage: stats.usage.max_usage,
                swap_usage: stats.swap_usage.usage,
                swap_limit: stats.swap_usage.limit,
                swap_max_usage: stats.swap_usage.max_usage,
                ..MemoryStat::default()
            }
        };
    }
    named!(
        anon,
        file,
        kernel_stack,
        slab,
        sock,
        shmem,
        file_mapped,
        file_dirty,
        file_writeback,
        anon_thp,
        inactive_anon,
        active_anon,
        inactive_file,
        active_file,
        unevictable,
        slab_reclaimable,
        slab_unreclaimable,
        pgfault,
        pgmajfault,
        workingset_nodereclaim,
        pgrefill,
        pgscan,
        pgsteal,
        pgactivate,
        pgdeactivate,
        pglazyfree,
        pglazyfreed,
        thp_fault_alloc,
        thp_collapse_alloc,
    )
}

fn value(stats: &HashMap<String, u64>, name: &str) -> u64 {
    stats.get(name).copied().unwrap_or_default()
}

/// One entry for each device, from one entry for each device and operation.
fn io(stats: &BlkioStats) -> Vec<IOEntry> {
    let mut devices: Vec<IOEntry> = Vec::new();
    let bytes = stats.io_service_bytes_recursive.iter().map(|entry| (entry, false));
    let operations = stats.io_serviced_recursive.iter().map(|entry| (entry, true));
    for (entry, counts_operations) in bytes.chain(operations) {
        let known =
            devices.iter().position(|device| (device.major, device.minor) == (entry.major, entry.minor));
        let index = known.unwrap_or_else(|| {
            devices.push(IOEntry { major: entry.major, minor: entry.minor, ..IOEntry::default() });
            devices.len() - 1
        });
        let Some(device) = devices.get_mut(index) else { continue };
        match (entry.op.to_ascii_lowercase().as_str(), counts_operations) {
            ("read", false) => device.rbytes += entry.value,
            ("write", false) => device.wbytes += entry.value,
            ("read", true) => device.rios += entry.value,
            ("write", true) => device.wios += entry.value,
            _ => {}
        }
    }
    devices
}

fn interface(stats: &NetworkStats) -> NetworkStat {
    NetworkStat {
        name: stats.name.clone(),
        rx_bytes: stats.rx_bytes,
        rx_packets: stats.rx_packets,
        rx_errors: stats.rx_errors,
        rx_dropped: stats.rx_dropped,
        tx_bytes: stats.tx_bytes,
        tx_packets: stats.tx_packets,
        tx_errors: stats.tx_errors,
        tx_dropped: stats.tx_dropped,
        ..NetworkStat::default()
    }
}

#[cfg(test)]
mod tests {
    use kata_api::agent::{BlkioStatsEntry, CpuUsage, MemoryData};

    use super::*;

    #[test]
    fn the_guests_figures_arrive_in_containerds_units() {
        let entry = |op: &str, value| BlkioStatsEntry {
            major: 8,
            minor: 1,
            op: op.into(),
            value,
            ..BlkioStatsEntry::default()
        };
        let cpu_usage = CpuUsage { total_usage: 5_000_000, ..CpuUsage::default() };
        let cgroup = CgroupStats {
            cpu_stats: Some(CpuStats { cpu_usage: Some(cpu_usage).into(), ..CpuStats::default() }).into(),
            memory_stats: Some(MemoryStats {
                usage: Some(MemoryData { usage: 7, limit: 9, ..MemoryData::default() }).into(),
                stats: [("anon".to_owned(), 3)].into(),
                ..MemoryStats::default()
            })
            .into(),
            blkio_stats: Some(BlkioStats {
                io_service_bytes_recursive: vec![entry("read", 10), entry("Write", 20)],
                io_serviced_recursive: vec![entry("read", 1)],
                ..BlkioStats::default()
            })
            .into(),
            ..CgroupStats::default()
        };
        let network = NetworkStats { name: "eth0".into(), rx_bytes: 4, ..NetworkStats::default() };
        let stats = StatsContainerResponse {
            cgroup_stats: Some(cgroup).into(),
            network_stats: vec![network],
            ..StatsContainerResponse::default()
        };
        let any = packed(&stats).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(metrics.cpu.usage_usec, 5000);
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit, metrics.memory.anon), (7, 9, 3));
        let io = &metrics.io.usage[0];
        assert_eq!((metrics.io.usage.len(), io.rbytes, io.wbytes, io.rios), (1, 10, 20, 1));
        assert_eq!((metrics.network[0].name.as_str(), metrics.network[0].rx_bytes), ("eth0", 4));
    }

    #[test]
    fn an_agent_that_tells_nothing_gives_zeros() {
        assert!(packed(&StatsContainerResponse::default()).is_ok());
    }
}
