//! The directory of templates.
//!
//! | path | what |
//! |---|---|
//! | `<digest>/memory` | the guest's memory, with holes where it is zero |
//! | `<digest>/state` | processors and devices |
//! | `<digest>/about.json` | [`About`]: what it was made of, and sums over the two |
//! | `.new-<pid>/` | one that is being made; it is renamed when it is whole |
//!
//! Directories are 0700, files 0400, all root's. Whoever could write here would decide what runs in pods: what is not so is not used.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kata_config::Config;
use kata_hypervisor::Template;
use rustix::fs::{CWD, Mode, OFlags, SeekFrom as DataOrHole, openat, seek};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Ingredients, TemplateError};
use crate::error::chain;

const MEMORY: &str = "memory";
const STATE: &str = "state";
const ABOUT: &str = "about.json";
const NEW: &str = ".new-";
/// Longest `about.json`; one has some 2 KiB.
const ABOUT_MAX: u64 = 64 << 10;
/// What a guest has touched when its agent serves is less, of whatever size it is.
const NEED_MIB: u64 = 256;
const MIB: u64 = 1 << 20;
/// Memory is summed up by its pages, so that it does not matter where a file system has holes.
const PAGE: usize = 4096;

/// A file's length and a sum over it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sum {
    /// Its length.
    pub bytes: u64,
    /// What it takes of its file system.
    pub on_disk: u64,
    /// SHA-256 over its pages that are not zero, each after its offset.
    pub sha256: String,
}

/// What is known of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Shape of this file and its neighbours.
    pub format: u32,
    /// What its machine was made of.
    pub ingredients: Ingredients,
    /// Milliseconds since the epoch.
    pub made_at_ms: u64,
    /// How long that took.
    pub took_ms: u64,
    /// Version of the agent in it.
    pub agent_version: String,
    /// Release of the kernel in it.
    pub guest_kernel: String,
    /// Its agent announced itself, as this project's does.
    pub announced: bool,
    /// `memory`
    pub memory: Sum,
    /// `state`
    pub state: Sum,
}

impl About {
    pub(super) const FORMAT: u32 = 1;
}

/// A template that is there.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub digest: String,
    /// What is known of it.
    pub about: Option<About>,
    /// Why nothing is.
    pub fault: Option<String>,
}

/// Why a template that is there is of no use.
#[derive(Debug)]
pub(super) struct Faulty(pub(super) String);

impl From<TemplateError> for Faulty {
    fn from(error: TemplateError) -> Self {
        Self(chain(&error))
    }
}

pub(super) struct Store {
    dir: PathBuf,
}

/// A template that is being made; what is not finished is removed.
pub(super) struct Fresh<'a> {
    store: &'a Store,
    dir: PathBuf,
}

impl Store {
    pub(super) fn of(config: &Config) -> Self {
        Self { dir: config.hypervisor.qemu.factory.template_path.clone() }
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The template of these ingredients; `None` where there is none.
    pub(super) fn open(&self, ingredients: &Ingredients) -> Result<Option<(Template, About)>, Faulty> {
        let dir = self.dir.join(ingredients.digest());
        let (Some(_), Some(handle)) = (open_dir(&self.dir)?, open_dir(&dir)?) else { return Ok(None) };
        let about = read_about(&handle, &dir)?;
        if about.ingredients != *ingredients {
            return Err(Faulty(format!("{} says that it is of another machine", dir.join(ABOUT).display())));
        }
        let open = |name: &str, sum: &Sum| {
            let (file, bytes) = open_file(&handle, &dir, name)?;
            match bytes == sum.bytes {
                true => Ok(file),
                false => Err(Faulty(format!(
                    "{} has {bytes} bytes instead of {}",
                    dir.join(name).display(),
                    sum.bytes
                ))),
            }
        };
        let (state, memory) = (open(STATE, &about.state)?, open(MEMORY, &about.memory)?);
        Ok(Some((Template { state, memory }, about)))
    }

    /// Reads all of a template that is open.
    pub(super) fn verify(
        &self,
        ingredients: &Ingredients,
        files: &Template,
        about: &About,
    ) -> Result<(), Faulty> {
        let dir = self.dir.join(ingredients.digest());
        for (name, file, expected) in
            [(STATE, &files.state, &about.state), (MEMORY, &files.memory, &about.memory)]
        {
            let path = dir.join(name);
            let found = sum(file).map_err(|source| file_error("read", &path)(source))?;
            if found.sha256 != expected.sha256 {
                return Err(Faulty(format!("{} is not what was written", path.display())));
            }
        }
        Ok(())
    }

    /// All templates, by name.
    pub(super) fn entries(&self) -> Result<Vec<Entry>, TemplateError> {
        let mut entries = Vec::new();
        for digest in self.names()?.into_iter().filter(|name| is_digest(name)) {
            let dir = self.dir.join(&digest);
            let about = open_dir(&dir).map_err(Faulty::from).and_then(|handle| match handle {
                Some(handle) => read_about(&handle, &dir),
                None => Err(Faulty("it is gone".to_owned())),
            });
            let (about, fault) = match about {
                Ok(about) => (Some(about), None),
                Err(Faulty(why)) => (None, Some(why)),
            };
            entries.push(Entry { digest, about, fault });
        }
        entries.sort_by(|one, other| one.digest.cmp(&other.digest));
        Ok(entries)
    }

    /// What is different about the template that is most like these ingredients; empty where there is none.
    pub(super) fn nearest(&self, ingredients: &Ingredients) -> Vec<&'static str> {
        let entries = self.entries().unwrap_or_default();
        let abouts = entries.into_iter().filter_map(|entry| entry.about);
        let differences = abouts.map(|about| about.ingredients.differences(ingredients));
        differences.filter(|all| !all.is_empty()).min_by_key(Vec::len).unwrap_or_default()
    }

