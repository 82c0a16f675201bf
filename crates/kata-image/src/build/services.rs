//! The image of flavour services: an initramfs that verifies and mounts a root disk, and that disk.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::modules::{FOR_REPORTS, ON_DISK, Plan};
use super::packages::Archive;
use super::program::Program;
use super::root::{self, PACKAGES, Root};
use super::{BuildError, Progress, describe, disk, file, initramfs, kernel, temporary_in};
use crate::manifest::{DiskImage, Init, Manifest, capability, hex, sha256_of};

/// The root disk's name in an image.
const ROOT_FILE: &str = "root.img";
/// Where the boot layer looks for its list of modules, in the agent's format.
const MODULES_LIST: &str = "/etc/kata-guest-init/modules";

/// What an image of flavour services has beside the agent.
#[derive(Clone, Debug)]
pub struct Services {
    /// The boot layer (`kata-guest-init`): a static program.
    pub guest_init: PathBuf,
    /// What reads initdata (`kata-initdata`): a static program.
    pub initdata: PathBuf,
    /// What pulls images (`kata-image-pull`): a static program. Without, guests cannot.
    pub image_pull: Option<PathBuf>,
    /// A directory of systemd units: those of the agent and of the services.
    pub units: PathBuf,
    /// The suite of Debian that the root is made of, e.g. `trixie`.
    pub suite: String,
    /// The package archive; none for the one that this machine uses.
    pub mirror: Option<String>,
}

/// All of it, as it is now, but for the content of packages.
#[derive(Debug)]
pub(super) struct Gathered<'a> {
    services: &'a Services,
    guest_init: Program,
    /// By their names in the guest.
    programs: Vec<(&'static str, Program)>,
    units: String,
    archive: Archive,
    packages: Vec<String>,
    mkfs: String,
}

impl Services {
    /// Finds out what this is made of now. Nothing but package lists is downloaded.
    pub(super) fn gather(&self, cache: &Path) -> Result<Gathered<'_>, BuildError> {
        let guest_init = Program::read(&self.guest_init)?;
        let mut programs = vec![("kata-initdata", Program::read(&self.initdata)?)];
        if let Some(path) = &self.image_pull {
            programs.push(("kata-image-pull", Program::read(path)?));
        }
        let archive = Archive::open(cache, &self.suite, self.mirror.as_deref())?;
        let packages = archive.resolve(PACKAGES)?;
        let mkfs = disk::tool_version().map_err(disk::DiskError::from)?;
        let units = digest_of_tree(&self.units)?;
        Ok(Gathered { services: self, guest_init, programs, units, archive, packages, mkfs })
    }
}

