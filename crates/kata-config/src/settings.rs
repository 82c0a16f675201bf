//! The typed settings and their defaults. Section and key names are those of Kata Containers 4.1.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::endpoint::OtlpEndpoint;
use crate::text::keywords;

/// The whole configuration of a pod. Serialises to TOML that loads back to the same value.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Config {
    /// `[hypervisor.*]`
    pub hypervisor: HypervisorSection,
    /// `[agent.*]`
    pub agent: AgentSection,
    /// `[runtime]`
    pub runtime: Runtime,
}

/// `[hypervisor]`: one table for each driver.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct HypervisorSection {
    /// `[hypervisor.qemu]`
    pub qemu: Qemu,
}

/// `[agent]`: one table for each agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AgentSection {
    /// `[agent.kata]`
    pub kata: KataAgent,
}

/// `[hypervisor.qemu]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Qemu {
    /// The QEMU program; unset: `qemu-system-<arch>` from `PATH`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Guest kernel; unset: the one of the guest image's manifest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Guest initramfs; unset: the one of the guest image's manifest. Excludes `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Guest root disk image. Excludes `initrd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
    /// The emulated machine. Default `q35`.
    pub machine_type: MachineType,
    /// Further parameters of the guest kernel. Written as one string; a quoted part stays one parameter.
    #[serde(serialize_with = "joined")]
    pub kernel_params: Vec<String>,
    /// Virtual CPUs before any container asks for more: 0 is one, negative is all of the host's; see [`Qemu::vcpus`].
    pub default_vcpus: f64,
    /// Guest memory in MiB.
    pub default_memory: u64,
    /// How host files reach the guest. Default `virtio-fs`.
    pub shared_fs: SharedFs,
    /// The virtio-fs daemon; unset: `kata-virtiofsd` found by [`crate::Artefacts`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub virtio_fs_daemon: Option<PathBuf>,
    /// Caching in the guest of shared files. Default `auto`.
    pub virtio_fs_cache: VirtioFsCache,
    /// Further arguments of the virtio-fs daemon.
    pub virtio_fs_extra_args: Vec<String>,
    /// Verbose guest kernel and VMM.
    pub enable_debug: bool,
    /// Argument of QEMU's `-sandbox`; empty switches QEMU's own seccomp filter off. Upstream's default is empty, ours
    /// is the strictest set that QEMU runs under.
    pub seccomp_sandbox: String,
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            path: None,
            kernel: None,
            initrd: None,
            image: None,
            machine_type: MachineType::Q35,
            kernel_params: Vec::new(),
            default_vcpus: 1.0,
            default_memory: 2048,
            shared_fs: SharedFs::VirtioFs,
            virtio_fs_daemon: None,
            virtio_fs_cache: VirtioFsCache::Auto,
            virtio_fs_extra_args: Vec::new(),
            enable_debug: false,
            seccomp_sandbox: "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
                .to_owned(),
        }
    }
}

impl Qemu {
    /// Whole virtual CPUs at boot on a host with `host_cpus`: fractions round up, never more than the host has.
    pub fn vcpus(&self, host_cpus: u32) -> u32 {
        let host = host_cpus.max(1);
        if self.default_vcpus < 0.0 {
            return host;
        }
        (1..host).find(|count| f64::from(*count) >= self.default_vcpus).unwrap_or(host)
    }
}

/// `[agent.kata]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KataAgent {
    /// Verbose agent log.
    pub enable_debug: bool,
    /// A shell on the guest's debug console port. Off by default: it is a way into the guest past the container.
    pub debug_console_enabled: bool,
    /// Bound on one container's creation in the guest, in seconds. Default 30.
    pub create_container_timeout: u64,
    /// Bound on one attempt to reach an agent that does not announce itself, in milliseconds. Default 10.
    pub dial_timeout_ms: u64,
    /// Bound on the whole wait from the VMM's start until the agent serves, in milliseconds. Taken as written; the default
    /// is 60 000 (upstream's 3000 does not fit an emulated guest).
    pub reconnect_timeout_ms: u64,
    /// How long the pod may give no sign of life before it counts as dead, in milliseconds; 0 never gives it up. The default
    /// is 30 000. Upstream looks every 30 s and has no setting.
    pub health_timeout_ms: u64,
    /// Modules the agent loads, each with its parameters: `"e1000e InterruptThrottleRate=3000"`.
    pub kernel_modules: Vec<String>,
}

