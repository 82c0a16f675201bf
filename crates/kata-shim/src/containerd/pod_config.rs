//! What the CRI says of a pod without a first container, and how it reaches the pod's containers.
//!
//! With a pause container, containerd's CRI plugin writes the pod's files and mounts its shared memory, binds them into each
//! container, and that container's specification carries the rest. Where the shim makes the pod, nobody does:
//!
//! | of the `PodSandboxConfig` | becomes |
//! |---|---|
//! | `hostname` | the guest's host name, `/etc/hostname` |
//! | `dns_config` | `/etc/resolv.conf`; without, the host's |
//! | `annotations` | the pod's configuration |
//! | `linux.resources`, `linux.cgroup_parent` | the machine's size, and where the host accounts for it |
//! | `linux.sysctls` | part of each container's: the namespaces are the pod's, so it is all the same |
//! | `linux.security_context.namespace_options.pid` | refused where the containers were to share processes |
//! | (nothing) | `/etc/hosts` is the host's, `/dev/shm` one for all containers |
//!
//! What a container has at one of the three places in `/etc` (a kubelet's `/etc/hosts`) is left alone.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use kata_api::cri::{DNSConfig, NamespaceMode, PodSandboxConfig};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Spec};
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use thiserror::Error;

/// The type that the CRI plugin writes.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
/// The files that containers of a pod share, by their names in `/etc`.
const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];
const SHM: &str = "/dev/shm";

#[derive(Debug, Error)]
pub(crate) enum PodConfigError {
    #[error(
        "the sandbox's options are {0:?}, and only those of the CRI plugin ({TYPE}) are understood; \
         other clients can have a pod made by its first container (sandboxer = \"podsandbox\")"
    )]
    Type(String),
    #[error("the sandbox's options ({TYPE}) cannot be read")]
    Broken(#[source] protobuf::Error),
    #[error(
        "the pod shares one pid namespace among its containers (shareProcessNamespace), which lives with a first process that \
         a pod without a pause container has not; use a handler with sandboxer = \"podsandbox\""
    )]
    SharedPids,
    #[error("cannot write the pod's file {path}")]
    File { path: PathBuf, source: io::Error },
}

/// The configuration in a request's options. A client that says nothing asks for nothing.
pub(crate) fn read(options: Option<&Any>) -> Result<PodSandboxConfig, PodConfigError> {
    let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
        return Ok(PodSandboxConfig::new());
    };
    // Some clients write a host before the name.
    if any.type_url.rsplit('/').next() != Some(TYPE) {
        return Err(PodConfigError::Type(any.type_url.clone()));
    }
    let config = PodSandboxConfig::parse_from_bytes(&any.value).map_err(PodConfigError::Broken)?;
    let namespaces = &config.linux.security_context.namespace_options;
    if namespaces.pid.enum_value() == Ok(NamespaceMode::POD) {
        return Err(PodConfigError::SharedPids);
    }
    Ok(config)
}

/// The pod's annotations, with its names in Kubernetes and its sizes as a pause container's specification would have them.
pub(crate) fn annotations(config: &PodSandboxConfig) -> HashMap<String, String> {
    let mut all = config.annotations.clone();
    let names = &config.metadata;
    for (key, name) in [("uid", &names.uid), ("name", &names.name), ("namespace", &names.namespace)] {
        if !name.is_empty() {
            all.insert(format!("io.kubernetes.cri.sandbox-{key}"), name.clone());
        }
    }
    if let Some(sizes) = config.linux.resources.as_ref() {
        let sizes = [
            ("cpu-period", sizes.cpu_period),
            ("cpu-quota", sizes.cpu_quota),
            ("cpu-shares", sizes.cpu_shares),
            ("memory", sizes.memory_limit_in_bytes),
        ];
        // None is said with a zero.
        for (key, size) in sizes.into_iter().filter(|(_, size)| *size != 0) {
            all.insert(format!("io.kubernetes.cri.sandbox-{key}"), size.to_string());
        }
    }
    all
}

/// Where the pod is to be accounted, as a pause container's specification would say it: for systemd by slice, prefix and
/// name.
pub(crate) fn cgroups_path(config: &PodSandboxConfig, id: &str) -> Option<PathBuf> {
    let parent = Some(config.linux.cgroup_parent.as_str()).filter(|parent| !parent.is_empty())?;
    Some(match parent.rsplit('/').next().filter(|name| name.ends_with(".slice")) {
        Some(slice) => format!("{slice}:cri-containerd:{id}").into(),
        None => Path::new(parent).join(id),
    })
}

