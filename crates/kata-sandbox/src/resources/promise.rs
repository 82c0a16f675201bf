//! What a specification promises its pod or container, and what containers of a pod have together.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};

use super::sizing::Demand;

/// Annotations that container managers mark a pod's own container with, and the value.
const SANDBOX: [(&str, &str); 3] = [
    ("io.kubernetes.cri.container-type", "sandbox"),
    ("io.kubernetes.cri-o.ContainerType", "sandbox"),
    ("io.kubernetes.docker.type", "podsandbox"),
];
const QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
/// The kernel's default period, in microseconds.
const DEFAULT_PERIOD: u64 = 100_000;
/// Kubernetes' shares of one CPU.
const SHARES_OF_A_CPU: u64 = 1024;
/// No host has more CPUs.
const MOST_CPUS: u32 = 8192;

/// A promise that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromiseError {
    /// An annotation of the pod's.
    #[error("the annotation {key} is {value:?}, which is not a whole number")]
    Annotation {
        /// Its name.
        key: &'static str,
        /// What it says.
        value: String,
    },
    /// A set of CPUs.
    #[error("{0:?} is not a set of CPUs as in 0-3,7 (linux.resources.cpu.cpus)")]
    Cpus(String),
}

/// What the pod may use of the host: from the annotations that the CRI gives a pod, or from the limits of a single container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResourceSpec {
    pub(crate) demand: Demand,
    /// `linux.cgroupsPath`, where the pod is to be accounted.
    pub(crate) cgroups_path: Option<PathBuf>,
    /// The specification is that of a pod's own container.
    pub(crate) is_pod: bool,
    /// The host's CPUs and memory nodes that a single container may use.
    pub(crate) cpus: Option<String>,
    pub(crate) mems: Option<String>,
}

impl ResourceSpec {
    /// Reads the specification of the pod's first container.
    ///
    /// # Errors
    /// An annotation that is no number.
    pub fn of(spec: &Spec) -> Result<Self, PromiseError> {
        let none = HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        let linux = spec.linux().as_ref();
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().clone());
        let cgroups_path = cgroups_path.filter(|path| !path.as_os_str().is_empty());
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let cpu = resources.and_then(|resources| resources.cpu().as_ref());
        let is_pod = is_pod(annotations);
        let demand = if is_pod { of_annotations(annotations)? } else { Share::of(resources)?.demand() };
        Ok(Self {
            demand,
            cgroups_path,
            is_pod,
            cpus: cpu.and_then(|cpu| cpu.cpus().clone()).filter(|cpus| !cpus.is_empty()),
            mems: cpu.and_then(|cpu| cpu.mems().clone()).filter(|mems| !mems.is_empty()),
        })
    }

    /// Reads what the CRI says of a pod that has no container of its own.
    ///
    /// # Errors
    /// An annotation that is no number.
    pub fn of_pod(
        annotations: &HashMap<String, String>,
        cgroups_path: Option<PathBuf>,
    ) -> Result<Self, PromiseError> {
        Ok(Self { demand: of_annotations(annotations)?, cgroups_path, is_pod: true, cpus: None, mems: None })
    }
}

/// Whether a container is the one that stands for its pod, and does no work of its own.
pub(crate) fn is_pod(annotations: &HashMap<String, String>) -> bool {
    SANDBOX.iter().any(|(key, kind)| annotations.get(*key).is_some_and(|it| it == kind))
}

fn of_annotations(annotations: &HashMap<String, String>) -> Result<Demand, PromiseError> {
    let number = |key: &'static str| match annotations.get(key) {
        None => Ok(None),
        Some(text) => match text.trim().parse::<i64>() {
            // None is said with a zero or a negative number.
            Ok(number) => Ok(u64::try_from(number).ok().filter(|number| *number > 0)),
            Err(_) => {
                let value = text.chars().take(40).collect();
                Err(PromiseError::Annotation { key, value })
            }
        },
    };
    let period = number(PERIOD)?.unwrap_or(DEFAULT_PERIOD);
    Ok(Demand {
        cpu_limit: number(QUOTA)?.map(|quota| thousandths(quota, period)),
        cpu_request: number(SHARES)?.map(|shares| thousandths(shares, SHARES_OF_A_CPU)),
        memory_limit: number(MEMORY)?,
        ..Demand::default()
    })
}