impl Default for KataAgent {
    fn default() -> Self {
        Self {
            enable_debug: false,
            debug_console_enabled: false,
            create_container_timeout: 30,
            dial_timeout_ms: 10,
            reconnect_timeout_ms: 60_000,
            health_timeout_ms: 30_000,
            kernel_modules: Vec::new(),
        }
    }
}

impl KataAgent {
    /// [`KataAgent::create_container_timeout`] as a duration.
    pub fn create_container_bound(&self) -> Duration {
        Duration::from_secs(self.create_container_timeout)
    }

    /// [`KataAgent::dial_timeout_ms`] as a duration.
    pub fn dial_bound(&self) -> Duration {
        Duration::from_millis(self.dial_timeout_ms)
    }

    /// [`KataAgent::reconnect_timeout_ms`] as a duration.
    pub fn reconnect_bound(&self) -> Duration {
        Duration::from_millis(self.reconnect_timeout_ms)
    }

    /// [`KataAgent::health_timeout_ms`] as a duration, if there is a bound.
    pub fn health_bound(&self) -> Option<Duration> {
        (self.health_timeout_ms > 0).then(|| Duration::from_millis(self.health_timeout_ms))
    }
}

/// `[runtime]`
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Runtime {
    /// Which driver runs the VM. Default `auto`.
    pub hypervisor_name: HypervisorChoice,
    /// Which accelerator runs the guest. Ours; default `auto`.
    pub accelerator: AcceleratorChoice,
    /// User ids for the processes of pods, `"first-last"`. Ours; each pod's helpers run as one of them.
    pub uid_range: UidRange,
    /// Level of the owner's log. Default `info`.
    pub log_level: LogLevel,
    /// Drops seccomp profiles instead of applying them in the guest. Default false (upstream: true): a profile that was
    /// asked for is applied.
    pub disable_guest_seccomp: bool,
    /// Raises the owner's log to `debug` whatever `log_level` says.
    pub enable_debug: bool,
    /// Sends spans of the pod's start and of calls to `otlp_endpoint`.
    pub enable_tracing: bool,
    /// Collector of those spans, OTLP over HTTP. Ours; default `http://127.0.0.1:4318`.
    pub otlp_endpoint: OtlpEndpoint,
}

impl Default for Runtime {
    fn default() -> Self {
        Self {
            hypervisor_name: HypervisorChoice::Auto,
            accelerator: AcceleratorChoice::Auto,
            uid_range: UidRange { first: 900_000, last: 999_999 },
            log_level: LogLevel::Info,
            disable_guest_seccomp: false,
            enable_debug: false,
            enable_tracing: false,
            otlp_endpoint: OtlpEndpoint::default(),
        }
    }
}

impl Runtime {
    /// The level that `log_level` and `enable_debug` add up to.
    pub fn effective_log_level(&self) -> LogLevel {
        if self.enable_debug { self.log_level.max(LogLevel::Debug) } else { self.log_level }
    }
}

/// An inclusive range of user ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UidRange {
    /// Lowest id.
    pub first: u32,
    /// Highest id, not below `first`.
    pub last: u32,
}

impl UidRange {
    /// How many ids the range holds.
    pub fn count(&self) -> u64 {
        u64::from(self.last.saturating_sub(self.first)) + 1
    }
}

keywords! {
    /// `machine_type` of QEMU.
    MachineType { Q35 = "q35", Microvm = "microvm" }
}
keywords! {
    /// `shared_fs`: how host files reach the guest.
    SharedFs { VirtioFs = "virtio-fs", None = "none" }
}
keywords! {
    /// `virtio_fs_cache`: caching in the guest of shared files.
    VirtioFsCache { Auto = "auto", Always = "always", Never = "never", Metadata = "metadata" }
}
keywords! {
    /// `hypervisor_name`.
    HypervisorChoice { Auto = "auto", Qemu = "qemu" }
}
keywords! {
    /// `accelerator`: hardware virtualisation, emulation, or whichever the host can do.
    AcceleratorChoice { Auto = "auto", Kvm = "kvm", Tcg = "tcg" }
}
keywords! {
    /// `log_level`, from quiet to verbose.
    LogLevel { Error = "error", Warn = "warn", Info = "info", Debug = "debug", Trace = "trace" }
}

fn joined<S: serde::Serializer>(words: &[String], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&words.join(" "))
}
