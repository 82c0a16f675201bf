//! Who may import whom: the table that keeps the house's rooms apart.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::shell::{self, ChoreError};
use crate::{Chores, say};

/// A crate of ours and the crates of ours that it may use at run time. Development dependencies are free.
const ALLOWED: &[(&str, &[&str])] = &[
    ("kata-api", &[]),
    ("kata-config", &[]),
    ("kata-evidence", &[]),
    ("kata-vmm-api", &[]),
    ("kata-vmm", &["kata-vmm-api"]),
    ("kata-image", &[]),
    ("kata-oci", &[]),
    ("kata-image-pull", &["kata-api", "kata-oci"]),
    ("kata-virtiofsd", &[]),
    // kata-evidence: see docs/adr/0013
    ("kata-agent", &["kata-api", "kata-evidence", "kata-policy"]),
    ("kata-initdata", &["kata-evidence"]),
    ("kata-guest-init", &["kata-evidence"]),
    ("kata-policy", &["kata-api"]),
    ("kata-hypervisor", &["kata-config", "kata-vmm-api"]),
    // Of kata-image only the manifest's types: see docs/adr/0002
    ("kata-sandbox", &["kata-api", "kata-config", "kata-hypervisor", "kata-image", "kata-initdata"]),
    // Of kata-hypervisor only the choice of a machine: see docs/adr/0003.
    ("kata-shim", &["kata-api", "kata-config", "kata-hypervisor", "kata-sandbox"]),
    (
        "kata-ctl",
        &[
            "kata-api",
            "kata-config",
            "kata-evidence",
            "kata-image",
            "kata-initdata",
            "kata-oci",
            "kata-policy",
        ],
    ),
    ("kata-testkit", &["kata-api", "kata-hypervisor"]),
    // see docs/adr/0014
    ("fake-guest-services", &["kata-api"]),
    ("lab-init", &[]),
    ("xtask", &["kata-config", "lab-init"]),
];

/// Crates that a binary must not be able to reach, because what they can do is not its job.
const UNREACHABLE: &[(&str, &[&str])] = &[
    // The owner never maps guest memory.
    ("kata-shim", &["vm-memory", "kvm-ioctls", "virtio-queue"]),
    // The agent lives in guest memory: no second RPC stack, no TLS.
    ("kata-agent", &["rustls", "hyper", "kata-config"]),
    ("kata-ctl", &["kata-sandbox", "kata-hypervisor", "vm-memory"]),
];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    source: Option<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dep>,
}

#[derive(Deserialize)]
struct Dep {
    pkg: String,
    dep_kinds: Vec<DepKind>,
}

#[derive(Deserialize)]
struct DepKind {
    kind: Option<String>,
}

/// Run-time dependencies by package name, and which packages are ours.
struct Graph {
    edges: BTreeMap<String, BTreeSet<String>>,
    ours: BTreeSet<String>,
}

/// Fails, naming every edge that the table does not have.
pub fn check() -> Chores {
    say("checking who imports whom");
    let text = shell::output(shell::cargo().args(["metadata", "--format-version", "1", "--all-features"]))?;
    let metadata: Metadata =
        serde_json::from_str(&text).map_err(|source| ChoreError::Json { what: "cargo metadata", source })?;
    let found = violations(&graph(&metadata), ALLOWED, UNREACHABLE);
    if found.is_empty() { Ok(()) } else { Err(ChoreError::Found(found.join("\n       "))) }
}

fn graph(metadata: &Metadata) -> Graph {
    let names: BTreeMap<&str, &Package> = metadata.packages.iter().map(|p| (p.id.as_str(), p)).collect();
    let name = |id: &str| names.get(id).map_or_else(|| id.to_owned(), |package| package.name.clone());
    let runtime = |dep: &&Dep| dep.dep_kinds.iter().any(|kind| kind.kind.is_none());
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in &metadata.resolve.nodes {
        let deps = node.deps.iter().filter(runtime).map(|dep| name(&dep.pkg));
        edges.entry(name(&node.id)).or_default().extend(deps);
    }
    let ours = metadata.packages.iter().filter(|p| p.source.is_none()).map(|p| p.name.clone()).collect();
    Graph { edges, ours }
}

fn violations(graph: &Graph, allowed: &[(&str, &[&str])], unreachable: &[(&str, &[&str])]) -> Vec<String> {
    let mut found = Vec::new();
    for package in &graph.ours {
        let Some((_, may)) = allowed.iter().find(|(name, _)| name == package) else {
            found.push(format!("{package} has no row in xtask's table of directions"));
            continue;
        };
        for dep in graph.edges.get(package).into_iter().flatten().filter(|dep| graph.ours.contains(*dep)) {
            if !may.contains(&dep.as_str()) {
                found.push(format!("{package} may not import {dep}"));
            }
        }
    }
    for (package, forbidden) in unreachable {
        let reached = reach(graph, package);
        for dep in forbidden.iter().filter(|dep| reached.contains(**dep)) {
            found.push(format!("{package} must not be able to reach {dep}"));
        }
    }
    found
}

fn reach<'a>(graph: &'a Graph, from: &'a str) -> BTreeSet<&'a str> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(package) = open.pop() {
        for dep in graph.edges.get(package).into_iter().flatten() {
            if seen.insert(dep.as_str()) {
                open.push(dep);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph_of(edges: &[(&str, &[&str])], ours: &[&str]) -> Graph {
        let owned = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Graph { edges: edges.iter().map(|(a, b)| ((*a).to_owned(), owned(b))).collect(), ours: owned(ours) }
    }

    #[test]
    fn edge_outside_the_table_is_named() {
        let graph = graph_of(&[("agent", &["api", "config"])], &["agent", "api", "config"]);
        let table: &[(&str, &[&str])] = &[("agent", &["api"]), ("api", &[]), ("config", &[])];
        assert_eq!(violations(&graph, table, &[]), ["agent may not import config"]);
    }

    #[test]
    fn forbidden_crate_is_found_behind_others() {
        let graph = graph_of(&[("shim", &["a"]), ("a", &["b"]), ("b", &["vm-memory"])], &["shim"]);
        let found = violations(&graph, &[("shim", &[])], &[("shim", &["vm-memory"])]);
        assert_eq!(found, ["shim must not be able to reach vm-memory"]);
    }

    #[test]
    fn crate_without_a_row_is_named() {
        let graph = graph_of(&[], &["new"]);
        assert_eq!(violations(&graph, &[], &[]), ["new has no row in xtask's table of directions"]);
    }
}
