//! Which container of a pod is meant.

use kata_api::control::{Container, Pod};

use super::Client;
use crate::bundle;

/// The name that the client of the container runtime interface gave a container (containerd, `pkg/cri/annotations`).
const CRI_NAME: &str = "io.kubernetes.cri.container-name";

/// No container, or more than one.
#[derive(Debug, thiserror::Error)]
pub enum ContainerError {
    /// None of that name.
    #[error("pod {pod} has no container {wanted}; it has {}", listed(.has))]
    Unknown {
        /// The pod.
        pod: String,
        /// What was asked for.
        wanted: String,
        /// What there is.
        has: Vec<String>,
    },
    /// None at all.
    #[error("pod {0} has no container yet")]
    None(String),
    /// Several, and none was named.
    #[error("pod {pod} has several containers: choose one with --container ({})", listed(.has))]
    Several {
        /// The pod.
        pod: String,
        /// What there is.
        has: Vec<String>,
    },
}

fn listed(names: &[String]) -> String {
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

/// The container that `wanted` names, by its id, the beginning of an id, or the name that Kubernetes gave it. Without
/// one: the only one there is, not counting the sandbox container that carries the pod's own name beside others.
///
/// # Errors
/// It is not there, or several may be meant.
pub async fn choose(client: &Client, pod: &Pod, wanted: Option<&str>) -> Result<String, ContainerError> {
    let Some(wanted) = wanted else { return only(pod) };
    if let Some(id) = by_id(pod, wanted) {
        return Ok(id);
    }
    for container in &pod.containers {
        if name(client, &container.id).await.as_deref() == Some(wanted) {
            return Ok(container.id.clone());
        }
    }
    Err(ContainerError::Unknown { pod: pod.id.clone(), wanted: wanted.to_owned(), has: ids(pod) })
}

/// The name that Kubernetes gave a container.
pub async fn name(client: &Client, container: &str) -> Option<String> {
    let bundle = client.bundle(container).await.ok()?;
    bundle::annotation(&bundle, CRI_NAME)
}

fn by_id(pod: &Pod, wanted: &str) -> Option<String> {
    let ids = || pod.containers.iter().map(|container| &container.id);
    if let Some(id) = ids().find(|id| *id == wanted) {
        return Some(id.clone());
    }
    let mut meant = ids().filter(|id| super::is_beginning(wanted, id));
    meant.next().filter(|_| meant.next().is_none()).cloned()
}

fn only(pod: &Pod) -> Result<String, ContainerError> {
    let others: Vec<&Container> = pod.containers.iter().filter(|container| container.id != pod.id).collect();
    match (pod.containers.as_slice(), others.as_slice()) {
        ([], _) => Err(ContainerError::None(pod.id.clone())),
        ([container], _) => Ok(container.id.clone()),
        (_, [container]) => Ok(container.id.clone()),
        _ => Err(ContainerError::Several { pod: pod.id.clone(), has: ids(pod) }),
    }
}

fn ids(pod: &Pod) -> Vec<String> {
    pod.containers.iter().map(|container| container.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(ids: &[&str]) -> Pod {
        let container = |id: &&str| Container { id: (*id).to_owned(), ..Container::default() };
        Pod { id: "p".to_owned(), containers: ids.iter().map(container).collect(), ..Pod::default() }
    }

    #[test]
    fn the_only_container_need_not_be_named() {
        assert_eq!(only(&pod(&["p"])).unwrap(), "p");
        assert_eq!(only(&pod(&["p", "app"])).unwrap(), "app", "the other is Kubernetes' sandbox container");
        assert!(matches!(only(&pod(&[])), Err(ContainerError::None(_))));
        let error = only(&pod(&["p", "app", "side"])).unwrap_err().to_string();
        assert!(error.contains("app, side"), "{error}");
    }

    #[test]
    fn ids_may_be_shortened_while_one_is_meant() {
        let (one, two) = (format!("{:064x}", 0xa0), format!("{}f", "a".repeat(63)));
        let pod = pod(&[&one, &two, "app"]);
        assert_eq!(by_id(&pod, "aaaa"), Some(two));
        assert_eq!(by_id(&pod, "app"), Some("app".to_owned()));
        assert_eq!(by_id(&pod, "ap"), None);
    }
}
