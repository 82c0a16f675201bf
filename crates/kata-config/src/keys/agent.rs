//! `[agent.kata]`: upstream's keys that this version does not act on.

use super::kind::Kind::{Boolean, List, Text, Word};
use super::{Key, Kind};

const COUNT: Kind = Kind::COUNT;

const fn key(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Key {
    Key::planned("agent.kata", name, kind, default, doc)
}

const fn memory(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Key {
    Key::planned("agent.kata.mem_agent", name, kind, default, doc).rust()
}

/// What tunes the memory agent asks for nothing while there is none.
const fn tuning(name: &'static str, kind: Kind, default: &'static str, doc: &'static str) -> Key {
    memory(name, kind, default, doc).inert()
}

pub(super) const KEYS: &[Key] = &[
    key(
        "log_level",
        Word(&["trace", "debug", "info", "warn", "error", "critical"]),
        "\"info\"",
        "Level of the agent's log.",
    )
    .rust()
    .inert(),
    key("enable_tracing", Boolean, "false", "Spans of the agent, exported by OTLP.").annotated(),
    key(
        "container_pipe_size",
        COUNT,
        "0",
        "Size of the pipes of a container's streams; 0 is the guest kernel's default.",
    )
    .unit("byte")
    .annotated(),
    key("launch_process_timeout", COUNT, "6", "How long the agent waits for the guest's own services.")
        .rust()
        .unit("s")
        .inert(),
    key("visible_cdi_devices", List, "[]", "CDI devices that every container gets.").rust(),
    key("policy", Text, "\"\"", "Rego policy that the agent judges requests by.").annotated(),
    key("server_port", COUNT, "1024", "vsock port that the agent listens on.").rust(),
    key("log_port", COUNT, "1025", "vsock port for the agent's log; here it comes over the console.")
        .rust()
        .inert(),
    key("cdh_api_timeout_ms", COUNT, "50000", "Bound on a request to the guest's data hub.")
        .rust()
        .unit("ms")
        .annotated()
        .inert(),
    memory("mem_agent_enable", Boolean, "false", "Reclaims cold memory within the guest."),
    tuning("memcg_disable", Boolean, "false", "Does not age and evict pages."),
    tuning("memcg_swap", Boolean, "false", "Evicts to swap as well."),
    tuning("memcg_swappiness_max", Kind::Integer { least: 0, most: 200 }, "50", "Most swappiness."),
    tuning("memcg_period_secs", COUNT, "600", "Time between rounds.").unit("s"),
    tuning("memcg_period_psi_percent_limit", COUNT, "1", "Stall time above which a round is left out.")
        .unit("%"),
    tuning("memcg_eviction_psi_percent_limit", COUNT, "1", "Stall time above which eviction stops.")
        .unit("%"),
    tuning("memcg_eviction_run_aging_count_min", COUNT, "3", "Rounds of aging before pages are evicted."),
    tuning("compact_disable", Boolean, "false", "Does not compact memory."),
    tuning("compact_period_secs", COUNT, "600", "Time between compactions.").unit("s"),
    tuning(
        "compact_period_psi_percent_limit",
        COUNT,
        "1",
        "Stall time above which a compaction is left out.",
    )
    .unit("%"),
    tuning("compact_psi_percent_limit", COUNT, "5", "Stall time above which a compaction stops.").unit("%"),
    tuning("compact_sec_max", COUNT, "300", "Longest compaction.").unit("s"),
    tuning("compact_order", COUNT, "9", "Order of pages that are to be made."),
    tuning("compact_threshold", COUNT, "1024", "Smaller pages that make a compaction worth while."),
    tuning(
        "compact_force_times",
        COUNT,
        "18446744073709551615",
        "Rounds after which one is forced; the greatest number is never.",
    ),
];
