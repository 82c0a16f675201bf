//! Pods that start as copies of a machine that has booted.
//!
//! ```text
//!   kata-ctl factory init                                   a pod's start
//!     boot, agent serves, pause                               what decides the guest ─▶ digest
//!        │ Vm::snapshot                                          │ the directory of that name, if it can be trusted and is whole
//!        ▼                                                       ▼
//!   <template_path>/.new-<pid> ─ rename ─▶ <template_path>/<digest>/{memory, state, about.json} ─▶ Vm::boot
//!                                                                │ clock and random numbers of its own
//!                                                                ▼
//!                                                             CreateSandbox, network, size: as for every pod
//! ```
//!
//! What decides the guest is in the name of the directory ([`Ingredients`]): a pod whose kernel, image, command line, size, monitor
//! or host is another one finds nothing there, and boots as ever. Nothing that is a pod's own is in a template: name, network,
//! disks, and files come once it runs.

mod ingredients;
mod make;
mod store;

use std::fmt;
use std::io;
use std::path::PathBuf;

use kata_config::{Artefacts, Config};
use kata_hypervisor::{Growth, HypervisorError, Size, Template};
use serde::Serialize;

pub use ingredients::{FileId, Ingredients};
pub use make::make;
pub use store::{About, Entry, Sum};
use store::{Faulty, Store};

use crate::boot::{BootError, Guest};
use crate::error::{SandboxError, chain};
use crate::lifecycle::Pod;
use crate::resources;

/// Why a template cannot be made, looked at or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The driver writes no machines to files.
    #[error("{0} cannot write a machine to files; set runtime.hypervisor_name to \"builtin\"")]
    Unsupported(String),
    /// What else is configured has none.
    #[error("there are no templates with {0}")]
    Excluded(&'static str),
    /// The directory is not for templates.
    #[error(
        "{path} cannot hold templates: {why}; whoever can write there decides what runs in pods, so set \
         hypervisor.qemu.factory.template_path to a directory that only root can write to",
        path = .path.display()
    )]
    Untrusted {
        /// The directory or file.
        path: PathBuf,
        /// What is the matter with it.
        why: &'static str,
    },
    /// A file of a template.
    #[error("cannot {action} {path}", path = .path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file system is too small.
    #[error(
        "{path} has {free_mib} MiB left, and a template may take {need_mib} MiB: make room there, or set \
         hypervisor.qemu.factory.template_path to another directory",
        path = .path.display()
    )]
    Room {
        /// The directory of templates.
        path: PathBuf,
        /// What is free.
        free_mib: u64,
        /// What has to be.
        need_mib: u64,
    },
    /// What the configuration boots cannot be found.
    #[error("the template's machine cannot be described")]
    Guest(#[source] BootError),
    /// The machine could not be begun.
    #[error("the template's machine cannot be made")]
    Launch(#[source] SandboxError),
    /// The machine did not come up.
    #[error("the template's machine did not boot")]
    Boot(#[source] BootError),
    /// The agent is not there after all.
    #[error("the template's agent said that it serves, and does not answer")]
    Silent,
    /// The machine cannot be written.
    #[error("the template's machine cannot be written to files")]
    Snapshot(#[source] HypervisorError),
    /// Whoever asked has had enough.
    #[error("the template was given up")]
    GivenUp,
}

/// Why a pod that should start as a copy boots instead.
#[derive(Debug)]
enum Cold {
    /// There are none, or none that fits; what is different from one that nearly does.
    None { dir: PathBuf, other: Vec<&'static str> },
    /// There is one, and it is of no use.
    Faulty(String),
    /// None could be of use to this pod.
    Never(String),
}

impl fmt::Display for Cold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None { dir, other } if other.is_empty() => write!(f, "there is none in {}", dir.display()),
            Self::None { dir, other } => {
                write!(f, "those in {} are of another {}", dir.display(), other.join(", "))
            }
            Self::Faulty(why) | Self::Never(why) => f.write_str(why),
        }
    }
}

/// A template that a pod is about to start from.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) files: Template,
    pub(crate) about: About,
    /// The size that its machine has.
    pub(crate) size: Size,
    pub(crate) growth: Growth,
}

/// The template that the pod is to start from; `None` where it boots, for a reason that is logged where a template was asked for.
pub(crate) fn choose(pod: &Pod, guest: &Guest) -> Option<Chosen> {
    if !pod.config.hypervisor.qemu.factory.enable_template {
        return None;
    }
    match find(pod, guest) {
        Ok(chosen) => Some(chosen),
        Err(cold @ Cold::Never(_)) => {
            tracing::info!(pod = pod.id, reason = %cold, "the pod boots its machine: no template can be of use to it");
            None
        }
        Err(cold) => {
            warn_cold(&pod.id, &cold.to_string());
            None
        }
    }
}

