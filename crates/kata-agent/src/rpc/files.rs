//! Files copied into the guest, in chunks, and removed again, below the containers' directory and nowhere else.
//!
//! Every path is walked by the kernel with symbolic links refused (`openat2`), so what a container left lying there
//! cannot lead a copy astray. A regular file grows beside its place and is put there whole; so is a symbolic link, since
//! Kubernetes changes the whole of a volume by changing the one link that all names in it lead through.

use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use kata_api::agent::CopyFileRequest;
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, fstat, mkdirat,
    openat2, renameat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::error::RpcError;

const TEMPORARY: &str = ".partial";

/// Writes one chunk of a file below `base`; the last one puts the file in place. A mode of a directory or a symbolic
/// link makes that.
///
/// # Errors
/// A path outside of `base`, a chunk that does not fit, or what the system says.
pub fn copy(base: &Path, request: &CopyFileRequest) -> Result<(), RpcError> {
    let path = Path::new(&request.path);
    let (parents, name) = inside(base, path)?;
    let failed = |what| RpcError::file::<Errno>(what, path);
    std::fs::create_dir_all(base).map_err(RpcError::file("making directory", base))?;
    let root = open_base(base).map_err(failed("opening the base of"))?;
    let parent = make_parents(root, parents, request.dir_mode).map_err(failed("making the directory of"))?;
    let mode = Mode::from_raw_mode(request.file_mode & 0o7777);
    match FileType::from_raw_mode(request.file_mode) {
        FileType::Directory => {
            make_directory(&parent, name, mode, request).map_err(failed("making directory"))
        }
        FileType::Symlink => make_link(&parent, name, request).map_err(failed("making symbolic link")),
        FileType::RegularFile | FileType::Unknown => write_chunk(&parent, name, mode, request, path),
        other => Err(RpcError::Invalid(format!("{path:?}: a {other:?} cannot be copied"))),
    }
}

/// Removes what is at `path`, which is below `base`, with all that is in it. Nothing there is no failure.
///
/// # Errors
/// A path outside of `base`, or what the system says.
pub fn remove(base: &Path, path: &Path) -> Result<(), RpcError> {
    let (parents, name) = inside(base, path)?;
    let gone = |error: Errno| if error == Errno::NOENT { Ok(()) } else { Err(error) };
    let attempt = || -> Result<(), Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open_base(base)?;
        let parent = if parents.as_os_str().is_empty() {
            root
        } else {
            openat2(&root, parents, flags, Mode::empty(), confined())?
        };
        match unlinkat(&parent, name, AtFlags::empty()) {
            Err(Errno::ISDIR) => {}
            done => return done,
        }
        // The standard library follows no links on its way down either.
        let directory = Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(name);
        std::fs::remove_dir_all(directory).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    };
    attempt().or_else(gone).map_err(RpcError::file("removing", path))
}

/// The directories between `base` and what is called `path`, and its own name.
fn inside<'a>(base: &Path, path: &'a Path) -> Result<(&'a Path, &'a OsStr), RpcError> {
    let outside = || RpcError::Invalid(format!("{path:?} is not below {base:?}"));
    let below = path.strip_prefix(base).map_err(|_| outside())?;
    let plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    let (Some(name), true) = (below.file_name(), plain) else { return Err(outside()) };
    Ok((below.parent().unwrap_or_else(|| Path::new("")), name))
}

fn open_base(base: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat2(CWD, base, flags, Mode::empty(), ResolveFlags::empty())
}

fn confined() -> ResolveFlags {
    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS
}

fn make_parents(mut at: OwnedFd, parents: &Path, mode: u32) -> Result<OwnedFd, Errno> {
    let mode = if mode & 0o7777 == 0 { 0o755 } else { mode & 0o7777 };
    for part in parents.components() {
        let name = part.as_os_str();
        match mkdirat(&at, name, Mode::from_raw_mode(mode)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        at = openat2(&at, name, flags, Mode::empty(), confined())?;
    }
    Ok(at)
}

/// Negative ids leave the owner as it is.
fn owner(request: &CopyFileRequest) -> (Option<Uid>, Option<Gid>) {
    let id = |raw: i32| u32::try_from(raw).ok();
    (id(request.uid).map(Uid::from_raw), id(request.gid).map(Gid::from_raw))
}

fn make_directory(
    parent: &OwnedFd,
    name: &OsStr,
    mode: Mode,
    request: &CopyFileRequest,
) -> Result<(), Errno> {
    match mkdirat(parent, name, mode) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat2(parent, name, flags, Mode::empty(), confined())?;
    let (uid, gid) = owner(request);
    fchown(&directory, uid, gid)?;
    fchmod(&directory, mode)
}

fn make_link(parent: &OwnedFd, name: &OsStr, request: &CopyFileRequest) -> Result<(), Errno> {
    let mut growing = name.to_owned();
    growing.push(TEMPORARY);
    match unlinkat(parent, &growing, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    symlinkat(OsStr::from_bytes(&request.data), parent, &growing)?;
    let (uid, gid) = owner(request);
    chownat(parent, &growing, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    renameat(parent, &growing, parent, name)
}

fn write_chunk(
    parent: &OwnedFd,
    name: &OsStr,
    mode: Mode,
    request: &CopyFileRequest,
    path: &Path,
) -> Result<(), RpcError> {
    let failed = |what| RpcError::file::<Errno>(what, path);
    let misfit = || {
        RpcError::Invalid(format!("{path:?}: the chunk does not fit a file of {} bytes", request.file_size))
    };
    let size = u64::try_from(request.file_size).map_err(|_| misfit())?;
    let offset = u64::try_from(request.offset).map_err(|_| misfit())?;
    let length = u64::try_from(request.data.len()).map_err(|_| misfit())?;
    let end = offset.checked_add(length).filter(|end| *end <= size).ok_or_else(misfit)?;
    let mut growing = name.to_owned();
    growing.push(TEMPORARY);
    // A pipe that lies there must not make the agent wait for its reader.
    let mut flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if offset == 0 {
        flags |= OFlags::TRUNC;
    }
    let file = openat2(parent, &growing, flags, Mode::from_raw_mode(0o600), confined())
        .map_err(failed("creating"))?;
    let there = fstat(&file).map_err(failed("looking at"))?;
    if FileType::from_raw_mode(there.st_mode) != FileType::RegularFile {
        return Err(RpcError::Invalid(format!("{growing:?} lies beside {path:?} and is no regular file")));
    }
    write_at(&file, &request.data, offset).map_err(failed("writing"))?;
    if end < size {
        return Ok(());
    }
    let (uid, gid) = owner(request);
    fchown(&file, uid, gid).map_err(failed("setting the owner of"))?;
    fchmod(&file, mode).map_err(failed("setting the mode of"))?;
    renameat(parent, &growing, parent, name).map_err(failed("putting in place"))
}

fn write_at(file: impl AsFd, mut data: &[u8], mut offset: u64) -> Result<(), Errno> {
    while !data.is_empty() {
        let written = rustix::io::pwrite(&file, data, offset)?;
        data = data.get(written..).unwrap_or_default();
        offset += u64::try_from(written).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
