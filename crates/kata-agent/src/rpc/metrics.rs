//! `GetMetrics`: the guest and the agent in figures, in Prometheus' text format, read from /proc when they are asked for.
//!
//! Families and items have upstream's names and units: those of proc(5), but for `kata_guest_meminfo` and `kata_agent_total_*`
//! in bytes, `kata_guest_cpu_time` in milliseconds and `kata_agent_total_time` in seconds.
//! What a kernel does not tell has no figure.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use kata_api::metrics::{Exposition, Kind, colon_lines, process};

/// Clock ticks in a second, as the kernel's interface has them on every machine that we know (USER_HZ).
const TICKS: u16 = 100;

/// Times that the figures were asked for.
static SCRAPES: AtomicU64 = AtomicU64::new(0);

const CPU: [&str; 10] =
    ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"];
const NETDEV: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
const DISK: [&str; 17] = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
];
/// Counters of `/proc/vmstat` that tell something of a guest's health; the file has two hundred.
const VM: [&str; 12] = [
    "nr_free_pages",
    "nr_dirty",
    "nr_writeback",
    "nr_shmem",
    "pgpgin",
    "pgpgout",
    "pswpin",
    "pswpout",
    "pgfault",
    "pgmajfault",
    "allocstall_normal",
    "oom_kill",
];

/// All families.
pub fn text() -> String {
    write(Path::new("/proc"))
}

fn write(proc: &Path) -> String {
    let mut out = Exposition::default();
    let read = |file: &str| std::fs::read_to_string(proc.join(file)).unwrap_or_default();
    out.family("kata_agent_scrape_count", Kind::Counter, "Times that the agent was asked for its figures.")
        .sample(&[], SCRAPES.fetch_add(1, Ordering::Relaxed) + 1);
    process(&mut out, "kata_agent", "the agent", &[proc.join("self")]);
    totals(&mut out, &read("self/stat"), &read("self/status"));
    load(&mut out, &read("loadavg"));
    memory(&mut out, &read("meminfo"));
    processors(&mut out, &read("stat"));
    let mut family =
        out.family("kata_guest_vm_stat", Kind::Gauge, "Counters of the guest's memory, from /proc/vmstat.");
    for line in read("vmstat").lines() {
        if let Some((item, value)) = line.split_once(' ').filter(|(item, _)| VM.contains(item)) {
            number(&mut family, &[("item", item)], value);
        }
    }
    let mut family = out.family(
        "kata_guest_netdev_stat",
        Kind::Gauge,
        "The guest's network interfaces, from /proc/net/dev.",
    );
    for (name, counters) in read("net/dev").lines().filter_map(|line| line.split_once(':')) {
        for (item, value) in NETDEV.iter().zip(counters.split_whitespace()) {
            number(&mut family, &[("interface", name.trim()), ("item", item)], value);
        }
    }
    let mut family =
        out.family("kata_guest_diskstat", Kind::Gauge, "The guest's disks, from /proc/diskstats.");
    for line in read("diskstats").lines() {
        let mut fields = line.split_whitespace().skip(2);
        let Some(disk) = fields.next().filter(|name| !name.starts_with("ram") && !name.starts_with("loop"))
        else {
            continue;
        };
        for (item, value) in DISK.iter().zip(fields) {
            number(&mut family, &[("disk", disk), ("item", item)], value);
        }
    }
    out.into_text()
}

fn number(family: &mut kata_api::metrics::Family<'_>, labels: &[(&str, &str)], text: &str) {
    if let Ok(value) = text.parse::<u64>() {
        family.sample(labels, value);
    }
}

/// Processor time and size of the agent in whole units.
fn totals(out: &mut Exposition, stat: &str, status: &str) {
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    // Fields 14 and 15 of proc(5), of which two are before the parenthesis.
    let ticks = |field: usize| fields.get(field - 3).and_then(|text| text.parse::<u32>().ok());
    if let (Some(user), Some(system)) = (ticks(14), ticks(15)) {
        let seconds = (f64::from(user) + f64::from(system)) / f64::from(TICKS);
        out.family("kata_agent_total_time", Kind::Gauge, "Processor time of the agent in seconds.")
            .sample(&[], seconds);
    }
    for (name, item, help) in [
        ("kata_agent_total_vm", "vmsize", "Virtual memory of the agent in bytes."),
        ("kata_agent_total_rss", "vmrss", "Resident memory of the agent in bytes."),
    ] {
        if let Some((_, kib)) = colon_lines(status).find(|(known, _)| known == item) {
            out.family(name, Kind::Gauge, help).sample(&[], kib.saturating_mul(1024));
        }
    }
}

