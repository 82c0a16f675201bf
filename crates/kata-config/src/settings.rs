//! The typed settings and their defaults. Section and key names are those of Kata Containers 4.1.

use std::fmt;
use std::ops::Deref;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::deprecation::Policy;
use crate::endpoint::OtlpEndpoint;
use crate::extension::ExtensionImage;
use crate::keys::{Key, Reach, Separator, Stability, Value};
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
    /// `[hypervisor.qemu]`: the settings of the chosen driver, whichever it is, but for its program.
    pub qemu: Qemu,
    /// `[hypervisor.cloud-hypervisor]`, `[hypervisor.clh]`
    #[serde(rename = "cloud-hypervisor", skip_serializing_if = "Program::is_unset")]
    pub cloud_hypervisor: Program,
    /// `[hypervisor.firecracker]`, `[hypervisor.fc]`
    #[serde(skip_serializing_if = "Program::is_unset")]
    pub firecracker: Program,
}

/// What a driver other than QEMU does not share with it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Program {
    /// The machine monitor's program; unset: the one of its usual name from `PATH`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

impl Program {
    fn is_unset(&self) -> bool {
        *self == Self::default()
    }
}

impl HypervisorSection {
    /// Reads `path` of the section of `driver`.
    pub(crate) fn set_program(
        &mut self,
        driver: HypervisorChoice,
        value: &toml::de::DeValue<'_>,
    ) -> Result<(), crate::Fault> {
        let path = Value::read(value)?;
        match driver {
            HypervisorChoice::CloudHypervisor | HypervisorChoice::Clh => self.cloud_hypervisor.path = path,
            HypervisorChoice::Firecracker | HypervisorChoice::Fc => self.firecracker.path = path,
            HypervisorChoice::Auto | HypervisorChoice::Qemu | HypervisorChoice::Builtin => {
                self.qemu.path = path
            }
        }
        Ok(())
    }
}

impl HypervisorChoice {
    /// Names of the sections that are read only where this driver is chosen.
    pub(crate) fn sections(self) -> &'static [&'static str] {
        match self {
            Self::Auto | Self::Qemu | Self::Builtin => &[],
            Self::CloudHypervisor | Self::Clh => &["clh", "cloud-hypervisor"],
            Self::Firecracker | Self::Fc => &["fc", "firecracker"],
        }
    }
}

/// `[agent]`: one table for each agent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct AgentSection {
    /// `[agent.kata]`
    pub kata: KataAgent,
}

/// A section: its struct, its defaults and its rows of the table of keys, from one text. A section `with`
/// one within has it as its last field; the rows of that are its own.
///
/// Each field is followed by its default and by what the table says of it beyond the type. A field's place in [`Config`]
/// is the key's place in the file, so the three cannot drift apart.
macro_rules! settings {
    (
        $(#[$meta:meta])*
        pub struct $name:ident in $section:literal: |$config:ident| $place:expr $(, with $inside:ident: $inside_type:ty)?;
        $(
            $(#[doc = $doc:literal])+
            $(#[serde($($serde:tt)+)])?
            $field:ident: $type:ty = $default:expr $(, { $($facts:tt)+ })?;
        )+
    ) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Serialize)]
        pub struct $name {
            $($(#[doc = $doc])+ $(#[serde($($serde)+)])? pub $field: $type,)+
            $(#[doc = concat!("`[", $section, ".", stringify!($inside), "]`")] pub $inside: $inside_type,)?
        }

        impl $name {
            pub(crate) const KEYS: &'static [Key] = &[$(
                Key::supported(
                    $section,
                    stringify!($field),
                    <$type as Value>::KIND,
                    concat!($($doc, "\n"),+),
                    |$config, value| {
                        $place.$field = Value::read(value)?;
                        Ok(())
                    },
                )$($($facts)+)?
            ),+];
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)+ $($inside: <$inside_type>::default())? }
            }
        }
    };
}

