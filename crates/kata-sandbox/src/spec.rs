//! The OCI specification onto the wire: the only place where the two shapes meet on the host.
//!
//! The wire has no optional scalars, so what is not given becomes zero or the empty string; in a device rule a missing
//! number is a wildcard and becomes -1. What the wire cannot carry at all is refused by [`crate::guest_spec`] before.

use std::collections::HashMap;
use std::path::Path;

use kata_api::oci as wire;
use oci_spec::runtime as oci;
use protobuf::MessageField;
use serde::Serialize;

/// Converts a whole specification.
pub(crate) fn spec(spec: &oci::Spec) -> wire::Spec {
    wire::Spec {
        version: spec.version().clone(),
        process: field(spec.process().as_ref(), process),
        root: field(spec.root().as_ref(), |root| wire::Root {
            path: path(root.path()),
            readonly: root.readonly().unwrap_or_default(),
            ..Default::default()
        }),
        hostname: text(spec.hostname()),
        domainname: text(spec.domainname()),
        mounts: each(spec.mounts(), mount),
        hooks: field(spec.hooks().as_ref(), hooks),
        annotations: map(spec.annotations()),
        linux: field(spec.linux().as_ref(), linux),
        ..Default::default()
    }
}

/// Converts the process to run.
pub(crate) fn process(process: &oci::Process) -> wire::Process {
    wire::Process {
        terminal: process.terminal().unwrap_or_default(),
        console_size: field(process.console_size().as_ref(), |size| wire::Box {
            height: u32::try_from(size.height()).unwrap_or(u32::MAX),
            width: u32::try_from(size.width()).unwrap_or(u32::MAX),
            ..Default::default()
        }),
        user: field(Some(process.user()), user),
        args: process.args().clone().unwrap_or_default(),
        env: process.env().clone().unwrap_or_default(),
        cwd: path(process.cwd()),
        capabilities: field(process.capabilities().as_ref(), capabilities),
        rlimits: each(process.rlimits(), |limit| wire::POSIXRlimit {
            type_: name(&limit.typ()),
            hard: limit.hard(),
            soft: limit.soft(),
            ..Default::default()
        }),
        no_new_privileges: process.no_new_privileges().unwrap_or_default(),
        apparmor_profile: text(process.apparmor_profile()),
        oom_score_adj: process.oom_score_adj().map(i64::from).unwrap_or_default(),
        selinux_label: text(process.selinux_label()),
        ..Default::default()
    }
}

/// Converts resource limits.
pub(crate) fn resources(resources: &oci::LinuxResources) -> wire::LinuxResources {
    wire::LinuxResources {
        devices: each(resources.devices(), device_rule),
        memory: field(resources.memory().as_ref(), memory),
        cpu: field(resources.cpu().as_ref(), cpu),
        pids: field(resources.pids().as_ref(), |pids| wire::LinuxPids {
            limit: pids.limit(),
            ..Default::default()
        }),
        block_io: field(resources.block_io().as_ref(), block_io),
        hugepage_limits: each(resources.hugepage_limits(), |limit| wire::LinuxHugepageLimit {
            pagesize: limit.page_size().clone(),
            limit: u64::try_from(limit.limit()).unwrap_or(u64::MAX),
            ..Default::default()
        }),
        network: field(resources.network().as_ref(), network),
        unified: map(resources.unified()),
        ..Default::default()
    }
}

/// The first field of a request that only an agent of this project understands, as config.json calls it.
pub(crate) fn extension(
    domainname: &str,
    process: Option<&wire::Process>,
    resources: Option<&wire::LinuxResources>,
) -> Option<&'static str> {
    let umask = process.and_then(|process| process.user.as_ref()).is_some_and(|user| user.umask.is_some());
    let unified = resources.is_some_and(|resources| !resources.unified.is_empty());
    let fields = [
        (!domainname.is_empty(), "domainname"),
        (umask, "process.user.umask"),
        (unified, "linux.resources.unified"),
    ];
    fields.into_iter().find_map(|(given, field)| given.then_some(field))
}

fn field<T, W>(value: Option<&T>, convert: impl Fn(&T) -> W) -> MessageField<W> {
    value.map(convert).into()
}