/// What the containers of a pod get that has no first container.
#[derive(Debug)]
pub(crate) struct PodParts {
    dir: PathBuf,
    sysctls: HashMap<String, String>,
}

impl PodParts {
    /// Writes the pod's files below `dir`, which is the pod's own.
    pub(crate) fn write(dir: PathBuf, config: &PodSandboxConfig) -> Result<Self, PodConfigError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PodConfigError::File { path, source }
        };
        std::fs::create_dir_all(&dir).map_err(failed(&dir))?;
        for name in FILES {
            let of_host = || std::fs::read(Path::new("/etc").join(name)).unwrap_or_default();
            let text = match name {
                "hostname" => format!("{}\n", config.hostname).into_bytes(),
                "resolv.conf" => config.dns_config.as_ref().map_or_else(of_host, resolv_conf),
                _ => of_host(),
            };
            let path = dir.join(name);
            std::fs::write(&path, text).map_err(failed(&path))?;
            // Containers read it as whoever they are; the owner's umask would keep them from it.
            let readable = std::os::unix::fs::PermissionsExt::from_mode(0o644);
            std::fs::set_permissions(&path, readable).map_err(failed(&path))?;
        }
        Ok(Self { dir, sysctls: config.linux.sysctls.clone() })
    }

    /// Adds to a container's specification what is missing of the pod.
    pub(crate) fn complete(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        // Where processes could see the memory of each other: the guest makes one for the pod of what is a bind mount.
        let shared = shares_ipc(spec);
        for mount in mounts.iter_mut().filter(|mount| shared && mount.destination() == Path::new(SHM)) {
            *mount = bind(Path::new(SHM), self.dir.join("shm"), false);
        }
        for name in FILES {
            let at = Path::new("/etc").join(name);
            if mounts.iter().all(|mount| *mount.destination() != at) {
                mounts.push(bind(&at, self.dir.join(name), read_only));
            }
        }
        spec.set_mounts(Some(mounts));
        if let Some(linux) = spec.linux_mut().as_mut().filter(|_| !self.sysctls.is_empty()) {
            let mut all = linux.sysctl().clone().unwrap_or_default();
            all.extend(self.sysctls.clone());
            linux.set_sysctl(Some(all));
        }
    }
}

/// Whether a container is to be in its pod's IPC namespace rather than in one of its own.
fn shares_ipc(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let ipc = |namespace: &&LinuxNamespace| namespace.typ() == LinuxNamespaceType::Ipc;
    let ipc = namespaces.into_iter().flatten().find(ipc);
    ipc.is_some_and(|namespace| namespace.path().is_some())
}

/// A bind mount as the CRI plugin would make it.
fn bind(at: &Path, source: PathBuf, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", access].map(str::to_owned).to_vec();
    let mut mount = Mount::default();
    mount.set_destination(at.to_owned()).set_typ(Some("bind".to_owned()));
    mount.set_source(Some(source)).set_options(Some(options));
    mount
}