impl Gathered<'_> {
    /// Lines for the image's key.
    pub(super) fn key(&self) -> String {
        let mut key = format!("guest-init {}\n", self.guest_init.digest());
        for (name, program) in &self.programs {
            key.push_str(&format!("{name} {}\n", program.digest()));
        }
        let packages = self.packages.join(" ");
        let Self { units, mkfs, .. } = self;
        key + &format!(
            "units {units}\npackages {packages}\nmkfs {mkfs}\nmodules {ON_DISK:?}\nroot {}\n",
            root::recipe()
        )
    }

    /// Writes kernel, initrd and root disk into `dir` and describes them. Salt and UUID of the disk come from `key`.
    pub(super) fn pack(
        &self,
        agent: &Program,
        kernel: &kernel::Kernel,
        dir: &Path,
        key: &str,
        progress: Progress<'_>,
    ) -> Result<Manifest, BuildError> {
        let plan = kernel.plan(ON_DISK)?;
        // The rest is for the agent, which has it in the root.
        let mut early = plan.clone();
        early.on_demand.retain(|(name, _)| FOR_REPORTS.contains(&name.as_str()));
        let init = initramfs::Init { program: self.guest_init.bytes(), list: MODULES_LIST };
        let mut manifest = describe(agent, kernel, &init, &early, dir, progress)?;
        progress("unpacking the packages of the root");
        let work = temporary_in(dir).map_err(file(dir))?;
        let (packages, tree) = (work.path().join("packages"), work.path().join("root"));
        fs::create_dir(&tree).map_err(file(&tree))?;
        self.archive.unpack(PACKAGES, &self.packages, &packages)?;
        self.lay_out(agent, &plan, &packages, &tree)?;
        let path = dir.join(ROOT_FILE);
        let verity = disk::make(&tree, &path, key)?;
        let size = fs::metadata(&path).map_err(file(&path))?.len();
        progress(&format!("the root disk has {:.1} MB", size as f64 / 1e6));
        manifest.image = Some(DiskImage {
            path: ROOT_FILE.into(),
            sha256: sha256_of(&path).map_err(file(&path))?,
            fstype: disk::FSTYPE.to_owned(),
            verity: Some(verity),
        });
        manifest.init = Init::Systemd;
        if let Some(config) = kernel.config()? {
            manifest.capabilities =
                config.capabilities(&plan).union(&manifest.capabilities).cloned().collect();
        }
        manifest.capabilities.extend(self.capabilities().map(str::to_owned));
        Ok(manifest)
    }

    fn lay_out(&self, agent: &Program, plan: &Plan, packages: &Path, tree: &Path) -> Result<(), BuildError> {
        let mut root = Root::lay_out(tree, packages)?;
        root.program("kata-agent", agent.bytes())?;
        for (name, program) in &self.programs {
            root.program(name, program.bytes())?;
        }
        root.units(&self.services.units)?;
        root.modules(plan)?;
        Ok(())
    }

    fn capabilities(&self) -> impl Iterator<Item = &'static str> {
        let pull = self.services.image_pull.as_ref().map(|_| capability::GUEST_PULL);
        [capability::INITDATA, capability::GUEST_SERVICES, capability::EXTENSIONS].into_iter().chain(pull)
    }
}

/// A digest of the names and the content of the files in a directory, and of its directories.
fn digest_of_tree(dir: &Path) -> Result<String, BuildError> {
    let mut entries: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).map_err(file(dir))? {
        entries.push(entry.map_err(file(dir))?.path());
    }
    entries.sort();
    let mut hash = Sha256::new();
    for path in entries {
        let content =
            if path.is_dir() { digest_of_tree(&path)? } else { sha256_of(&path).map_err(file(&path))? };
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hash.update(format!("{} {name} {content}\n", name.len()));
    }
    Ok(hex(&hash.finalize()))
}

#[cfg(test)]
mod tests {
    use super::super::elf::tests::elf_with;
    use super::*;

    #[test]
    fn digest_of_units_is_of_names_and_content_at_every_depth() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            digest_of_tree(dir.path()).unwrap()
        };
        let mut seen =
            vec![put("a.service", "one"), put("b.service", "one"), put("a.service.d/x.conf", "one")];
        seen.push(put("a.service.d/x.conf", "two"));
        fs::rename(dir.path().join("b.service"), dir.path().join("c.service")).unwrap();
        seen.push(digest_of_tree(dir.path()).unwrap());
        let different: std::collections::HashSet<_> = seen.iter().collect();
        assert_eq!(different.len(), seen.len());
        // The order in which they were written is none of it.
        fs::remove_file(dir.path().join("a.service")).unwrap();
        assert_eq!(Some(&put("a.service", "one")), seen.last());
    }

    #[test]
    fn dynamic_program_is_refused_before_anything_is_downloaded() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("program");
        fs::write(&program, elf_with(&[3], b"/lib/ld", &[])).unwrap();
        let services = Services {
            guest_init: program.clone(),
            initdata: program,
            image_pull: None,
            units: dir.path().to_owned(),
            suite: "trixie".into(),
            mirror: Some("http://127.0.0.1:1/debian".into()),
        };
        let cache = dir.path().join("cache");
        assert!(matches!(services.gather(&cache), Err(BuildError::Program(_))));
        assert!(!cache.exists());
    }
}