fn each<T, W>(values: &Option<Vec<T>>, convert: impl Fn(&T) -> W) -> Vec<W> {
    values.iter().flatten().map(convert).collect()
}

fn text(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

fn path(value: &Path) -> String {
    value.to_string_lossy().into_owned()
}

fn map(value: &Option<HashMap<String, String>>) -> HashMap<String, String> {
    value.clone().unwrap_or_default()
}

/// An enumeration's value as config.json spells it, which is also how the wire does.
fn name<T: Serialize>(value: &T) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => name,
        _ => String::new(),
    }
}

fn user(user: &oci::User) -> wire::User {
    wire::User {
        uid: user.uid(),
        gid: user.gid(),
        umask: user.umask(),
        additional_gids: user.additional_gids().clone().unwrap_or_default(),
        username: text(user.username()),
        ..Default::default()
    }
}

fn capabilities(capabilities: &oci::LinuxCapabilities) -> wire::LinuxCapabilities {
    let set = |set: &Option<oci::Capabilities>| {
        let mut names: Vec<String> = set.iter().flatten().map(name).collect();
        names.sort();
        names
    };
    wire::LinuxCapabilities {
        bounding: set(capabilities.bounding()),
        effective: set(capabilities.effective()),
        inheritable: set(capabilities.inheritable()),
        permitted: set(capabilities.permitted()),
        ambient: set(capabilities.ambient()),
        ..Default::default()
    }
}

fn mount(mount: &oci::Mount) -> wire::Mount {
    wire::Mount {
        destination: path(mount.destination()),
        source: mount.source().as_deref().map(path).unwrap_or_default(),
        type_: text(mount.typ()),
        options: mount.options().clone().unwrap_or_default(),
        ..Default::default()
    }
}

fn hooks(hooks: &oci::Hooks) -> wire::Hooks {
    let prestart = hooks.prestart();
    wire::Hooks {
        prestart: each(prestart, hook),
        poststart: each(hooks.poststart(), hook),
        poststop: each(hooks.poststop(), hook),
        create_runtime: each(hooks.create_runtime(), hook),
        create_container: each(hooks.create_container(), hook),
        start_container: each(hooks.start_container(), hook),
        ..Default::default()
    }
}

fn hook(hook: &oci::Hook) -> wire::Hook {
    wire::Hook {
        path: path(hook.path()),
        args: hook.args().clone().unwrap_or_default(),
        env: hook.env().clone().unwrap_or_default(),
        timeout: hook.timeout().unwrap_or_default(),
        ..Default::default()
    }
}

