//! The tar stream of a copy, packed and unpacked on the host's side.

use std::cell::Cell;
use std::fs::{DirBuilder, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, AtFlags, CWD, Mode, OFlags, ResolveFlags};
use tar::{Archive, Builder, EntryType};

use crate::pod::{FifoReader, FifoWriter};

/// Nothing outside, and no link on the way.
const CONFINED: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);
/// Of a file's mode, what is kept: no set-id and no sticky bit.
const MODE: u32 = 0o777;
/// Most bytes between two files' contents, and after the last: headers with long names, which are read whole, and padding.
const HEADERS_MAX: u64 = 1 << 20;

/// A copy that did not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The stream is no archive, or ends early.
    #[error("the container did not send a whole archive")]
    Stream(#[source] io::Error),
    /// The stream holds what was not asked for.
    #[error("the container sent {}, which was not asked for; nothing was copied", .0.display())]
    Unasked(PathBuf),
    /// The stream was empty.
    #[error("the container sent nothing")]
    Empty,
    /// A file of the host.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A directory or a device is in the way.
    #[error("{} is there already and no plain file: remove it, or copy to another name", .0.display())]
    Exists(PathBuf),
}

fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ArchiveError {
    let path = path.to_owned();
    move |source| ArchiveError::File { action, path, source }
}

/// Writes `from` and what is below it into the stream, called `name` there. Links stay links.
///
/// # Errors
/// Something cannot be read. A stream that nobody reads is for whoever reads to explain.
pub fn pack(from: &Path, name: &str, stream: Option<FifoWriter>) -> Result<(), ArchiveError> {
    let Some(stream) = stream else { return Ok(()) };
    let mut builder = Builder::new(BufWriter::with_capacity(64 << 10, stream));
    builder.follow_symlinks(false);
    // Not every tar knows how to read holes.
    builder.sparse(false);
    let metadata = std::fs::symlink_metadata(from).map_err(file("read", from))?;
    let packed = if metadata.is_dir() {
        builder.append_dir_all(name, from)
    } else {
        builder.append_path_with_name(from, name)
    };
    packed.map_err(file("copy", from))?;
    builder.into_inner().and_then(|mut stream| stream.flush()).map_err(file("copy", from))
}

/// Unpacks the stream, of which everything has to be `name` or below it, and calls it `to`.
///
/// # Errors
/// What is wrong with the stream or on the host; nothing is left then, and the stream is not read to its end.
pub fn unpack(stream: Option<FifoReader>, name: &str, to: &Path) -> Result<(), ArchiveError> {
    stream.map_or(Ok(()), |stream| receive(stream, name, to))
}

/// A stream that bounds what is read of it while there is a bound.
struct Metered<'a, R> {
    stream: R,
    bound: &'a Cell<Option<u64>>,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(left) = self.bound.get() else { return self.stream.read(into) };
        let count = (&mut self.stream).take(left).read(into)?;
        if count == 0 && left == 0 && !into.is_empty() {
            return Err(io::Error::other(format!("more than {HEADERS_MAX} bytes of headers or padding")));
        }
        self.bound.set(Some(left.saturating_sub(count as u64)));
        Ok(count)
    }
}

fn receive(stream: impl Read, name: &str, to: &Path) -> Result<(), ArchiveError> {
    // What is a device or leads to one, as /dev/stdout does, is not there to be replaced by a file.
    if std::fs::metadata(to).is_ok_and(|there| !there.is_file()) {
        return Err(ArchiveError::Exists(to.to_owned()));
    }
    let beside = to.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    let scratch = Scratch::make(beside)?;
    let mut found = false;
    let bound = Cell::new(Some(HEADERS_MAX));
    let mut archive = Archive::new(Metered { stream, bound: &bound });
    for entry in archive.entries().map_err(ArchiveError::Stream)? {
        let mut entry = entry.map_err(ArchiveError::Stream)?;
        bound.set(None);
        let path = entry.path().map_err(ArchiveError::Stream)?.into_owned();
        let inside = inside(&path, name).ok_or_else(|| ArchiveError::Unasked(path.clone()))?;
        scratch.entry(&mut entry, &inside)?;
        found = true;
        bound.set(Some(HEADERS_MAX));
    }
    // tar fills its last block up; the stream ends when tar does.
    io::copy(&mut archive.into_inner(), &mut io::sink()).map_err(ArchiveError::Stream)?;
    if !found {
        return Err(ArchiveError::Empty);
    }
    std::fs::rename(scratch.path.join(name), to).map_err(file("write", to))
}

