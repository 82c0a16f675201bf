//! What a bundle tells of its container before there is a pod: whose it is, and which network it has.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use thiserror::Error;

/// How container managers mark the containers of a pod: the key of the kind, its value for a container that is not the
/// pod's first, and the key of the pod's id.
const MARKS: [(&str, &str, &str); 3] = [
    ("io.kubernetes.cri.container-type", "container", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "container", "io.kubernetes.cri-o.SandboxID"),
    ("io.kubernetes.docker.type", "container", "io.kubernetes.sandbox.id"),
];
/// What Docker names before there is a namespace. It fills the one of the pid that it is answered.
const PLACEHOLDER: &str = "/proc/0/ns/net";

/// Below this directory containerd has the bundles of containers; those of sandboxes are elsewhere.
const TASKS: &str = "io.containerd.runtime.v2.task";

#[derive(Debug, Error)]
pub(crate) enum BundleError {
    #[error(
        "{path} is not there, or empty: the container's bundle has lost its specification, so nothing can be started; remove the \
         container and make it anew"
    )]
    Lost { path: PathBuf },
    #[error("cannot read {path}")]
    Spec { path: PathBuf, source: Box<oci_spec::OciSpecError> },
    #[error(
        "{path}: the annotation {kind} says that this is a container of a pod, and {pod} does not say which"
    )]
    NoPod { path: PathBuf, kind: &'static str, pod: &'static str },
    #[error("{path}: the pod {id:?} that the annotation {key} names {reason}")]
    BadPod { path: PathBuf, key: &'static str, id: String, reason: String },
    #[error(
        "{path}: the container asks for the host's network, which a virtual machine cannot share; give it a network namespace \
         (Kubernetes: hostNetwork: false, ctr: without --net-host, Docker: another --network)"
    )]
    HostNetwork { path: PathBuf },
}

/// The network namespace that a specification asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Netns {
    /// One of its own, which others may fill later.
    New,
    /// One that is there.
    At(PathBuf),
}

/// Whether the bundle is that of a sandbox, which has no specification.
///
/// # Errors
/// [`BundleError::Lost`]: a container's has none.
pub(crate) fn of_sandbox(dir: &Path) -> Result<bool, BundleError> {
    let path = dir.join("config.json");
    let none = match std::fs::metadata(&path) {
        Ok(file) => file.len() == 0,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound && dir.is_dir(),
    };
    if none && dir.components().any(|part| part.as_os_str() == TASKS) {
        return Err(BundleError::Lost { path });
    }
    Ok(none)
}

/// A container's bundle.
#[derive(Debug)]
pub(crate) struct Bundle {
    file: PathBuf,
    spec: Spec,
}

impl Bundle {
    pub(crate) fn read(dir: &Path) -> Result<Self, BundleError> {
        let file = dir.join("config.json");
        match Spec::load(&file) {
            Ok(spec) => Ok(Self { file, spec }),
            Err(source) => Err(BundleError::Spec { path: file, source: Box::new(source) }),
        }
    }

    /// The pod that the container joins; `None` for a container that makes its own.
    ///
    /// The name becomes a path: one that is none is refused.
    pub(crate) fn pod(&self) -> Result<Option<&str>, BundleError> {
        let Some(annotations) = self.spec.annotations() else { return Ok(None) };
        let path = || self.file.clone();
        match joined(annotations) {
            None => Ok(None),
            Some((kind, pod, None)) => Err(BundleError::NoPod { path: path(), kind, pod }),
            Some((_, key, Some(id))) => match crate::cli::pod_id(id) {
                Ok(_) => Ok(Some(id)),
                Err(reason) => Err(BundleError::BadPod { path: path(), key, id: id.to_owned(), reason }),
            },
        }
    }

    /// The network namespace of the pod that the container makes.
    pub(crate) fn netns(&self) -> Result<Netns, BundleError> {
        let namespaces = self.spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let network = namespaces.into_iter().flatten().find(|it| it.typ() == LinuxNamespaceType::Network);
        let network = network.ok_or_else(|| BundleError::HostNetwork { path: self.file.clone() })?;
        Ok(match network.path() {
            Some(path) if !path.as_os_str().is_empty() && path != Path::new(PLACEHOLDER) => {
                Netns::At(path.clone())
            }
            _ => Netns::New,
        })
    }
}

/// The mark of a container that joins a pod: the keys of its kind and of the pod's id, and the id.
type Mark<'a> = (&'static str, &'static str, Option<&'a str>);

fn joined(annotations: &HashMap<String, String>) -> Option<Mark<'_>> {
    let mark = |(kind, joins, _): &&(_, &str, _)| annotations.get(*kind).is_some_and(|it| it == joins);
    let (kind, _, pod) = MARKS.iter().find(mark)?;
    Some((kind, pod, annotations.get(*pod).map(String::as_str).filter(|id| !id.is_empty())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(namespaces: &str, annotations: &str) -> Bundle {
        let text = format!(
            r#"{{"ociVersion":"1.1.0","annotations":{{{annotations}}},"linux":{{"namespaces":[{namespaces}]}}}}"#
        );
        Bundle { file: "/b/config.json".into(), spec: serde_json::from_str(&text).unwrap() }
    }

    #[test]
    fn a_container_of_a_pod_names_it_in_each_managers_way() {
        for (kind, _, pod) in MARKS {
            let of = |kind_of: &str| bundle("", &format!("{kind:?}:{kind_of:?},{pod:?}:\"web\""));
            assert_eq!(of("container").pod().unwrap(), Some("web"));
            assert_eq!(of("sandbox").pod().unwrap(), None);
        }
        assert_eq!(bundle("", "").pod().unwrap(), None);
    }

    #[test]
    fn a_container_of_no_named_pod_is_refused() {
        let error = bundle("", r#""io.kubernetes.cri.container-type":"container""#).pod().unwrap_err();
        assert!(error.to_string().contains("io.kubernetes.cri.sandbox-id"), "{error}");
    }

    #[test]
    fn a_pods_name_that_leads_elsewhere_is_refused() {
        for name in ["/home", "../../etc", ".", "a/b"] {
            let marks = format!(
                r#""io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":{name:?}"#
            );
            assert!(matches!(bundle("", &marks).pod(), Err(BundleError::BadPod { .. })), "{name}");
        }
    }

    #[test]
    fn the_network_namespace_is_named_or_new_and_never_the_hosts() {
        let netns = |text| bundle(text, "").netns();
        let at = Netns::At("/run/netns/a".into());
        assert_eq!(netns(r#"{"type":"network","path":"/run/netns/a"}"#).unwrap(), at);
        assert_eq!(netns(r#"{"type":"network"}"#).unwrap(), Netns::New);
        assert_eq!(netns(r#"{"type":"network","path":"/proc/0/ns/net"}"#).unwrap(), Netns::New);
        assert!(matches!(netns(r#"{"type":"pid"}"#), Err(BundleError::HostNetwork { .. })));
    }
}