/// In the words of resolv.conf(5).
fn resolv_conf(dns: &DNSConfig) -> Vec<u8> {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    dns.servers.iter().for_each(|server| text += &format!("nameserver {server}\n"));
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text.into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(type_url: &str, config: &PodSandboxConfig) -> Any {
        let value = config.write_to_bytes().unwrap();
        Any { type_url: type_url.into(), value, ..Any::default() }
    }

    fn config(pid: NamespaceMode) -> PodSandboxConfig {
        let mut config = PodSandboxConfig::new();
        config.hostname = "web".into();
        let linux = config.linux.mut_or_insert_default();
        linux.sysctls.insert("net.core.somaxconn".into(), "512".into());
        let security = linux.security_context.mut_or_insert_default();
        security.namespace_options.mut_or_insert_default().pid = pid.into();
        config
    }

    #[test]
    fn options_of_the_cri_are_read_and_others_refused_by_name() {
        let config = config(NamespaceMode::CONTAINER);
        for url in [TYPE.to_owned(), format!("types.example/{TYPE}")] {
            assert_eq!(read(Some(&options(&url, &config))).unwrap().hostname, "web");
        }
        assert_eq!(read(None).unwrap(), PodSandboxConfig::new());
        let error = read(Some(&options("some.Options", &config))).unwrap_err();
        assert!(error.to_string().contains("some.Options"), "{error}");
        let garbage = Any { type_url: TYPE.into(), value: vec![0xff], ..Any::default() };
        assert!(matches!(read(Some(&garbage)), Err(PodConfigError::Broken(_))));
    }

    #[test]
    fn a_pods_sizes_and_its_place_in_the_hosts_cgroups_are_those_of_a_pause_container() {
        let mut config = PodSandboxConfig::new();
        assert_eq!((annotations(&config).len(), cgroups_path(&config, "a")), (0, None));
        let linux = config.linux.mut_or_insert_default();
        linux.cgroup_parent = "/kubepods/pod1".into();
        let sizes = linux.resources.mut_or_insert_default();
        (sizes.cpu_quota, sizes.memory_limit_in_bytes) = (200_000, 1 << 30);
        let told = annotations(&config);
        assert_eq!(told["io.kubernetes.cri.sandbox-cpu-quota"], "200000");
        assert_eq!(told["io.kubernetes.cri.sandbox-memory"], "1073741824");
        assert_eq!(told.len(), 2);
        assert_eq!(cgroups_path(&config, "a"), Some("/kubepods/pod1/a".into()));
        config.linux.mut_or_insert_default().cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".into();
        assert_eq!(cgroups_path(&config, "a"), Some("kubepods-pod1.slice:cri-containerd:a".into()));
    }

    #[test]
    fn processes_that_are_to_be_shared_are_refused() {
        let error = read(Some(&options(TYPE, &config(NamespaceMode::POD)))).unwrap_err();
        assert!(error.to_string().contains("podsandbox"), "{error}");
    }

    #[test]
    fn a_container_gets_the_pods_files_where_it_has_none_its_shared_memory_and_its_parameters() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(NamespaceMode::CONTAINER);
        let dns = config.dns_config.mut_or_insert_default();
        dns.servers = vec!["10.0.0.1".into(), "10.0.0.2".into()];
        dns.searches = vec!["a.example".into(), "b.example".into()];
        dns.options = vec!["ndots:5".into()];
        let parts = PodParts::write(dir.path().join("etc"), &config).unwrap();
        let own = dir.path().join("hosts");
        std::fs::write(&own, "").unwrap();
        let shm = serde_json::json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" });
        let mut spec: Spec = serde_json::from_value(serde_json::json!({
            "ociVersion": "1.1.0", "root": { "path": "rootfs", "readonly": true },
            "linux": {
                "sysctl": { "kernel.shmmax": "1" }, "namespaces": [{ "type": "ipc", "path": "/proc/1/ns/ipc" }],
            },
            "mounts": [{ "destination": "/etc/hosts", "type": "bind", "source": own }, shm],
        }))
        .unwrap();
        let mut alone = spec.clone();
        parts.complete(&mut spec);
        let mounts = spec.mounts().as_ref().unwrap();
        let source = |at: &str| {
            let mut there = mounts.iter().filter(|mount| *mount.destination() == Path::new(at));
            let source = there.next().unwrap().source().clone().unwrap();
            assert!(there.next().is_none(), "{at} twice");
            source
        };
        assert_eq!((source("/etc/hosts"), mounts.len()), (own, 4));
        assert_eq!(std::fs::read_to_string(source("/etc/hostname")).unwrap(), "web\n");
        let text = "search a.example b.example\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n";
        assert_eq!(std::fs::read_to_string(source("/etc/resolv.conf")).unwrap(), text);
        assert!(mounts[3].options().as_ref().unwrap().contains(&"ro".to_owned()));
        assert_eq!(mounts[1].typ().as_deref(), Some("bind"));
        // One that keeps to itself keeps its memory.
        let mut ipc = LinuxNamespace::default();
        ipc.set_typ(LinuxNamespaceType::Ipc);
        alone.linux_mut().as_mut().unwrap().set_namespaces(Some(vec![ipc]));
        parts.complete(&mut alone);
        assert_eq!(alone.mounts().as_ref().unwrap()[1].typ().as_deref(), Some("tmpfs"));
        let linux = spec.linux().as_ref().unwrap().sysctl().as_ref().unwrap();
        assert_eq!((linux["net.core.somaxconn"].as_str(), linux["kernel.shmmax"].as_str()), ("512", "1"));
    }
}