fn thousandths(part: u64, whole: u64) -> u64 {
    let exact = u128::from(part) * 1000 / u128::from(whole.max(1));
    u64::try_from(exact).unwrap_or(u64::MAX)
}

/// What one container may use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Share {
    cpu_limit: Option<u64>,
    memory_limit: Option<u64>,
    cpus: Option<CpuSet>,
}

impl Share {
    pub(crate) fn of(resources: Option<&LinuxResources>) -> Result<Self, PromiseError> {
        let mut share = Self::default();
        if let Some(resources) = resources {
            share.change(resources)?;
        }
        Ok(share)
    }

    /// Takes over what `resources` say; of the rest they say nothing.
    pub(crate) fn change(&mut self, resources: &LinuxResources) -> Result<(), PromiseError> {
        if let Some(memory) = resources.memory()
            && let Some(limit) = memory.limit().filter(|limit| *limit != 0)
        {
            self.memory_limit = u64::try_from(limit).ok();
        }
        let Some(cpu) = resources.cpu() else { return Ok(()) };
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            self.cpu_limit = u64::try_from(quota).ok().map(|quota| thousandths(quota, period(cpu)));
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            self.cpus = Some(CpuSet::parse(cpus)?);
        }
        Ok(())
    }

    fn demand(&self) -> Demand {
        Demand { cpu_limit: self.cpu_limit, memory_limit: self.memory_limit, ..Demand::default() }
    }
}

fn period(cpu: &LinuxCpu) -> u64 {
    cpu.period().filter(|period| *period > 0).unwrap_or(DEFAULT_PERIOD)
}

/// What the containers of a pod may use, by their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally(BTreeMap<String, Share>);

impl Tally {
    pub(crate) fn get(&self, container: &str) -> Option<&Share> {
        self.0.get(container)
    }

    pub(crate) fn set(&mut self, container: &str, share: Share) {
        self.0.insert(container.to_owned(), share);
    }

    pub(crate) fn remove(&mut self, container: &str) {
        self.0.remove(container);
    }

    /// What they may use together.
    pub(crate) fn demand(&self) -> Demand {
        let sum = |of: fn(&Share) -> Option<u64>| {
            let limits = self.0.values().filter_map(of);
            limits.fold(None, |sum: Option<u64>, limit| Some(sum.unwrap_or(0).saturating_add(limit)))
        };
        Demand {
            cpu_limit: sum(|share| share.cpu_limit),
            cpu_request: None,
            memory_limit: sum(|share| share.memory_limit),
            cpu_open: self.0.values().any(|share| share.cpu_limit.is_none()),
            memory_open: self.0.values().any(|share| share.memory_limit.is_none()),
        }
    }

    /// The host's CPUs that they may run on together; `None` where one of them may run on any.
    pub(crate) fn cpus(&self) -> Option<CpuSet> {
        let mut all = CpuSet::default();
        for share in self.0.values() {
            all.0.extend(share.cpus.as_ref()?.0.iter());
        }
        (!all.0.is_empty()).then_some(all)
    }
}

/// CPUs of the host, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct CpuSet(pub(crate) BTreeSet<u32>);

impl CpuSet {
    /// Reads the kernel's form, e.g. `0-3,7`.
    pub(crate) fn parse(text: &str) -> Result<Self, PromiseError> {
        let fault = || PromiseError::Cpus(text.chars().take(80).collect());
        let number =
            |text: &str| text.trim().parse::<u32>().ok().filter(|cpu| *cpu < MOST_CPUS).ok_or_else(fault);
        let mut set = BTreeSet::new();
        for part in text.trim().split(',').filter(|part| !part.trim().is_empty()) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(fault());
            }
            set.extend(first..=last);
        }
        Ok(Self(set))
    }

    /// In the kernel's form.
    pub(crate) fn text(&self) -> String {
        self.0.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
    }
}

#[cfg(test)]
mod tests;
