//! The OCI specification from its wire form to `oci_spec`: the only place where the two meet.
//!
//! The wire has no optional scalars. Zero and the empty string stand for "not given" wherever the specification
//! makes the field optional and zero means nothing in it; a device number below zero is the wildcard, and so is major 0.

#![expect(
    clippy::needless_pass_by_value,
    reason = "a converter consumes its message, whether or not a field moves"
)]

use std::collections::HashMap;
use std::str::FromStr;

use kata_api::oci as wire;
use oci_spec::OciSpecError;
use oci_spec::runtime as oci;
use protobuf::MessageField;

/// A wire specification that is not a specification.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// A field that a container cannot do without.
    #[error("the specification has no {0}")]
    Missing(&'static str),
    /// A value outside of what the field may hold.
    #[error("{field}: {value:?} is not a valid value")]
    Invalid {
        /// Path of the field, as in config.json.
        field: &'static str,
        /// What it held.
        value: String,
    },
    /// A part that `oci_spec` refuses to build.
    #[error("{field} cannot be built")]
    Build {
        /// Path of the field, as in config.json.
        field: &'static str,
        #[source]
        /// Its own words.
        source: OciSpecError,
    },
}

type Result<T> = std::result::Result<T, SpecError>;

/// Converts a whole specification. Root and process must be there.
///
/// # Errors
/// [`SpecError`] with the field's path.
pub fn spec(wire: wire::Spec) -> Result<oci::Spec> {
    let process_wire = wire.process.into_option().ok_or(SpecError::Missing("process"))?;
    let root_wire = wire.root.into_option().ok_or(SpecError::Missing("root"))?;
    let mut root = oci::Root::default();
    root.set_path(root_wire.path.into()).set_readonly(Some(root_wire.readonly));
    let mut spec = oci::Spec::default();
    if !wire.version.is_empty() {
        spec.set_version(wire.version);
    }
    spec.set_root(Some(root))
        .set_process(Some(process(process_wire)?))
        .set_hostname(text(wire.hostname))
        .set_domainname(text(wire.domainname))
        .set_mounts(Some(wire.mounts.into_iter().map(mount).collect()))
        .set_hooks(wire.hooks.into_option().map(hooks))
        .set_annotations(map(wire.annotations))
        .set_linux(wire.linux.into_option().map(linux).transpose()?);
    Ok(spec)
}

/// Converts the process to run.
///
/// # Errors
/// [`SpecError`] with the field's path.
pub fn process(wire: wire::Process) -> Result<oci::Process> {
    let oom = i32::try_from(wire.oom_score_adj)
        .map_err(|_| invalid("process.oomScoreAdj", &wire.oom_score_adj.to_string()))?;
    let rlimits = each(wire.rlimits, rlimit)?;
    let mut process = oci::Process::default();
    process
        .set_terminal(Some(wire.terminal))
        .set_console_size(wire.console_size.into_option().map(console_size).transpose()?)
        .set_user(user(wire.user))
        .set_args(Some(wire.args))
        .set_env(Some(wire.env))
        .set_cwd(if wire.cwd.is_empty() { "/".into() } else { wire.cwd.into() })
        .set_capabilities(wire.capabilities.into_option().map(capabilities).transpose()?)
        .set_rlimits(Some(rlimits))
        .set_no_new_privileges(Some(wire.no_new_privileges))
        .set_apparmor_profile(text(wire.apparmor_profile))
        .set_oom_score_adj(Some(oom).filter(|value| *value != 0))
        .set_selinux_label(text(wire.selinux_label));
    Ok(process)
}

/// Converts resource limits.
///
/// # Errors
/// [`SpecError`] with the field's path.
pub fn resources(wire: wire::LinuxResources) -> Result<oci::LinuxResources> {
    let mut resources = oci::LinuxResources::default();
    resources
        .set_devices(list(each(wire.devices, device_rule)?))
        .set_memory(wire.memory.into_option().map(memory))
        .set_cpu(wire.cpu.into_option().map(cpu))
        .set_block_io(wire.block_io.into_option().map(block_io).transpose()?)
        .set_hugepage_limits(list(each(wire.hugepage_limits, hugepage_limit)?))
        .set_network(wire.network.into_option().map(network))
        .set_unified(map(wire.unified));
    if let Some(pids) = wire.pids.into_option() {
        let mut limit = oci::LinuxPids::default();
        limit.set_limit(pids.limit);
        resources.set_pids(Some(limit));
    }
    Ok(resources)
}