/// Where upstream and distributions install the daemon that upstream starts.
const UPSTREAMS_DAEMON: &[&str] = &[
    "\"/opt/kata/libexec/virtiofsd\"",
    "\"/usr/libexec/virtiofsd\"",
    "\"/usr/libexec/kata-qemu/virtiofsd\"",
    "\"/usr/lib/qemu/virtiofsd\"",
];
/// The driver that has them.
const QEMU: &[&str] = &["qemu"];
/// Drivers of upstream's that have templates, and so this section.
const TEMPLATE: &[&str] = &["qemu", "clh", "cloud-hypervisor", "dragonball"];
/// What it is given there by default.
const UPSTREAMS_ARGUMENTS: &str = "[\"--thread-pool-size=1\", \"-o\", \"announce_submounts\"]";

settings! {
    /// `[hypervisor.qemu]`
    pub struct Qemu in "hypervisor.*": |config| config.hypervisor.qemu, with factory: Factory;

    /// The machine monitor's program.
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf> = None,
        { .unset("`qemu-system-<arch>` from `PATH`").annotated().reach(Reach::Program("valid_hypervisor_paths")) };
    /// Guest kernel.
    #[serde(skip_serializing_if = "Option::is_none")]
    kernel: Option<PathBuf> = None,
        { .unset("the guest image's").annotated().reach(Reach::Path("valid_asset_paths")) };
    /// Guest initramfs. Excludes `image`.
    #[serde(skip_serializing_if = "Option::is_none")]
    initrd: Option<PathBuf> = None,
        { .unset("the guest image's").annotated().reach(Reach::Path("valid_asset_paths")) };
    /// Guest root disk image, or the directory of a guest image (one with a `manifest.json`). Excludes `initrd`.
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<PathBuf> = None,
        { .unset("the guest image's").annotated().reach(Reach::Path("valid_asset_paths")) };
    /// Images with further services, for a guest image of flavour services: each with `name` (up to 10 lower-case letters, digits
    /// and dashes), `path` and `verity_params`, as `kata-ctl image extension` prints them.
    guest_extension_images: Vec<ExtensionImage> = Vec::new(), { .rust() };
    /// Firmware of the machine, which only QEMU takes. Confidential guests need one that is built for them.
    #[serde(skip_serializing_if = "Option::is_none")]
    firmware: Option<PathBuf> = None,
        { .unset("the machine monitor's own").annotated().reach(Reach::Path("valid_asset_paths")) };
    /// The emulated machine. Nothing can be plugged into a `microvm` later.
    machine_type: MachineType = MachineType::Q35,
        { .annotated().planned_words(&["pc", "virt", "pseries", "s390-ccw-virtio"]) };
    /// Directory of the guest image with hooks for every container of the pod: the executable files in `prestart`, `poststart`
    /// and `poststop` below it.
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_hook_path: Option<PathBuf> = None, { .unset("no hooks").annotated() };
    /// Further parameters of the guest kernel, separated by blanks. A quoted part stays one parameter.
    kernel_params: KernelParams = KernelParams::default(), { .annotated() };
    /// Virtual processors of a pod without a limit: 0 is one, negative is all of the host's. Fractions round up, and there are
    /// never more than the host has.
    default_vcpus: f64 = 1.0, { .up_to(255.0).annotated() };
    /// Most virtual processors of a machine; 0 is the host's number. A pod that was promised more is refused.
    default_maxvcpus: u64 = 0, { .range(0, 1024).annotation("default_max_vcpus") };
    /// Processors for the guest itself, added to the pod's limits before they are rounded up. By default a limit of whole
    /// processors stays what it is.
    overhead_vcpus: f64 = 0.0, { .rust().up_to(255.0).upstream("0.2") };
    /// Guest memory of a pod without a limit, taken from the host as the guest touches it.
    default_memory: u64 = 2048, { .range(64, 4 << 20).unit("MiB").annotated() };
    /// Most memory of a machine; 0 is the host's. A pod that was promised more is refused.
    default_maxmemory: u64 = 0, { .range(0, 4 << 20).unit("MiB") };
    /// Memory for the guest's own programs, added to the pod's limits. What the guest's kernel takes for itself is added in any
    /// case.
    overhead_memory: u64 = 32, { .rust().range(0, 4 << 20).unit("MiB") };
    /// How often memory can be added to a machine that grows, see `runtime.static_sandbox_resource_mgmt`.
    memory_slots: u64 = 10, { .range(0, 255).annotated() };
    /// Takes all memory from the host before the guest starts.
    enable_mem_prealloc: bool = false, { .annotated() };
    /// Backs the guest's memory with huge pages of the host's, which must have been set aside.
    enable_hugepages: bool = false, { .annotated() };
    /// Kind of huge pages.
    hugepage_type: HugepageType = HugepageType::Hugetlbfs, { .rust().annotated().planned_words(&["thp"]) };
    /// Gives memory that the guest frees back to the host, by a balloon.
    reclaim_guest_freed_memory: bool = false, { .annotated() };
    /// How host files reach the guest.
    shared_fs: SharedFs = SharedFs::VirtioFs,
        { .annotated().planned_words(&["virtio-fs-nydus", "inline-virtio-fs"]) };
    /// The virtio-fs daemon. It is started as `PROGRAM --listen-fd N --shared-dir DIR --cache MODE` and the extra arguments,
    /// which upstream's virtiofsd does not take: where that is named, `kata-virtiofsd` is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    virtio_fs_daemon: Option<PathBuf> = None,
        { .unset("`kata-virtiofsd`").harmless(UPSTREAMS_DAEMON).annotated().reach(Reach::Program("valid_virtio_fs_daemon_paths")) };
    /// Caching in the guest of shared files.
    virtio_fs_cache: VirtioFsCache = VirtioFsCache::Auto, { .annotated() };
    /// Further arguments of the virtio-fs daemon, as `kata-virtiofsd --help` lists them.
    virtio_fs_extra_args: Vec<String> = Vec::new(),
        { .upstream(UPSTREAMS_ARGUMENTS).harmless(&[UPSTREAMS_ARGUMENTS]).annotated().separator(Separator::Json).reach(Reach::Arguments) };
    /// Queue pairs of a network interface; 0 is one. More than one is of use to a guest with as many processors.
    network_queues: u64 = 1, { .rust().range(0, 256).annotated() };
    /// Bandwidth of each interface into the pod; 0 is without a bound. Refused with `internetworking_model = "macvtap"`.
    rx_rate_limiter_max_rate: u64 = 0, { .unit("bit/s").annotated() };
    /// Bandwidth of each interface out of the pod; 0 is without a bound. Only with `internetworking_model = "tcfilter"`.
    tx_rate_limiter_max_rate: u64 = 0, { .unit("bit/s").annotated() };
    /// Has the machine monitor move the network's packets itself. Otherwise the host's kernel does, wherever it has
    /// `/dev/vhost-net`.
    disable_vhost_net: bool = false, { .annotated() };
    /// Bandwidth of each disk of the machine, both directions together; 0 is without a bound. What a tenth of a second allows
    /// may pass at once.
    disk_rate_limiter_bw_max_rate: u64 = 0, { .range(0, 8_000_000_000_000_000).unit("bit/s") };
    /// Operations on each disk of the machine; 0 is without a bound. What a tenth of a second allows may pass at once.
    disk_rate_limiter_ops_max_rate: u64 = 0, { .range(0, 1_000_000_000_000_000).unit("1/s") };
    /// Verbose guest kernel and machine monitor; the console is in the owner's log at `debug`.
    enable_debug: bool = false;
    /// Argument of QEMU's `-sandbox`; empty switches QEMU's own seccomp filter off. The default is the strictest set that
    /// QEMU runs under.
    seccomp_sandbox: String =
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned(),
        { .upstream("\"\"") };
    /// Memory that the host cannot read, by TDX or, with `sev_snp_guest`, by SEV-SNP. Only QEMU makes such machines, and a host
    /// without the hardware is told so. They need `firmware`, `shared_fs = "none"` and `runtime.static_sandbox_resource_mgmt`.
    confidential_guest: bool = false;
    /// SEV-SNP rather than TDX.
    sev_snp_guest: bool = false, { .on(QEMU) };
    /// SEV-SNP's policy of the guest, bits as in its firmware's interface.
    snp_guest_policy: u64 = 196_608, { .on(QEMU) };
    /// SEV-SNP's ID block, base64 of 96 bytes.
    snp_id_block: String = String::new(), { .on(QEMU) };
    /// SEV-SNP's ID authentication, base64 of 4096 bytes.
    snp_id_auth: String = String::new(), { .on(QEMU) };
    /// Port of the host's service that signs TDX's reports, on vsock; 0 is its Unix socket.
    tdx_quote_generation_service_socket_port: u64 = 4050, { .range(0, 4_294_967_295).on(QEMU) };
    /// Initdata: files for the guest, its policy among them, that its hardware can vouch for. Base64 of gzip of the document, as
    /// `kata-ctl initdata create` makes it. Only guest images with the capability `initdata` read it.
    initdata: String = String::new(), { .annotation("cc_init_data") };
    /// Annotations that pods may carry, each a regular expression that must match the whole name. An annotation of the
    /// hypervisor goes by its base name, e.g. `default_memory`; others with their group, e.g.
    /// `runtime.create_container_timeout`. One that names a program or passes it arguments has to be listed by its very name.
    enable_annotations: Vec<String> = Vec::new(),
        { .upstream("[\"enable_iommu\", \"kernel_params\", \"kernel_verity_params\", \"default_vcpus\", \"default_memory\"]") };
    /// Programs that the annotation `path` may name, as glob patterns.
    valid_hypervisor_paths: Vec<String> = Vec::new(), { .upstream("[\"/opt/kata/bin/qemu-system-x86_64\"]") };
    /// Programs that the annotation `virtio_fs_daemon` may name, as glob patterns.
    valid_virtio_fs_daemon_paths: Vec<String> = Vec::new(), { .upstream("[\"/opt/kata/libexec/virtiofsd\"]") };
    /// Devices that the annotation `entropy_source` may name, as glob patterns.
    valid_entropy_sources: Vec<String> = Vec::new(), { .upstream("[\"/dev/urandom\", \"/dev/random\", \"\"]") };
    /// Files that the annotations `kernel`, `image`, `initrd` and `firmware` may name, as glob patterns. Upstream takes any
    /// file of the host once the annotation is enabled.
    valid_asset_paths: Vec<String> = Vec::new(), { .ours() };
}