fn linux(linux: &oci::Linux) -> wire::Linux {
    wire::Linux {
        uid_mappings: each(linux.uid_mappings(), id_mapping),
        gid_mappings: each(linux.gid_mappings(), id_mapping),
        sysctl: map(linux.sysctl()),
        resources: field(linux.resources().as_ref(), resources),
        cgroups_path: linux.cgroups_path().as_deref().map(path).unwrap_or_default(),
        namespaces: each(linux.namespaces(), |namespace| wire::LinuxNamespace {
            type_: name(&namespace.typ()),
            path: namespace.path().as_deref().map(path).unwrap_or_default(),
            ..Default::default()
        }),
        devices: each(linux.devices(), device),
        seccomp: field(linux.seccomp().as_ref(), seccomp),
        rootfs_propagation: text(linux.rootfs_propagation()),
        masked_paths: linux.masked_paths().clone().unwrap_or_default(),
        readonly_paths: linux.readonly_paths().clone().unwrap_or_default(),
        mount_label: text(linux.mount_label()),
        intel_rdt: field(linux.intel_rdt().as_ref(), |rdt| wire::LinuxIntelRdt {
            l3_cache_schema: text(rdt.l3_cache_schema()),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn id_mapping(mapping: &oci::LinuxIdMapping) -> wire::LinuxIDMapping {
    wire::LinuxIDMapping {
        host_id: mapping.host_id(),
        container_id: mapping.container_id(),
        size: mapping.size(),
        ..Default::default()
    }
}

fn device(device: &oci::LinuxDevice) -> wire::LinuxDevice {
    wire::LinuxDevice {
        path: path(device.path()),
        type_: device.typ().as_str().to_owned(),
        major: device.major(),
        minor: device.minor(),
        file_mode: device.file_mode().unwrap_or_default(),
        uid: device.uid().unwrap_or_default(),
        gid: device.gid().unwrap_or_default(),
        ..Default::default()
    }
}

fn device_rule(rule: &oci::LinuxDeviceCgroup) -> wire::LinuxDeviceCgroup {
    wire::LinuxDeviceCgroup {
        allow: rule.allow(),
        type_: rule.typ().unwrap_or_default().as_str().to_owned(),
        major: rule.major().unwrap_or(-1),
        minor: rule.minor().unwrap_or(-1),
        access: text(rule.access()),
        ..Default::default()
    }
}

fn memory(memory: &oci::LinuxMemory) -> wire::LinuxMemory {
    let kernel = memory.kernel();
    wire::LinuxMemory {
        limit: memory.limit().unwrap_or_default(),
        reservation: memory.reservation().unwrap_or_default(),
        swap: memory.swap().unwrap_or_default(),
        kernel: kernel.unwrap_or_default(),
        kernel_tcp: memory.kernel_tcp().unwrap_or_default(),
        swappiness: memory.swappiness().unwrap_or_default(),
        disable_oom_killer: memory.disable_oom_killer().unwrap_or_default(),
        ..Default::default()
    }
}

fn cpu(cpu: &oci::LinuxCpu) -> wire::LinuxCPU {
    wire::LinuxCPU {
        shares: cpu.shares().unwrap_or_default(),
        quota: cpu.quota().unwrap_or_default(),
        period: cpu.period().unwrap_or_default(),
        realtime_runtime: cpu.realtime_runtime().unwrap_or_default(),
        realtime_period: cpu.realtime_period().unwrap_or_default(),
        cpus: text(cpu.cpus()),
        mems: text(cpu.mems()),
        ..Default::default()
    }
}

fn block_io(block_io: &oci::LinuxBlockIo) -> wire::LinuxBlockIO {
    let throttle = |devices: &Option<Vec<oci::LinuxThrottleDevice>>| {
        each(devices, |device| wire::LinuxThrottleDevice {
            major: device.major(),
            minor: device.minor(),
            rate: device.rate(),
            ..Default::default()
        })
    };
    wire::LinuxBlockIO {
        weight: u32::from(block_io.weight().unwrap_or_default()),
        leaf_weight: u32::from(block_io.leaf_weight().unwrap_or_default()),
        weight_device: each(block_io.weight_device(), |device| wire::LinuxWeightDevice {
            major: device.major(),
            minor: device.minor(),
            weight: u32::from(device.weight().unwrap_or_default()),
            leaf_weight: u32::from(device.leaf_weight().unwrap_or_default()),
            ..Default::default()
        }),
        throttle_read_bps_device: throttle(block_io.throttle_read_bps_device()),
        throttle_write_bps_device: throttle(block_io.throttle_write_bps_device()),
        throttle_read_iops_device: throttle(block_io.throttle_read_iops_device()),
        throttle_write_iops_device: throttle(block_io.throttle_write_iops_device()),
        ..Default::default()
    }
}

fn network(network: &oci::LinuxNetwork) -> wire::LinuxNetwork {
    wire::LinuxNetwork {
        class_id: network.class_id().unwrap_or_default(),
        priorities: each(network.priorities(), |priority| wire::LinuxInterfacePriority {
            name: priority.name().clone(),
            priority: priority.priority(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn seccomp(seccomp: &oci::LinuxSeccomp) -> wire::LinuxSeccomp {
    wire::LinuxSeccomp {
        default_action: name(&seccomp.default_action()),
        architectures: each(seccomp.architectures(), name),
        flags: each(seccomp.flags(), name),
        syscalls: each(seccomp.syscalls(), |syscall| wire::LinuxSyscall {
            names: syscall.names().clone(),
            action: name(&syscall.action()),
            errnoret: syscall.errno_ret().unwrap_or_default(),
            args: each(syscall.args(), |arg| wire::LinuxSeccompArg {
                index: u64::try_from(arg.index()).unwrap_or(u64::MAX),
                value: arg.value(),
                value_two: arg.value_two().unwrap_or_default(),
                op: name(&arg.op()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests;
