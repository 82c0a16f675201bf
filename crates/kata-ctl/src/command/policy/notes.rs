//! What a policy does not hold, in words for its head.

use super::container::{Container, HOST, VOLUME};
use super::rego::Wishes;

/// What is the same for all pods.
const ALWAYS: [&str; 7] = [
    "what is in config maps, secrets, tokens, /etc/hosts and the like, and in claims, is the host's word",
    "variables that are not the pod's: any, but those by which common programs load more; give the image's own in env",
    "annotations, supplementary groups, limits, sysctls, seccomp, namespaces and device nodes: the host may change or leave them out",
    "a volume that is shared may be any directory that a link of the host's leads to, and its files can be executed",
    "the network is the host's, and so are the time and the end of everything",
    "how often a container is made, and in which order",
    "two containers that one request fits are one to the policy: the probes of either may be run in it",
];

/// The lines, each about one thing.
pub fn of(containers: &[Container], wishes: Wishes) -> Vec<String> {
    let mut notes: Vec<String> = ALWAYS.map(str::to_owned).to_vec();
    if wishes.host_rootfs {
        notes.push(
            "images: root file systems are the host's, so any program of the host's may run".to_owned(),
        );
    }
    if wishes.exec {
        notes.push("commands: every one may be run in every container, by any user".to_owned());
    }
    for container in containers.iter().filter(|container| !container.pods_own) {
        let own = of_container(container, wishes);
        notes.extend(own.into_iter().map(|note| format!("{}: {note}", container.name)));
    }
    notes
}

fn of_container(container: &Container, wishes: Wishes) -> Vec<String> {
    let mut notes = container.notes.clone();
    let pinned = container.images.iter().any(|image| image.contains('@'));
    if !pinned && !wishes.host_rootfs {
        notes.push("its image has no digest: what the name stands for is the registry's word".to_owned());
    }
    let program = container.command.as_ref().map(|words| words.first().cloned().flatten());
    match (program, &container.arguments) {
        (Some(Some(program)), _) if program.starts_with('/') => {}
        (Some(_), _) => notes.push(
            "its program is looked for in PATH, which is the image's: give it with its whole path".to_owned(),
        ),
        (None, Some(_)) => {
            notes.push("its command line may begin with anything: only args are given".to_owned())
        }
        (None, None) => notes.push("its command line may be any: it has neither command nor args".to_owned()),
    }
    if container.uid.is_none() {
        notes.push("it may run as any user: runAsUser is not given".to_owned());
    }
    let mut from_host: Vec<&str> = Vec::new();
    for (place, sources) in &container.mounts {
        if sources.iter().any(|source| source == HOST || source == VOLUME) {
            from_host.push(place);
        }
    }
    if !from_host.is_empty() {
        notes.push(format!("what it has from the host: {}", from_host.join(", ")));
    }
    notes
}