fn invalid(field: &'static str, value: &str) -> SpecError {
    SpecError::Invalid { field, value: value.to_owned() }
}

fn build<T>(field: &'static str, built: std::result::Result<T, OciSpecError>) -> Result<T> {
    built.map_err(|source| SpecError::Build { field, source })
}

fn parse<T: FromStr>(field: &'static str, value: &str) -> Result<T> {
    T::from_str(value).map_err(|_| invalid(field, value))
}

fn each<W, T>(wire: Vec<W>, convert: impl Fn(W) -> Result<T>) -> Result<Vec<T>> {
    wire.into_iter().map(convert).collect()
}

fn text(value: String) -> Option<String> {
    Some(value).filter(|value| !value.is_empty())
}

fn list<T>(value: Vec<T>) -> Option<Vec<T>> {
    Some(value).filter(|value| !value.is_empty())
}

fn map(value: HashMap<String, String>) -> Option<HashMap<String, String>> {
    Some(value).filter(|value| !value.is_empty())
}

fn nonzero<T: PartialEq + Default>(value: T) -> Option<T> {
    Some(value).filter(|value| *value != T::default())
}

fn user(wire: MessageField<wire::User>) -> oci::User {
    let wire = wire.unwrap_or_default();
    let mut user = oci::User::default();
    user.set_uid(wire.uid)
        .set_gid(wire.gid)
        .set_umask(wire.umask)
        .set_additional_gids(list(wire.additional_gids))
        .set_username(text(wire.username));
    user
}

fn console_size(wire: wire::Box) -> Result<oci::Box> {
    let size = oci::BoxBuilder::default().height(u64::from(wire.height)).width(u64::from(wire.width));
    build("process.consoleSize", size.build())
}

fn rlimit(wire: wire::POSIXRlimit) -> Result<oci::PosixRlimit> {
    let typ: oci::PosixRlimitType = parse("process.rlimits[].type", &wire.type_)?;
    let limit = oci::PosixRlimitBuilder::default().typ(typ).hard(wire.hard).soft(wire.soft);
    build("process.rlimits[]", limit.build())
}

fn capabilities(wire: wire::LinuxCapabilities) -> Result<oci::LinuxCapabilities> {
    let mut capabilities = oci::LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(capability_set(&wire.bounding)?))
        .set_effective(Some(capability_set(&wire.effective)?))
        .set_inheritable(Some(capability_set(&wire.inheritable)?))
        .set_permitted(Some(capability_set(&wire.permitted)?))
        .set_ambient(Some(capability_set(&wire.ambient)?));
    Ok(capabilities)
}

fn capability_set(names: &[String]) -> Result<oci::Capabilities> {
    names
        .iter()
        .map(|name| {
            let short = name.strip_prefix("CAP_").unwrap_or(name);
            oci::Capability::from_str(short).map_err(|_| invalid("process.capabilities", name))
        })
        .collect()
}

fn mount(wire: wire::Mount) -> oci::Mount {
    let mut mount = oci::Mount::default();
    mount
        .set_destination(wire.destination.into())
        .set_typ(text(wire.type_))
        .set_source(text(wire.source).map(Into::into))
        .set_options(list(wire.options));
    mount
}

fn hooks(wire: wire::Hooks) -> oci::Hooks {
    let convert = |wire: Vec<wire::Hook>| list(wire.into_iter().map(hook).collect());
    let mut hooks = oci::Hooks::default();
    hooks
        .set_prestart(convert(wire.prestart))
        .set_create_runtime(convert(wire.create_runtime))
        .set_create_container(convert(wire.create_container))
        .set_start_container(convert(wire.start_container))
        .set_poststart(convert(wire.poststart))
        .set_poststop(convert(wire.poststop));
    hooks
}

fn hook(wire: wire::Hook) -> oci::Hook {
    let mut hook = oci::Hook::default();
    hook.set_path(wire.path.into())
        .set_args(list(wire.args))
        .set_env(list(wire.env))
        .set_timeout(nonzero(wire.timeout));
    hook
}