/// `0.12 0.08 0.05 1/63 128`: the load, and tasks that run of those that there are.
fn load(out: &mut Exposition, loadavg: &str) {
    let mut words = loadavg.split_whitespace();
    let mut family = out.family("kata_guest_load", Kind::Gauge, "Load of the guest, from /proc/loadavg.");
    for item in ["load1", "load5", "load15"] {
        if let Some(value) = words.next().and_then(|word| word.parse::<f64>().ok()) {
            family.sample(&[("item", item)], value);
        }
    }
    let Some((running, all)) = words.next().and_then(|word| word.split_once('/')) else { return };
    let mut family = out.family("kata_guest_tasks", Kind::Gauge, "Tasks that run (cur), and all (max).");
    number(&mut family, &[("item", "cur")], running);
    number(&mut family, &[("item", "max")], all);
}

fn memory(out: &mut Exposition, meminfo: &str) {
    let mut family = out.family("kata_guest_meminfo", Kind::Gauge, "Memory of the guest in bytes.");
    // Counts of pages carry no unit; everything else is in kB.
    for line in meminfo.lines() {
        let unit = if line.ends_with(" kB") { 1024 } else { 1 };
        let Some((name, _)) = line.split_once(':') else { continue };
        for (_, value) in colon_lines(line) {
            family.sample(&[("item", &snake(name))], value.saturating_mul(unit));
        }
    }
}

/// `MemAvailable` as `mem_available`, `SReclaimable` as `s_reclaimable`, `Active(anon)` as `active_anon`.
fn snake(name: &str) -> String {
    let name =
        name.replace("HugePages", "Hugepages").replace("Percpu", "PerCpu").replace('(', "_").replace(')', "");
    let mut text = String::with_capacity(name.len() + 4);
    let mut before = '_';
    let mut chars = name.chars().peekable();
    while let Some(c) = chars.next() {
        let last_of_capitals =
            before.is_ascii_uppercase() && chars.peek().is_some_and(char::is_ascii_lowercase);
        let begins = c.is_ascii_uppercase() && (before.is_ascii_lowercase() || last_of_capitals);
        if begins || (c.is_ascii_digit() && before.is_ascii_lowercase()) {
            text.push('_');
        }
        // A unit behind a number stays as it is: 4k, 2M.
        text.push(if before.is_ascii_digit() { c } else { c.to_ascii_lowercase() });
        before = c;
    }
    text
}

fn processors(out: &mut Exposition, stat: &str) {
    let mut family = out.family(
        "kata_guest_cpu_time",
        Kind::Gauge,
        "Time of the guest's processors in milliseconds, from /proc/stat.",
    );
    for line in stat.lines() {
        let mut fields = line.split_whitespace();
        let Some(cpu) = fields.next().and_then(|word| word.strip_prefix("cpu")) else { continue };
        let cpu = if cpu.is_empty() { "total" } else { cpu };
        for (item, ticks) in CPU.iter().zip(fields) {
            if let Ok(ticks) = ticks.parse::<u64>() {
                family.sample(&[("cpu", cpu), ("item", item)], ticks.saturating_mul(1000 / u64::from(TICKS)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kata_api::metrics::Sample;

    use super::*;

    #[test]
    fn every_family_of_this_machine_is_told_and_every_line_can_be_read() {
        let text = text();
        for start in [
            "kata_agent_scrape_count ",
            "kata_agent_threads ",
            "kata_agent_total_time ",
            "kata_agent_total_rss ",
            "kata_agent_proc_status{item=\"rssanon\"} ",
            "kata_guest_load{item=\"load15\"} ",
            "kata_guest_tasks{item=\"max\"} ",
            "kata_guest_meminfo{item=\"mem_available\"} ",
            "kata_guest_cpu_time{cpu=\"total\",item=\"user\"} ",
            "kata_guest_cpu_time{cpu=\"0\",item=\"idle\"} ",
            "kata_guest_vm_stat{item=\"pgfault\"} ",
            "kata_guest_netdev_stat{interface=\"lo\",item=\"recv_bytes\"} ",
        ] {
            assert!(text.lines().any(|line| line.starts_with(start)), "{start} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.starts_with('#') || Sample::parse(line).is_some()), "{text}");
    }

    #[test]
    fn memory_is_in_bytes_under_upstreams_names() {
        let mut out = Exposition::default();
        memory(
            &mut out,
            "MemTotal:  3 kB\nActive(anon):   1 kB\nHugePages_Total:   7\nSReclaimable: 2 kB\nDirectMap2M: 1 kB\n",
        );
        let text = out.into_text();
        let samples: Vec<&str> = text.lines().skip(2).collect();
        assert_eq!(
            samples,
            [
                "kata_guest_meminfo{item=\"mem_total\"} 3072",
                "kata_guest_meminfo{item=\"active_anon\"} 1024",
                "kata_guest_meminfo{item=\"hugepages_total\"} 7",
                "kata_guest_meminfo{item=\"s_reclaimable\"} 2048",
                "kata_guest_meminfo{item=\"direct_map_2M\"} 1024",
            ]
        );
    }

    #[test]
    fn a_machine_that_tells_nothing_has_no_figures_but_the_scrapes() {
        let dir = tempfile::tempdir().unwrap();
        let text = write(dir.path());
        let samples: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(samples.len() == 1 && samples[0].starts_with("kata_agent_scrape_count "), "{text}");
    }
}