    /// Removes the templates that `which` is true of, and what nobody makes any more. The answer is their names.
    pub(super) fn clear(&self, which: impl Fn(&Entry) -> bool) -> Result<Vec<String>, TemplateError> {
        if open_dir(&self.dir)?.is_none() {
            return Ok(Vec::new());
        }
        let abandoned = self
            .names()?
            .into_iter()
            .filter(|name| name.strip_prefix(NEW).is_some_and(|pid| !Path::new("/proc").join(pid).exists()));
        let chosen = self.entries()?.into_iter().filter(which).map(|entry| entry.digest);
        let mut removed = Vec::new();
        for name in chosen.chain(abandoned) {
            let path = self.dir.join(&name);
            match std::fs::remove_dir_all(&path) {
                // Somebody else was faster.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(file_error("remove", &path))?,
            }
            removed.push(name);
        }
        Ok(removed)
    }

    fn names(&self) -> Result<Vec<String>, TemplateError> {
        match std::fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(source) => Err(file_error("read", &self.dir)(source)),
            Ok(entries) => {
                Ok(entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
            }
        }
    }

    /// Makes the directory if need be, and sees to it that there is room for a machine with so much memory.
    pub(super) fn prepare(&self, memory_mib: u64) -> Result<(), TemplateError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.dir);
        made.map_err(file_error("make", &self.dir))?;
        self.clear(|_| false)?;
        let room = rustix::fs::statvfs(&self.dir);
        let room = room.map_err(|error| file_error("look at", &self.dir)(error.into()))?;
        let free_mib = room.f_bavail.saturating_mul(room.f_frsize) / MIB;
        let need_mib = memory_mib.min(NEED_MIB);
        match free_mib < need_mib {
            true => Err(TemplateError::Room { path: self.dir.clone(), free_mib, need_mib }),
            false => Ok(()),
        }
    }

    /// Begins a template.
    pub(super) fn begin(&self) -> Result<(Fresh<'_>, Template), TemplateError> {
        let dir = self.dir.join(format!("{NEW}{}", std::process::id()));
        // What is there was begun by a process of this number that is no more.
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(file_error("remove", &dir)(error));
            }
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&dir).map_err(file_error("make", &dir))?;
        let fresh = Fresh { store: self, dir };
        let make = |name: &str| {
            let path = fresh.dir.join(name);
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o400).open(&path);
            file.map_err(file_error("make", &path))
        };
        let files = Template { state: make(STATE)?, memory: make(MEMORY)? };
        Ok((fresh, files))
    }
}

impl Fresh<'_> {
    /// The sums of what was written.
    pub(super) fn sums(&self) -> Result<(Sum, Sum), TemplateError> {
        let of = |name: &str| {
            let path = self.dir.join(name);
            File::open(&path).and_then(|file| sum(&file)).map_err(file_error("read", &path))
        };
        Ok((of(MEMORY)?, of(STATE)?))
    }

    /// Gives the template its name. One of the same name is replaced.
    pub(super) fn finish(self, about: &About) -> Result<(), TemplateError> {
        let path = self.dir.join(ABOUT);
        let text =
            serde_json::to_vec_pretty(about).map_err(|error| file_error("write", &path)(error.into()))?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(&path)
            .map_err(file_error("make", &path))?;
        file.write_all(&text).and_then(|()| file.sync_all()).map_err(file_error("write", &path))?;
        for name in [MEMORY, STATE] {
            let path = self.dir.join(name);
            File::open(&path).and_then(|file| file.sync_all()).map_err(file_error("write", &path))?;
        }
        let named = self.store.dir.join(about.ingredients.digest());
        match std::fs::rename(&self.dir, &named) {
            // At no time there is none: the one before has this one's old name now, and goes with it.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                let exchanged = rustix::fs::renameat_with(CWD, &self.dir, CWD, &named, exchange);
                exchanged.map_err(|error| file_error("replace", &named)(error.into()))
            }
            renamed => renamed.map_err(file_error("rename", &self.dir)),
        }
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        match std::fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.dir.display(), %error, "a template that was given up cannot be removed");
            }
            _ => {}
        }
    }
}

