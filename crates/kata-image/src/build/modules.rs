//! Which kernel modules go into an image, and in which order the agent loads them.
//!
//! The order is computed from the modules themselves (`depends=` in their `.modinfo`): a kernel package has no
//! `modules.dep` before it is installed. What the kernel has built in (`modules.builtin`) is skipped.
//!
//! # The list for the agent
//!
//! The image tells the agent what to load in [`LIST_PATH`], a text file of one entry per line:
//!
//! ```text
//! /lib/modules/6.1.0/kernel/drivers/virtio/virtio.ko
//! /lib/modules/6.1.0/kernel/net/vmw_vsock/vsock.ko some=parameter other=2
//! @overlay /lib/modules/6.1.0/kernel/fs/overlayfs/overlay.ko
//! @erofs /lib/modules/6.1.0/kernel/lib/libcrc32c.ko /lib/modules/6.1.0/kernel/fs/erofs/erofs.ko
//! ```
//!
//! A line that begins with `/` is a module to load at boot, in the order of the lines: the absolute path of an
//! uncompressed file for `finit_module`, then optionally, after one space, its parameters as the system call takes them.
//! A line that begins with `@` names a module to load when it is first needed, then, each after one space, the files to
//! load for it, dependencies first. Dependencies that the boot lines load are left out; one that another `@` line loads
//! too is in both, so "already loaded" (`EEXIST`) is a success. A module that is in no line is built in or not there:
//! loading it is then for the kernel to refuse. An empty list is what a kernel with everything built in gets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::bzimage::{unxz, unzstd};
use super::elf::{Elf, ElfError};

/// Where in the image the agent finds its list of modules.
pub const LIST_PATH: &str = "/etc/kata-agent/modules";

/// Which modules an image loads, and when.
#[derive(Clone, Copy, Debug)]
pub struct Selection {
    /// Loaded at boot: guests cannot do without.
    boot: &'static [&'static str],
    /// Loaded at boot, and left out where a kernel does not have them.
    boot_where_there: &'static [&'static str],
    /// Loaded when first needed, and left out where a kernel does not have them.
    on_demand: &'static [&'static str],
}

/// For a root in the initrd: at boot, what leads to the host.
pub const IN_INITRD: Selection = Selection {
    boot: &["virtio_mmio", "virtio_pci", "vmw_vsock_virtio_transport", "virtiofs"],
    boot_where_there: &[],
    on_demand: &[
        "overlay",
        "virtio_blk",
        "erofs",
        "ext4",
        "virtio_net",
        "loop",
        "dm_verity",
        "virtio_balloon",
        "virtio_mem",
    ],
};

/// For a root on a disk: what leads to it and to the host.
pub const ON_DISK: Selection = Selection {
    boot: &[
        "virtio_mmio",
        "virtio_pci",
        "virtio_blk",
        "dm_verity",
        "erofs",
        "overlay",
        "vmw_vsock_virtio_transport",
        "virtiofs",
    ],
    // systemd complains at each boot where it has to look for it.
    boot_where_there: &["autofs4"],
    on_demand: &["ext4", "virtio_net", "loop", "virtio_balloon", "virtio_mem", "sev_guest", "tdx_guest"],
};

/// Of those that are loaded when first needed: what speaks to hardware that reports on its machine. The boot layer loads it where
/// there is that hardware, for the initdata is compared with a report before the agent is there.
pub const FOR_REPORTS: [&str; 2] = ["sev_guest", "tdx_guest"];