fn linux(wire: wire::Linux) -> Result<oci::Linux> {
    let mappings = |wire: Vec<wire::LinuxIDMapping>| each(wire, id_mapping).map(list);
    let mut linux = oci::Linux::default();
    linux
        .set_uid_mappings(mappings(wire.uid_mappings)?)
        .set_gid_mappings(mappings(wire.gid_mappings)?)
        .set_sysctl(map(wire.sysctl))
        .set_resources(wire.resources.into_option().map(resources).transpose()?)
        .set_cgroups_path(text(wire.cgroups_path).map(Into::into))
        .set_namespaces(Some(each(wire.namespaces, namespace)?))
        .set_devices(list(each(wire.devices, device)?))
        .set_seccomp(wire.seccomp.into_option().map(seccomp).transpose()?)
        .set_rootfs_propagation(text(wire.rootfs_propagation))
        .set_masked_paths(list(wire.masked_paths))
        .set_readonly_paths(list(wire.readonly_paths))
        .set_mount_label(text(wire.mount_label))
        .set_intel_rdt(wire.intel_rdt.into_option().map(|wire| {
            let mut rdt = oci::LinuxIntelRdt::default();
            rdt.set_schemata(text(wire.l3_cache_schema).map(|schema| vec![schema]));
            rdt
        }));
    Ok(linux)
}

fn id_mapping(wire: wire::LinuxIDMapping) -> Result<oci::LinuxIdMapping> {
    let mapping = oci::LinuxIdMappingBuilder::default();
    let mapping = mapping.host_id(wire.host_id).container_id(wire.container_id).size(wire.size);
    build("linux.idMappings[]", mapping.build())
}

fn namespace(wire: wire::LinuxNamespace) -> Result<oci::LinuxNamespace> {
    let typ = oci::LinuxNamespaceType::try_from(wire.type_.as_str())
        .map_err(|_| invalid("linux.namespaces[].type", &wire.type_))?;
    let mut namespace = oci::LinuxNamespace::default();
    namespace.set_typ(typ).set_path(text(wire.path).map(Into::into));
    Ok(namespace)
}

fn device_type(field: &'static str, name: &str) -> Result<oci::LinuxDeviceType> {
    Ok(match name {
        "" | "a" => oci::LinuxDeviceType::A,
        "b" => oci::LinuxDeviceType::B,
        "c" => oci::LinuxDeviceType::C,
        "u" => oci::LinuxDeviceType::U,
        "p" => oci::LinuxDeviceType::P,
        _ => return Err(invalid(field, name)),
    })
}

fn device(wire: wire::LinuxDevice) -> Result<oci::LinuxDevice> {
    let mut device = oci::LinuxDevice::default();
    device
        .set_path(wire.path.into())
        .set_typ(device_type("linux.devices[].type", &wire.type_)?)
        .set_major(wire.major)
        .set_minor(wire.minor)
        .set_file_mode(nonzero(wire.file_mode))
        .set_uid(Some(wire.uid))
        .set_gid(Some(wire.gid));
    Ok(device)
}

fn device_rule(wire: wire::LinuxDeviceCgroup) -> Result<oci::LinuxDeviceCgroup> {
    let major = Some(wire.major).filter(|major| *major > 0);
    // Many devices have minor 0, so there it is the wildcard only together with the major's.
    let minor = Some(wire.minor).filter(|minor| *minor > 0 || (*minor == 0 && major.is_some()));
    let mut rule = oci::LinuxDeviceCgroup::default();
    rule.set_allow(wire.allow)
        .set_typ(Some(device_type("linux.resources.devices[].type", &wire.type_)?))
        .set_major(major)
        .set_minor(minor)
        .set_access(text(wire.access));
    Ok(rule)
}

fn memory(wire: wire::LinuxMemory) -> oci::LinuxMemory {
    let mut memory = oci::LinuxMemory::default();
    memory
        .set_limit(nonzero(wire.limit))
        .set_reservation(nonzero(wire.reservation))
        .set_swap(nonzero(wire.swap))
        .set_kernel(nonzero(wire.kernel))
        .set_kernel_tcp(nonzero(wire.kernel_tcp))
        .set_swappiness(nonzero(wire.swappiness))
        .set_disable_oom_killer(nonzero(wire.disable_oom_killer));
    memory
}

fn cpu(wire: wire::LinuxCPU) -> oci::LinuxCpu {
    let mut cpu = oci::LinuxCpu::default();
    cpu.set_shares(nonzero(wire.shares))
        .set_quota(nonzero(wire.quota))
        .set_period(nonzero(wire.period))
        .set_realtime_runtime(nonzero(wire.realtime_runtime))
        .set_realtime_period(nonzero(wire.realtime_period))
        .set_cpus(text(wire.cpus))
        .set_mems(text(wire.mems));
    cpu
}

