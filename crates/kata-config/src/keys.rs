//! The table of keys: how each is read, what it is called upstream, which of upstream's are not carried.

use std::path::PathBuf;
use std::str::FromStr;

use toml::de::DeValue;

use crate::Config;
use crate::error::Fault;
use crate::text::kernel_words;

/// One setting: where it is written and how it gets into a [`Config`].
pub(crate) struct Key {
    /// Dotted path.
    pub(crate) path: &'static str,
    /// Reads the value into its field.
    pub(crate) apply: fn(&mut Config, &DeValue<'_>) -> Result<(), Fault>,
}

/// A key's path is the path of its field: the table cannot drift from the struct.
macro_rules! keys {
    ($($head:ident $(. $rest:ident)+ = $read:expr;)+) => {
        &[$(Key {
            path: concat!(stringify!($head) $(, ".", stringify!($rest))+),
            apply: |config, value| {
                config.$head $(.$rest)+ = $read(value)?;
                Ok(())
            },
        }),+]
    };
}

/// Every setting that this version carries.
pub(crate) const KEYS: &[Key] = keys! {
    hypervisor.qemu.path = path;
    hypervisor.qemu.kernel = path;
    hypervisor.qemu.initrd = path;
    hypervisor.qemu.image = path;
    hypervisor.qemu.machine_type = word;
    hypervisor.qemu.kernel_params = words;
    hypervisor.qemu.default_vcpus = vcpus;
    hypervisor.qemu.default_memory = |value| whole(value, 64, 4 << 20);
    hypervisor.qemu.shared_fs = word;
    hypervisor.qemu.virtio_fs_daemon = path;
    hypervisor.qemu.virtio_fs_cache = word;
    hypervisor.qemu.virtio_fs_extra_args = list;
    hypervisor.qemu.enable_debug = boolean;
    hypervisor.qemu.seccomp_sandbox = text;
    agent.kata.enable_debug = boolean;
    agent.kata.debug_console_enabled = boolean;
    agent.kata.create_container_timeout = |value| whole(value, 1, 86_400);
    agent.kata.dial_timeout_ms = |value| whole(value, 1, 600_000);
    agent.kata.reconnect_timeout_ms = |value| whole(value, 1, 3_600_000);
    agent.kata.health_timeout_ms = |value| whole(value, 0, 3_600_000);
    agent.kata.kernel_modules = list;
    runtime.hypervisor_name = word;
    runtime.accelerator = word;
    runtime.uid_range = word;
    runtime.log_level = word;
    runtime.disable_guest_seccomp = boolean;
    runtime.enable_debug = boolean;
    runtime.enable_tracing = boolean;
    runtime.otlp_endpoint = word;
};

/// Upstream's keys and tables that this version does not carry: section, then names in it.
const NOT_SUPPORTED: &[(&str, &[&str])] = &[
    (
        "hypervisor",
        &["clh", "cloud-hypervisor", "dragonball", "firecracker", "openvmm", "remote", "stratovirt"],
    ),
    (
        "hypervisor.qemu",
        &[
            "block_device_driver",
            "confidential_guest",
            "cpu_features",
            "default_bridges",
            "default_maxmemory",
            "default_maxvcpus",
            "disable_block_device_use",
            "enable_annotations",
            "enable_hugepages",
            "enable_iommu",
            "enable_mem_prealloc",
            "enable_virtio_mem",
            "entropy_source",
            "factory",
            "firmware",
            "guest_hook_path",
            "kernel_verity_params",
            "machine_accelerators",
            "memory_slots",
            "pflashes",
            "rootfs_type",
            "rootless",
            "valid_hypervisor_paths",
            "valid_virtio_fs_daemon_paths",
            "virtio_fs_cache_size",
            "virtio_fs_queue_size",
            "vm_rootfs_driver",
        ],
    ),
    (
        "agent.kata",
        &["container_pipe_size", "enable_tracing", "launch_process_timeout", "mem_agent", "policy"],
    ),
    (
        "runtime",
        &[
            "agent_name",
            "dan_conf",
            "disable_new_netns",
            "emptydir_mode",
            "enable_pprof",
            "enable_vcpus_pinning",
            "experimental",
            "internetworking_model",
            "name",
            "sandbox_bind_mounts",
            "sandbox_cgroup_only",
            "static_sandbox_resource_mgmt",
            "vfio_mode",
        ],
    ),
];

/// The setting written at `path`.
pub(crate) fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Whether settings are written below `path`.
pub(crate) fn is_section(path: &str) -> bool {
    KEYS.iter().any(|key| key.path.strip_prefix(path).is_some_and(|rest| rest.starts_with('.')))
}

/// Why `path`, which is neither a setting nor a section, is refused.
pub(crate) fn refusal(path: &str) -> Fault {
    let covers = |section: &str, name: &str| {
        let rest = path.strip_prefix(section).and_then(|rest| rest.strip_prefix('.'));
        rest.and_then(|rest| rest.strip_prefix(name))
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    let carried_later =
        NOT_SUPPORTED.iter().any(|(section, names)| names.iter().any(|name| covers(section, name)));
    if carried_later { Fault::NotSupported } else { Fault::Unknown { nearest: nearest(path) } }
}

/// The setting or section spelt most alike, if any is near enough to be meant. A right name in the wrong section counts.
fn nearest(path: &str) -> Option<String> {
    let name = last(path);
    let mut best: Option<(usize, &str)> = None;
    for candidate in KEYS.iter().flat_map(|key| prefixes(key.path)) {
        let whole = strsim::osa_distance(path, candidate);
        let moved = 1 + strsim::osa_distance(name, last(candidate));
        let distance = whole.min(moved);
        if best.is_none_or(|(least, _)| distance < least) {
            best = Some((distance, candidate));
        }
    }
    best.filter(|(distance, _)| *distance <= 1 + name.len() / 4).map(|(_, candidate)| candidate.to_owned())
}

fn last(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

/// `a`, `a.b` and `a.b.c` of `a.b.c`.
fn prefixes(path: &'static str) -> impl Iterator<Item = &'static str> {
    let sections = path.match_indices('.').filter_map(|(dot, _)| path.get(..dot));
    sections.chain(std::iter::once(path))
}

fn wrong_type(expected: &'static str, value: &DeValue<'_>) -> Fault {
    Fault::WrongType { expected, found: value.type_str() }
}

fn boolean(value: &DeValue<'_>) -> Result<bool, Fault> {
    value.as_bool().ok_or_else(|| wrong_type("boolean", value))
}

fn text(value: &DeValue<'_>) -> Result<String, Fault> {
    let text = value.as_str().ok_or_else(|| wrong_type("string", value))?;
    // Texts end up as arguments of programs, which cannot carry it.
    if text.contains('\0') {
        return Err(Fault::Invalid("holds a NUL character".to_owned()));
    }
    Ok(text.to_owned())
}

/// An absolute path. Empty is unset, so that a later layer can take back what an earlier one gave.
fn path(value: &DeValue<'_>) -> Result<Option<PathBuf>, Fault> {
    let path = PathBuf::from(text(value)?);
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    if !path.is_absolute() {
        return Err(Fault::Invalid(format!("{} is not an absolute path", path.display())));
    }
    Ok(Some(path))
}

fn word<T: FromStr<Err = String>>(value: &DeValue<'_>) -> Result<T, Fault> {
    text(value)?.parse().map_err(Fault::Invalid)
}

fn words(value: &DeValue<'_>) -> Result<Vec<String>, Fault> {
    kernel_words(&text(value)?).map_err(Fault::Invalid)
}

fn list(value: &DeValue<'_>) -> Result<Vec<String>, Fault> {
    let items = value.as_array().ok_or_else(|| wrong_type("array of strings", value))?;
    items.iter().map(|item| text(item.get_ref())).collect()
}

fn integer(value: &DeValue<'_>) -> Option<i128> {
    let number = value.as_integer()?;
    i128::from_str_radix(number.as_str(), number.radix()).ok()
}

fn whole(value: &DeValue<'_>, least: u64, most: u64) -> Result<u64, Fault> {
    if !value.is_integer() {
        return Err(wrong_type("integer", value));
    }
    let number = integer(value).and_then(|number| u64::try_from(number).ok());
    number
        .filter(|number| (least..=most).contains(number))
        .ok_or_else(|| Fault::Invalid(format!("must be from {least} to {most}")))
}

/// A count of virtual CPUs: whole or not, as in upstream's files. 255 is what fits without interrupt remapping.
fn vcpus(value: &DeValue<'_>) -> Result<f64, Fault> {
    let digits = value.as_integer().map(|number| (number.as_str(), number.radix() == 10));
    let (digits, decimal) = digits
        .or_else(|| value.as_float().map(|number| (number.as_str(), true)))
        .ok_or_else(|| wrong_type("number", value))?;
    let count = digits.parse::<f64>().ok().filter(|count| decimal && count.is_finite() && *count <= 255.0);
    count.ok_or_else(|| Fault::Invalid("must be a decimal number up to 255".to_owned()))
}