/// Why the modules of an image cannot be gathered.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file or directory of the module tree cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A module does not unpack.
    #[error("cannot unpack the module {}", path.display())]
    Unpack {
        /// Its path.
        path: PathBuf,
        /// What the decompressor says.
        #[source]
        source: io::Error,
    },
    /// A module is not an ELF file.
    #[error("cannot read the module {}", path.display())]
    Elf {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: ElfError,
    },
    /// A module that guests cannot do without is neither in the tree nor built in.
    #[error(
        "kernel {release} has no {module}, neither as a module nor built in: guests of this image need it"
    )]
    Missing {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
    },
    /// A module depends on one that is not there.
    #[error("module {module} of kernel {release} depends on {dependency}, which is not there")]
    Dependency {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
        /// What it depends on.
        dependency: String,
    },
    /// Modules depend on each other in a circle.
    #[error("module {module} of kernel {release} depends on itself")]
    Circle {
        /// The kernel.
        release: String,
        /// One module of the circle.
        module: String,
    },
}

/// The modules of one kernel: a directory with `kernel/…` and `modules.builtin`.
#[derive(Debug)]
pub struct Tree {
    release: String,
    root: PathBuf,
    /// By module name; paths relative to the root.
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

/// One module of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The name, with underscores.
    pub name: String,
    /// The absolute path in the image.
    pub path: String,
    /// The uncompressed module.
    pub data: Vec<u8>,
}

/// What an image loads, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To load at boot, in order.
    pub boot: Vec<Module>,
    /// To load on demand: the name, then what to load for it, in order.
    pub on_demand: Vec<(String, Vec<Module>)>,
}

impl Plan {
    /// The text of the agent's list.
    pub fn list(&self) -> String {
        let boot = self.boot.iter().map(|module| format!("{}\n", module.path));
        let on_demand = self.on_demand.iter().map(|(name, modules)| {
            let paths: String = modules.iter().map(|module| format!(" {}", module.path)).collect();
            format!("@{name}{paths}\n")
        });
        boot.chain(on_demand).collect()
    }

    /// Every module once.
    pub fn modules(&self) -> impl Iterator<Item = &Module> {
        let all = self.boot.iter().chain(self.on_demand.iter().flat_map(|(_, modules)| modules));
        all.map(|module| (&module.path, module)).collect::<BTreeMap<_, _>>().into_values()
    }

    /// Whether the guest can have the named module loaded.
    pub fn provides(&self, name: &str) -> bool {
        self.modules().any(|module| module.name == name)
    }
}