/// The path of an entry, if it is `name` or below it.
fn inside(path: &Path, name: &str) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for part in path.components() {
        match part {
            Component::Normal(part) => parts.push(part),
            Component::CurDir => {}
            Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    (parts.first()? == &name).then(|| parts.iter().collect())
}

/// A directory of this process's own, removed at the end.
struct Scratch {
    path: PathBuf,
    dir: OwnedFd,
}

impl Scratch {
    fn make(beside: &Path) -> Result<Self, ArchiveError> {
        let name =
            crate::pod::random_name().map_err(|error| file("write into", beside)(io::Error::other(error)))?;
        let path = beside.join(format!(".kata-cp-{name}"));
        DirBuilder::new().mode(0o700).create(&path).map_err(file("create", &path))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match fs::open(&path, flags, Mode::empty()) {
            Ok(dir) => Ok(Self { path, dir }),
            Err(error) => Err(file("open", &path)(error.into())),
        }
    }

    fn entry(&self, entry: &mut tar::Entry<'_, impl Read>, path: &Path) -> Result<(), ArchiveError> {
        let mode = entry.header().mode().unwrap_or(0o644) & MODE;
        let parent = self.parent(path)?;
        let name = path.file_name().unwrap_or_default();
        let failed = |error: rustix::io::Errno| file("write", path)(error.into());
        match entry.header().entry_type() {
            EntryType::Directory => match fs::mkdirat(&parent, name, Mode::from_raw_mode(mode | 0o700)) {
                Err(rustix::io::Errno::EXIST) => Ok(()),
                made => made.map_err(failed),
            },
            EntryType::Regular | EntryType::Continuous => {
                let flags =
                    OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = fs::openat(&parent, name, flags, Mode::from_raw_mode(0o600)).map_err(failed)?;
                let mut opened = File::from(opened);
                io::copy(entry, &mut opened).map_err(file("write", path))?;
                fs::fchmod(&opened, Mode::from_raw_mode(mode)).map_err(failed)
            }
            EntryType::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                fs::symlinkat(target.as_slice(), &parent, name).map_err(failed)
            }
            EntryType::Link => {
                let target =
                    entry.link_name().map_err(ArchiveError::Stream)?.unwrap_or_default().into_owned();
                let first =
                    path.components().next().and_then(|part| part.as_os_str().to_str()).unwrap_or_default();
                let target = inside(&target, first).ok_or(ArchiveError::Unasked(target))?;
                let from = self.parent(&target)?;
                let old = target.file_name().unwrap_or_default();
                fs::linkat(&from, old, &parent, name, AtFlags::empty()).map_err(failed)
            }
            // Devices, pipes: of no use on this side.
            kind => {
                tracing::warn!(path = %path.display(), ?kind, "left out");
                Ok(())
            }
        }
    }

    /// The directory that an entry goes into, made where the stream did not tell of it.
    fn parent(&self, path: &Path) -> Result<OwnedFd, ArchiveError> {
        let parent = path.parent().unwrap_or_else(|| Path::new(""));
        let mut dir = self.dir.try_clone().map_err(file("open", path))?;
        for name in parent.iter() {
            let failed = |error: rustix::io::Errno| file("write into", parent)(error.into());
            match fs::mkdirat(&dir, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                Err(error) => return Err(failed(error)),
            }
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            dir = fs::openat2(&dir, name, flags, Mode::empty(), CONFINED).map_err(failed)?;
        }
        Ok(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let removed = fs::statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW)
            .map(|_| std::fs::remove_dir_all(&self.path));
        if let Ok(Err(error)) = removed {
            tracing::warn!(path = %self.path.display(), %error, "not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use tar::Header;

    use super::*;

    /// Entries as a hostile container might send them: path, kind, link target or content.
    fn stream(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = Builder::new(Vec::new());
        for (path, kind, text) in entries {
            let mut header = Header::new_ustar();
            // Past the builder's own checks.
            header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o6755);
            let is_link = matches!(kind, EntryType::Symlink | EntryType::Link);
            if is_link {
                header.as_mut_bytes()[157..157 + text.len()].copy_from_slice(text.as_bytes());
            }
            let content = if is_link || *kind == EntryType::Directory { "" } else { text };
            header.set_size(content.len() as u64);
            header.set_cksum();
            builder.append(&header, content.as_bytes()).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn received(entries: &[(&str, EntryType, &str)]) -> (tempfile::TempDir, Result<(), ArchiveError>) {
        let dir = tempfile::tempdir().unwrap();
        let result = receive(stream(entries).as_slice(), "d", &dir.path().join("to"));
        (dir, result)
    }

    const DIR: EntryType = EntryType::Directory;
    const FILE: EntryType = EntryType::Regular;
    const LINK: EntryType = EntryType::Symlink;

    #[test]
    fn names_without_end_and_padding_without_end_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("to");
        let refused = |stream: &mut dyn Read| {
            let error = receive(stream, "d", &to).unwrap_err();
            let ArchiveError::Stream(source) = error else { panic!("{error:?}") };
            assert!(source.to_string().contains("headers or padding"), "{source}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        };
        let mut long_name = Header::new_gnu();
        long_name.set_entry_type(EntryType::GNULongName);
        long_name.set_size(1 << 40);
        long_name.set_cksum();
        refused(&mut long_name.as_bytes().chain(io::repeat(b'd')));
        refused(&mut stream(&[("d", FILE, "text")]).as_slice().chain(io::repeat(0)));
    }

    #[test]
    fn what_is_or_leads_to_a_device_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("stdout");
        std::os::unix::fs::symlink("/dev/null", &link).unwrap();
        let result = receive(stream(&[("d", FILE, "text")]).as_slice(), "d", &link);
        assert!(matches!(result, Err(ArchiveError::Exists(_))), "{result:?}");
        assert!(link.is_symlink());
    }

    #[test]
    fn a_tree_arrives_under_its_new_name_without_set_id_bits() {
        let (dir, result) = received(&[
            ("d", DIR, ""),
            ("d/f", FILE, "text"),
            ("d/l", LINK, "/etc/passwd"),
            ("d/h", EntryType::Link, "d/f"),
        ]);
        result.unwrap();
        let to = dir.path().join("to");
        assert_eq!(std::fs::read_to_string(to.join("f")).unwrap(), "text");
        assert_eq!(std::fs::read_to_string(to.join("h")).unwrap(), "text");
        assert_eq!(std::fs::read_link(to.join("l")).unwrap(), Path::new("/etc/passwd"));
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(to.join("f")).unwrap().permissions());
        assert_eq!(mode & 0o7777, 0o755);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn nothing_leads_out_of_the_copy() {
        for entries in [
            vec![("../evil", FILE, "x")],
            vec![("/evil", FILE, "x")],
            vec![("d/../../evil", FILE, "x")],
            vec![("other", FILE, "x")],
            vec![("d", DIR, ""), ("d/l", LINK, ".."), ("d/l/evil", FILE, "x")],
            vec![("d", DIR, ""), ("d/l", LINK, "/tmp"), ("d/l/evil", FILE, "x")],
            vec![("d", DIR, ""), ("d/h", EntryType::Link, "../../../etc/passwd")],
            vec![("d", LINK, ".."), ("d/evil", FILE, "x")],
            vec![("d", FILE, "x"), ("d/f", FILE, "x")],
        ] {
            let (dir, result) = received(&entries);
            assert!(result.is_err(), "{entries:?}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{entries:?}");
        }
    }

    #[test]
    fn a_link_is_never_written_through() {
        let (dir, result) = received(&[("d", DIR, ""), ("d/l", LINK, "../../target"), ("d/l", FILE, "x")]);
        assert!(matches!(result, Err(ArchiveError::File { .. })));
        assert!(!dir.path().join("target").exists());
    }

    #[test]
    fn an_empty_or_broken_stream_is_an_error() {
        assert!(matches!(received(&[]).1, Err(ArchiveError::Empty)));
        let dir = tempfile::tempdir().unwrap();
        let whole = stream(&[("d", FILE, "text")]);
        let result = receive(&mut &whole[..600], "d", &dir.path().join("to"));
        assert!(result.is_err());
    }
}