fn block_io(wire: wire::LinuxBlockIO) -> Result<oci::LinuxBlockIo> {
    let throttle = |wire: Vec<wire::LinuxThrottleDevice>| each(wire, throttle_device).map(list);
    let mut block_io = oci::LinuxBlockIo::default();
    block_io
        .set_weight(weight(wire.weight)?)
        .set_leaf_weight(weight(wire.leaf_weight)?)
        .set_weight_device(list(each(wire.weight_device, weight_device)?))
        .set_throttle_read_bps_device(throttle(wire.throttle_read_bps_device)?)
        .set_throttle_write_bps_device(throttle(wire.throttle_write_bps_device)?)
        .set_throttle_read_iops_device(throttle(wire.throttle_read_iops_device)?)
        .set_throttle_write_iops_device(throttle(wire.throttle_write_iops_device)?);
    Ok(block_io)
}

fn weight(value: u32) -> Result<Option<u16>> {
    let narrow = u16::try_from(value);
    narrow.map(nonzero).map_err(|_| invalid("linux.resources.blockIO.weight", &value.to_string()))
}

fn weight_device(wire: wire::LinuxWeightDevice) -> Result<oci::LinuxWeightDevice> {
    let mut device = oci::LinuxWeightDeviceBuilder::default().major(wire.major).minor(wire.minor);
    if let Some(weight) = weight(wire.weight)? {
        device = device.weight(weight);
    }
    if let Some(weight) = weight(wire.leaf_weight)? {
        device = device.leaf_weight(weight);
    }
    build("linux.resources.blockIO.weightDevice[]", device.build())
}

fn throttle_device(wire: wire::LinuxThrottleDevice) -> Result<oci::LinuxThrottleDevice> {
    let device =
        oci::LinuxThrottleDeviceBuilder::default().major(wire.major).minor(wire.minor).rate(wire.rate);
    build("linux.resources.blockIO.throttle[]", device.build())
}

fn hugepage_limit(wire: wire::LinuxHugepageLimit) -> Result<oci::LinuxHugepageLimit> {
    let limit = i64::try_from(wire.limit)
        .map_err(|_| invalid("linux.resources.hugepageLimits[].limit", &wire.limit.to_string()))?;
    let mut hugepages = oci::LinuxHugepageLimit::default();
    hugepages.set_page_size(wire.pagesize).set_limit(limit);
    Ok(hugepages)
}

fn network(wire: wire::LinuxNetwork) -> oci::LinuxNetwork {
    let priority = |wire: wire::LinuxInterfacePriority| {
        let mut priority = oci::LinuxInterfacePriority::default();
        priority.set_name(wire.name).set_priority(wire.priority);
        priority
    };
    let mut network = oci::LinuxNetwork::default();
    network
        .set_class_id(nonzero(wire.class_id))
        .set_priorities(list(wire.priorities.into_iter().map(priority).collect()));
    network
}

fn seccomp(wire: wire::LinuxSeccomp) -> Result<oci::LinuxSeccomp> {
    let mut seccomp = oci::LinuxSeccomp::default();
    let architecture = |name: String| parse("linux.seccomp.architectures[]", &name);
    let flag = |name: String| parse("linux.seccomp.flags[]", &name);
    seccomp
        .set_default_action(parse("linux.seccomp.defaultAction", &wire.default_action)?)
        .set_architectures(list(each(wire.architectures, architecture)?))
        .set_flags(list(each(wire.flags, flag)?))
        .set_syscalls(list(each(wire.syscalls, syscall)?));
    Ok(seccomp)
}

fn syscall(wire: wire::LinuxSyscall) -> Result<oci::LinuxSyscall> {
    let mut syscall = oci::LinuxSyscall::default();
    syscall
        .set_names(wire.names)
        .set_action(parse("linux.seccomp.syscalls[].action", &wire.action)?)
        .set_errno_ret(nonzero(wire.errnoret))
        .set_args(list(each(wire.args, seccomp_arg)?));
    Ok(syscall)
}

fn seccomp_arg(wire: wire::LinuxSeccompArg) -> Result<oci::LinuxSeccompArg> {
    let index = usize::try_from(wire.index)
        .map_err(|_| invalid("linux.seccomp.syscalls[].args[].index", &wire.index.to_string()))?;
    let op: oci::LinuxSeccompOperator = parse("linux.seccomp.syscalls[].args[].op", &wire.op)?;
    let mut arg = oci::LinuxSeccompArgBuilder::default().index(index).value(wire.value).op(op);
    if op == oci::LinuxSeccompOperator::ScmpCmpMaskedEq || wire.value_two != 0 {
        arg = arg.value_two(wire.value_two);
    }
    build("linux.seccomp.syscalls[].args[]", arg.build())
}

#[cfg(test)]
mod tests;