fn is_digest(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TemplateError {
    move |source| TemplateError::File { action, path: path.to_owned(), source }
}

/// Opens a directory that nobody but this user and root can write to; `None` where there is none.
fn open_dir(path: &Path) -> Result<Option<File>, TemplateError> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(CWD, path, flags, Mode::empty()) {
        Ok(dir) => {
            let dir = File::from(dir);
            trust(&dir, path)?;
            Ok(Some(dir))
        }
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(rustix::io::Errno::NOTDIR | rustix::io::Errno::LOOP) => {
            Err(TemplateError::Untrusted { path: path.to_owned(), why: "it is no directory" })
        }
        Err(error) => Err(file_error("open", path)(error.into())),
    }
}

/// Opens a regular file of a template for reading, with its length.
fn open_file(dir: &File, path: &Path, name: &str) -> Result<(File, u64), TemplateError> {
    let path = path.join(name);
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat(dir, name, flags, Mode::empty());
    let file = File::from(file.map_err(|error| file_error("open", &path)(error.into()))?);
    let bytes = trust(&file, &path)?;
    Ok((file, bytes))
}

/// Refuses what others can write to. The answer is its length.
fn trust(file: &File, path: &Path) -> Result<u64, TemplateError> {
    let found = file.metadata().map_err(file_error("look at", path))?;
    let own = [0, rustix::process::geteuid().as_raw()].contains(&found.uid());
    let why = match () {
        () if !own => Some("it belongs to another user"),
        () if found.mode() & 0o022 != 0 => Some("others can write to it"),
        () if !found.is_dir() && !found.is_file() => Some("it is neither file nor directory"),
        () => None,
    };
    match why {
        Some(why) => Err(TemplateError::Untrusted { path: path.to_owned(), why }),
        None => Ok(found.len()),
    }
}

fn read_about(dir: &File, path: &Path) -> Result<About, Faulty> {
    let (file, _) = open_file(dir, path, ABOUT)?;
    let path = path.join(ABOUT);
    let mut text = Vec::new();
    file.take(ABOUT_MAX).read_to_end(&mut text).map_err(file_error("read", &path))?;
    let about: About = serde_json::from_slice(&text)
        .map_err(|error| Faulty(format!("{} cannot be read: {error}", path.display())))?;
    match about.format {
        About::FORMAT => Ok(about),
        other => Err(Faulty(format!("{} has format {other}, and this release knows 1", path.display()))),
    }
}

/// The sum over a file: its holes are not read, and whether a page of zeros is one does not matter.
fn sum(mut file: &File) -> io::Result<Sum> {
    let found = file.metadata()?;
    let (bytes, on_disk) = (found.len(), found.blocks().saturating_mul(512));
    let mut hash = Sha256::new();
    hash.update(bytes.to_le_bytes());
    let mut page = [0; PAGE];
    let mut offset = 0;
    while let Some(data) = data_from(file, offset)? {
        // Where a page begins, whatever granularity the file system has.
        offset = data - data % PAGE as u64;
        let end = seek(file, DataOrHole::Hole(data)).unwrap_or(bytes);
        file.seek(SeekFrom::Start(offset))?;
        while offset < end {
            let length = read_page(file, &mut page)?;
            let read = page.get(..length).unwrap_or_default();
            if read.is_empty() {
                break;
            }
            if read.iter().any(|byte| *byte != 0) {
                hash.update(offset.to_le_bytes());
                hash.update(read);
            }
            offset += read.len() as u64;
        }
    }
    Ok(Sum { bytes, on_disk, sha256: kata_image::manifest::hex(&hash.finalize()) })
}

/// Where the first data from `offset` on is; `None` where there is none up to the end.
fn data_from(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, DataOrHole::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads until the page is full or the file ends.
fn read_page(mut file: &File, page: &mut [u8; PAGE]) -> io::Result<usize> {
    let mut length = 0;
    while let Some(rest) = page.get_mut(length..).filter(|rest| !rest.is_empty()) {
        match file.read(rest)? {
            0 => break,
            read => length += read,
        }
    }
    Ok(length)
}