impl Tree {
    /// Lists the tree at `root`, the `lib/modules/<release>` of a kernel.
    pub fn open(root: &Path, release: &str) -> Result<Self, ModulesError> {
        let mut tree = Self {
            release: release.to_owned(),
            root: root.to_path_buf(),
            files: BTreeMap::new(),
            builtin: BTreeSet::new(),
        };
        tree.list(Path::new("kernel"))?;
        let path = root.join("modules.builtin");
        match fs::read_to_string(&path) {
            Ok(text) => tree.builtin.extend(text.lines().filter_map(|line| module_name(Path::new(line)))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => return Err(ModulesError::Read { path, source }),
        }
        Ok(tree)
    }

    fn list(&mut self, dir: &Path) -> Result<(), ModulesError> {
        let path = self.root.join(dir);
        let read = |source| ModulesError::Read { path: path.clone(), source };
        for entry in fs::read_dir(&path).map_err(read)? {
            let entry = entry.map_err(read)?;
            let relative = dir.join(entry.file_name());
            if entry.file_type().map_err(read)?.is_dir() {
                self.list(&relative)?;
            } else if let Some(name) = module_name(&relative) {
                self.files.insert(name, relative);
            }
        }
        Ok(())
    }

    /// Gathers the modules of a guest image.
    pub fn plan(&self, selection: Selection) -> Result<Plan, ModulesError> {
        let mut boot = Closure::default();
        for name in selection.boot {
            if !self.files.contains_key(*name) && !self.builtin.contains(*name) {
                return Err(ModulesError::Missing {
                    release: self.release.clone(),
                    module: (*name).to_owned(),
                });
            }
            self.close(name, &mut boot)?;
        }
        for name in selection.boot_where_there.iter().filter(|name| self.files.contains_key(**name)) {
            self.close(name, &mut boot)?;
        }
        let mut on_demand = Vec::new();
        for name in selection.on_demand.iter().filter(|name| self.files.contains_key(**name)) {
            let mut closure = Closure { known: boot.known.clone(), ..Closure::default() };
            self.close(name, &mut closure)?;
            on_demand.push(((*name).to_owned(), closure.order));
        }
        Ok(Plan { boot: boot.order, on_demand })
    }

    /// Adds the module `name` to `closure` after everything that it depends on.
    fn close(&self, name: &str, closure: &mut Closure) -> Result<(), ModulesError> {
        if closure.known.contains(name) || self.builtin.contains(name) {
            return Ok(());
        }
        if closure.open.iter().any(|open| open == name) {
            return Err(ModulesError::Circle { release: self.release.clone(), module: name.to_owned() });
        }
        let Some(file) = self.files.get(name) else {
            return Err(ModulesError::Dependency {
                release: self.release.clone(),
                module: closure.open.last().cloned().unwrap_or_default(),
                dependency: name.to_owned(),
            });
        };
        let data = self.read(file)?;
        let needs =
            needs(&data).map_err(|source| ModulesError::Elf { path: self.root.join(file), source })?;
        closure.open.push(name.to_owned());
        // What is only to be loaded before, if there is such a module, is often a name that means something else.
        let soft = needs.soft.iter().filter(|name| self.files.contains_key(*name));
        for dependency in soft.chain(&needs.hard) {
            self.close(dependency, closure)?;
        }
        closure.open.pop();
        closure.known.insert(name.to_owned());
        let path = format!("/lib/modules/{}/{}", self.release, without_compression(file).display());
        closure.order.push(Module { name: name.to_owned(), path, data });
        Ok(())
    }

    fn read(&self, file: &Path) -> Result<Vec<u8>, ModulesError> {
        let path = self.root.join(file);
        let data = fs::read(&path).map_err(|source| ModulesError::Read { path: path.clone(), source })?;
        let unpacked = match file.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => unxz(&data),
            Some("zst") => unzstd(&data),
            _ => return Ok(data),
        };
        unpacked.map_err(|source| ModulesError::Unpack { path, source })
    }
}

/// Modules in load order while they are gathered.
#[derive(Default)]
struct Closure {
    known: BTreeSet<String>,
    order: Vec<Module>,
    /// The modules whose dependencies are being gathered, outermost first.
    open: Vec<String>,
}

/// What a module says that it depends on.
#[derive(Debug, Default, PartialEq, Eq)]
struct Needs {
    hard: Vec<String>,
    soft: Vec<String>,
}

/// Reads `depends=` and the `pre:` part of `softdep=` in the `.modinfo` of a module.
fn needs(module: &[u8]) -> Result<Needs, ElfError> {
    let info = Elf::parse(module)?.section(".modinfo").unwrap_or_default();
    let mut needs = Needs::default();
    for entry in info.split(|&byte| byte == 0).filter_map(|entry| std::str::from_utf8(entry).ok()) {
        if let Some(names) = entry.strip_prefix("depends=") {
            needs.hard.extend(names.split(',').filter(|name| !name.is_empty()).map(canonical));
        } else if let Some(rest) = entry.strip_prefix("softdep=") {
            let words = rest.split_whitespace().skip_while(|word| *word != "pre:").skip(1);
            needs.soft.extend(words.take_while(|word| !word.ends_with(':')).map(canonical));
        }
    }
    Ok(needs)
}

/// The name of the module in a file, if it is a module.
fn module_name(file: &Path) -> Option<String> {
    let name = without_compression(file);
    let name = name.file_name()?.to_str()?.strip_suffix(".ko")?;
    Some(canonical(name))
}

/// Modules are found under both spellings; the kernel uses underscores.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn without_compression(file: &Path) -> PathBuf {
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz" | "zst") => file.with_extension(""),
        _ => file.to_path_buf(),
    }
}

#[cfg(test)]
mod tests;