settings! {
    /// `[hypervisor.qemu.factory]`
    pub struct Factory in "hypervisor.*.factory": |config| config.hypervisor.qemu.factory;

    /// Starts pods as copies of a machine that has booted, which `kata-ctl factory init` makes. A pod that none fits starts as
    /// ever. Pods of one template share what lies where in their memory. Only the built-in monitor has templates.
    enable_template: bool = false, { .on(TEMPLATE) };
    /// Directory of those machines' memory and state. It has to be root's alone; on a tmpfs it costs memory of the host.
    template_path: PathBuf = PathBuf::from("/run/vc/vm/template"), { .on(TEMPLATE) };
}

/// Hardware that keeps a machine's memory from its host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tee {
    /// AMD's.
    SevSnp,
    /// Intel's.
    Tdx,
}

impl fmt::Display for Tee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SevSnp => "SEV-SNP",
            Self::Tdx => "TDX",
        })
    }
}

impl Qemu {
    /// What keeps the machine's memory from its host, if anything shall.
    pub fn tee(&self) -> Option<Tee> {
        self.confidential_guest.then_some(if self.sev_snp_guest { Tee::SevSnp } else { Tee::Tdx })
    }

    /// Whole virtual CPUs at boot on a host with `host_cpus`: fractions round up, never more than the host has.
    pub fn vcpus(&self, host_cpus: u32) -> u32 {
        let host = host_cpus.max(1);
        if self.default_vcpus < 0.0 {
            return host;
        }
        (1..host).find(|count| f64::from(*count) >= self.default_vcpus).unwrap_or(host)
    }
}