/// Tells why a pod starts as if there were no templates.
pub(crate) fn warn_cold(pod: &str, reason: &str) {
    tracing::warn!(
        pod,
        reason,
        "the pod boots its machine: no template is of use to it; `kata-ctl factory init` makes one"
    );
}

fn find(pod: &Pod, guest: &Guest) -> Result<Chosen, Cold> {
    if !pod.vm.capabilities().snapshot {
        return Err(Cold::Never(format!("{} starts from none", pod.choice.driver)));
    }
    if let Some(key) = excluded(&pod.config) {
        return Err(Cold::Never(format!("there are none with {key}")));
    }
    let (size, growth) = pod.resources.template().map_err(|why| Cold::Never(why.to_owned()))?;
    let faulty = |error: TemplateError| Cold::Faulty(chain(&error));
    let ingredients = Ingredients::of(&pod.config, &pod.artefacts, guest, size, growth).map_err(faulty)?;
    let store = Store::of(&pod.config);
    match store.open(&ingredients) {
        Ok(Some((files, about))) => Ok(Chosen { files, about, size, growth }),
        Ok(None) => {
            let dir = store.dir().to_owned();
            Err(Cold::None { dir, other: store.nearest(&ingredients) })
        }
        Err(Faulty(why)) => Err(Cold::Faulty(why)),
    }
}

/// The key that no template goes together with, if it is set: such memory is taken anew by each machine, and initdata is read
/// while one boots.
fn excluded(config: &Config) -> Option<&'static str> {
    let qemu = &config.hypervisor.qemu;
    let keys = [
        ("hypervisor.qemu.enable_hugepages", qemu.enable_hugepages),
        ("hypervisor.qemu.enable_mem_prealloc", qemu.enable_mem_prealloc),
        ("hypervisor.qemu.initdata", !qemu.initdata.is_empty()),
        ("hypervisor.qemu.confidential_guest", qemu.confidential_guest),
    ];
    keys.into_iter().find(|(_, set)| *set).map(|(key, _)| key)
}

/// What there is of templates.
#[derive(Debug, Serialize)]
pub struct Status {
    /// Where they are.
    pub dir: PathBuf,
    /// Whether pods of this configuration start from one.
    pub enabled: bool,
    /// `ready`, `none`, `stale` (there are some, and none fits) or `damaged`.
    pub state: &'static str,
    /// Why it is not `ready`.
    pub reason: Option<String>,
    /// Name of the one that fits this configuration, whether or not it is there.
    pub digest: String,
    /// All that are there.
    pub templates: Vec<Entry>,
}

/// Looks at the templates that are there, and at the one that pods under `config` would start from; with `verify` at all of its
/// content.
///
/// # Errors
/// It cannot be found out what pods boot, or the directory cannot be read.
pub fn status(config: &Config, artefacts: &Artefacts, verify: bool) -> Result<Status, TemplateError> {
    let guest = Guest::find(config, artefacts).map_err(TemplateError::Guest)?;
    let (size, growth) = resources::template_size(config);
    let ingredients = Ingredients::of(config, artefacts, &guest, size, growth)?;
    let store = Store::of(config);
    let digest = ingredients.digest();
    let opened = store.open(&ingredients).and_then(|found| match found {
        Some((files, about)) if verify => store.verify(&ingredients, &files, &about).map(|()| true),
        found => Ok(found.is_some()),
    });
    let other = store.nearest(&ingredients);
    let (state, reason) = match opened {
        Ok(true) => ("ready", None),
        Ok(false) if other.is_empty() => ("none", None),
        Ok(false) => ("stale", Some(format!("of another {}", other.join(", ")))),
        Err(Faulty(why)) => ("damaged", Some(why)),
    };
    Ok(Status {
        dir: store.dir().to_owned(),
        enabled: config.hypervisor.qemu.factory.enable_template,
        state,
        reason,
        digest,
        templates: store.entries()?,
    })
}

/// Removes all templates of `config`'s directory, whatever they are of, and what was left of making some. The answer is what was
/// removed. Machines that were started from them go on.
///
/// # Errors
/// The directory is not for templates, or something in it cannot be removed.
pub fn destroy(config: &Config) -> Result<Vec<String>, TemplateError> {
    Store::of(config).clear(|_| true)
}