settings! {
    /// `[agent.kata]`
    pub struct KataAgent in "agent.kata": |config| config.agent.kata;

    /// Verbose agent log.
    enable_debug: bool = false;
    /// A shell on the guest's debug console port. Off by default: it is a way into the guest past the container.
    debug_console_enabled: bool = false;
    /// Bound on one container's creation in the guest.
    create_container_timeout: u64 = 30,
        { .range(1, 86_400).unit("s").annotation("runtime.create_container_timeout") };
    /// Bound on one attempt to reach an agent that does not announce itself.
    dial_timeout_ms: u64 = 10, { .rust().range(1, 600_000).unit("ms") };
    /// Bound on the whole wait from the machine's start until the agent serves. Upstream's does not fit an emulated guest.
    reconnect_timeout_ms: u64 = 60_000, { .rust().range(1, 3_600_000).unit("ms").upstream("3000") };
    /// How long the agent may not answer, or one of the pod's processes be stopped, before the pod counts as dead; 0 never
    /// gives it up. Upstream looks every 30 s and has no setting.
    health_timeout_ms: u64 = 30_000, { .ours().range(0, 3_600_000).unit("ms") };
    /// Modules the agent loads, each with its parameters: `"e1000e InterruptThrottleRate=3000"`.
    kernel_modules: Vec<String> = Vec::new(), { .annotated().separator(Separator::Semicolon) };
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

settings! {
    /// `[runtime]`
    pub struct Runtime in "runtime": |config| config.runtime;

    /// Which driver runs the machine. `builtin` is this project's own, which needs KVM; `auto` is that one where KVM works, and
    /// QEMU where not or where its `path` or another `machine_type` is named. All drivers have the settings of `[hypervisor.qemu]`,
    /// but for those of QEMU itself; Cloud Hypervisor and Firecracker have those of their own section over them, and their program
    /// from `path` of that section alone.
    hypervisor_name: HypervisorChoice = HypervisorChoice::Auto,
        { .rust() .upstream("\"qemu\"") .annotated() .planned_words(&["dragonball", "openvmm", "remote"]) };
    /// Hardware virtualisation, emulation, or whichever the host can do.
    accelerator: AcceleratorChoice = AcceleratorChoice::Auto, { .ours() };
    /// How the pod's interfaces are joined to the machine's: by redirecting each to the other, by a macvtap, or not at all, for
    /// somebody else to join the taps.
    internetworking_model: InternetworkingModel = InternetworkingModel::TcFilter,
        { .annotated().planned_words(&["l3forwarding"]) };
    /// Directory of networks that are attached directly, one file `<pod>.json` each. This version carries none: a pod that has
    /// such a file is refused.
    dan_conf: PathBuf = PathBuf::from("/run/kata-containers/dans");
    /// User ids for the processes of pods, `"first-last"`; each pod's helpers run as one of them.
    uid_range: UidRange = UidRange { first: 900_000, last: 999_999 }, { .ours() };
    /// Level of the owner's log.
    log_level: LogLevel = LogLevel::Info, { .rust().planned_words(&["critical"]) };
    /// All of a pod's processes on the host in the pod's own cgroup. Otherwise only its virtual processors are, and the rest is in
    /// `/kata_overhead`.
    sandbox_cgroup_only: bool = true, { .annotated() };
    /// Sizes the machine once, before it boots, for what the pod was promised. Otherwise it boots with the defaults, and grows with
    /// its containers.
    static_sandbox_resource_mgmt: bool = true;
    /// Keeps each virtual processor on one of the host's, as long as the pod's cpuset has as many as the machine.
    enable_vcpus_pinning: bool = false, { .annotated() };
    /// Drops seccomp profiles instead of applying them in the guest. By default a profile that was asked for is applied.
    disable_guest_seccomp: bool = false, { .upstream("true").annotated() };
    /// What an emptyDir on disk is made of: a directory of the host that is shared, or a file system of its own on a sparse
    /// file in that directory, which is plugged in as a disk; the guest may encrypt it with a key that nobody else has, for which
    /// its image needs a service.
    emptydir_mode: EmptyDirMode = EmptyDirMode::SharedFs, { .rust() };
    /// Features by name. `force_guest_pull`: images are pulled in the guest, for which its image needs a service, whatever the host
    /// has of them.
    experimental: Vec<Feature> = Vec::new(), { .stability(Stability::Experimental).annotated() };
    /// Raises the owner's log to `debug` whatever `log_level` says.
    enable_debug: bool = false;
    /// What becomes of a use of something deprecated. `KATA_DEPRECATED` and `--deprecated` win over it.
    deprecated: Policy = Policy::Warn, { .ours() };
    /// Ids of deprecations that are off by default and wanted all the same.
    deprecated_opt_in: Vec<String> = Vec::new(), { .ours() };
    /// Sends spans of the pod's start and of calls to `otlp_endpoint`.
    enable_tracing: bool = false;
    /// Collector of those spans, OTLP over HTTP without TLS: `http://HOST[:PORT][/PATH]`.
    otlp_endpoint: OtlpEndpoint = OtlpEndpoint::default(), { .ours() };
}

impl Runtime {
    /// The level that `log_level` and `enable_debug` add up to.
    pub fn effective_log_level(&self) -> LogLevel {
        if self.enable_debug { self.log_level.max(LogLevel::Debug) } else { self.log_level }
    }
}

/// Parameters of the guest kernel. In the file they are one string.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelParams(pub Vec<String>);

impl Deref for KernelParams {
    type Target = [String];

    fn deref(&self) -> &[String] {
        &self.0
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
    /// `hugepage_type`.
    HugepageType { Hugetlbfs = "hugetlbfs" }
}
keywords! {
    /// `shared_fs`: how host files reach the guest.
    SharedFs { VirtioFs = "virtio-fs", None = "none" }
}
keywords! {
    /// `emptydir_mode`: what an emptyDir on disk is made of.
    EmptyDirMode { SharedFs = "shared-fs", BlockPlain = "block-plain", BlockEncrypted = "block-encrypted" }
}
keywords! {
    /// `experimental`: what is tried out.
    Feature { ForceGuestPull = "force_guest_pull" }
}
keywords! {
    /// `virtio_fs_cache`: caching in the guest of shared files.
    VirtioFsCache { Auto = "auto", Always = "always", Never = "never", Metadata = "metadata" }
}
keywords! {
    /// `hypervisor_name`.
    HypervisorChoice {
        Auto = "auto",
        Qemu = "qemu",
        Builtin = "builtin",
        CloudHypervisor = "cloud-hypervisor",
        Clh = "clh",
        Firecracker = "firecracker",
        Fc = "fc",
    }
}
keywords! {
    /// `internetworking_model`: how the pod's interfaces are joined to the machine's.
    InternetworkingModel { TcFilter = "tcfilter", MacVtap = "macvtap", None = "none" }
}
keywords! {
    /// `accelerator`: hardware virtualisation, emulation, or whichever the host can do.
    AcceleratorChoice { Auto = "auto", Kvm = "kvm", Tcg = "tcg" }
}
keywords! {
    /// `log_level`, from quiet to verbose.
    LogLevel { Error = "error", Warn = "warn", Info = "info", Debug = "debug", Trace = "trace" }
}

/// The value at a path of a configuration, as TOML; `None` where nothing is set there.
pub fn value_at(config: &Config, path: &str) -> Option<String> {
    let table = toml::Value::try_from(config).ok()?;
    path.split('.').try_fold(&table, |value, name| value.get(name)).map(toml::Value::to_string)
}

/// The default of a supported key, as TOML.
pub(crate) fn default_of(path: &str) -> Option<String> {
    value_at(&Config::default(), path)
}
