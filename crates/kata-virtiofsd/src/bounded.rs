//! A bound on the files that the guest keeps in mind.
//!
//! ```text
//!   guest: walks a tree ── LOOKUP ──▶  known < bound   keep the name for a while    stays a descriptor here until FORGET
//!                                      known ≥ bound   keep it for no time at all   FORGET follows its last use at once
//! ```
//!
//! The server has a descriptor for each inode that the guest's kernel knows, and the kernel gives none back before it is short
//! of memory; the server cannot ask it to, since virtio-fs has no way for notices. What it does control is how long a name may
//! be trusted: Linux drops a name of virtio-fs whose time is over with its last user, and the inode with it. So a name that
//! would be one too many gets no time. One that is known already gets none either when it is looked up again, which makes room
//! for what is used now.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;

/// A file system whose guest keeps at most `bound` inodes beside those that it uses.
pub struct Bounded<F> {
    fs: F,
    bound: usize,
    known: Mutex<Known>,
}

/// The inodes that the guest knows, each with how often it was told so.
#[derive(Debug, Default)]
struct Known(BTreeMap<u64, u64>);

impl Known {
    fn told(&mut self, inode: u64) {
        let times = self.0.entry(inode).or_default();
        *times = times.saturating_add(1);
    }

    /// The counts are the guest's word: what it was never told is no news.
    fn forgotten(&mut self, inode: u64, count: u64) {
        if let Some(times) = self.0.get_mut(&inode) {
            *times = times.saturating_sub(count);
            if *times == 0 {
                self.0.remove(&inode);
            }
        }
    }
}

impl<F> Bounded<F> {
    pub fn new(fs: F, bound: usize) -> Self {
        Self { fs, bound, known: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what the guest is about to be told, and gives its name no time if it is one too many.
    fn told(&self, mut entry: Entry) -> Entry {
        let mut known = self.known();
        // Zero says that there is no such file.
        if entry.inode != 0 {
            known.told(entry.inode);
            if known.0.len() > self.bound {
                entry.entry_timeout = Duration::ZERO;
            }
        }
        entry
    }
}

/// Calls that tell of no inode. One that is missing here is answered with ENOSYS, by the trait's default.
macro_rules! pass {
    ($(fn $name:ident$(<$kind:ident: $bound:ident>)?($($arg:ident: $type:ty),* $(,)?) $(-> $answer:ty)?;)*) => {
        $(fn $name$(<$kind: $bound>)?(&self, $($arg: $type),*) $(-> $answer)? {
            self.fs.$name($($arg),*)
        })*
    };
}

/// Calls that answer with an inode.
macro_rules! tell {
    ($(fn $name:ident($($arg:ident: $type:ty),* $(,)?);)*) => {
        $(fn $name(&self, $($arg: $type),*) -> io::Result<Entry> {
            self.fs.$name($($arg),*).map(|entry| self.told(entry))
        })*
    };
}

impl<F: FileSystem<Inode = u64>> FileSystem for Bounded<F> {
    type Inode = u64;
    type Handle = F::Handle;
    type DirIter = F::DirIter;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.known().0.clear();
        self.fs.init(capable)
    }

    fn destroy(&self) {
        self.known().0.clear();
        self.fs.destroy();
    }

    fn forget(&self, ctx: Context, inode: u64, count: u64) {
        self.known().forgotten(inode, count);
        self.fs.forget(ctx, inode, count);
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(u64, u64)>) {
        let mut known = self.known();
        for (inode, count) in &requests {
            known.forgotten(*inode, *count);
        }
        drop(known);
        self.fs.batch_forget(ctx, requests);
    }

    tell! {
        fn lookup(ctx: Context, parent: u64, name: &CStr);
        fn symlink(ctx: Context, linkname: &CStr, parent: u64, name: &CStr, extensions: Extensions);
        fn mknod(
            ctx: Context, parent: u64, name: &CStr, mode: u32, rdev: u32, umask: u32, extensions: Extensions,
        );
        fn mkdir(ctx: Context, parent: u64, name: &CStr, mode: u32, umask: u32, extensions: Extensions);
        fn link(ctx: Context, inode: u64, newparent: u64, newname: &CStr);
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<F::Handle>, OpenOptions)> {
        let (entry, handle, options) =
            self.fs.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)?;
        Ok((self.told(entry), handle, options))
    }

    pass! {
        fn getattr(ctx: Context, inode: u64, handle: Option<F::Handle>) -> io::Result<(fuse::Attr, Duration)>;
        fn setattr(
            ctx: Context, inode: u64, attr: fuse::SetattrIn, handle: Option<F::Handle>, valid: SetattrValid,
        ) -> io::Result<(fuse::Attr, Duration)>;
        fn readlink(ctx: Context, inode: u64) -> io::Result<Vec<u8>>;
        fn unlink(ctx: Context, parent: u64, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: u64, name: &CStr) -> io::Result<()>;
        fn rename(
            ctx: Context, olddir: u64, oldname: &CStr, newdir: u64, newname: &CStr, flags: u32,
        ) -> io::Result<()>;
        fn open(
            ctx: Context, inode: u64, kill_priv: bool, flags: u32,
        ) -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn read<W: ZeroCopyWriter>(
            ctx: Context, inode: u64, handle: F::Handle, w: W, size: u32, offset: u64, lock_owner: Option<u64>,
            flags: u32,
        ) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(
            ctx: Context, inode: u64, handle: F::Handle, r: R, size: u32, offset: u64, lock_owner: Option<u64>,
            delayed_write: bool, kill_priv: bool, flags: u32,
        ) -> io::Result<usize>;
        fn flush(ctx: Context, inode: u64, handle: F::Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: u64, datasync: bool, handle: F::Handle) -> io::Result<()>;
        fn fallocate(
            ctx: Context, inode: u64, handle: F::Handle, mode: u32, offset: u64, length: u64,
        ) -> io::Result<()>;
        fn release(
            ctx: Context, inode: u64, flags: u32, handle: F::Handle, flush: bool, flock_release: bool,
            lock_owner: Option<u64>,
        ) -> io::Result<()>;
        fn statfs(ctx: Context, inode: u64) -> io::Result<libc::statvfs64>;
        fn setxattr(
            ctx: Context, inode: u64, name: &CStr, value: &[u8], flags: u32, extra_flags: SetxattrFlags,
        ) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: u64, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: u64, name: &CStr) -> io::Result<()>;
        fn opendir(ctx: Context, inode: u64, flags: u32) -> io::Result<(Option<F::Handle>, OpenOptions)>;
        fn readdir(ctx: Context, inode: u64, handle: F::Handle, size: u32, offset: u64) -> io::Result<F::DirIter>;
        fn fsyncdir(ctx: Context, inode: u64, datasync: bool, handle: F::Handle) -> io::Result<()>;
        fn releasedir(ctx: Context, inode: u64, flags: u32, handle: F::Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: u64, mask: u32) -> io::Result<()>;
        fn lseek(ctx: Context, inode: u64, handle: F::Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(
            ctx: Context, inode_in: u64, handle_in: F::Handle, offset_in: u64, inode_out: u64, handle_out: F::Handle,
            offset_out: u64, len: u64, flags: u64,
        ) -> io::Result<usize>;
        fn syncfs(ctx: Context, inode: u64) -> io::Result<()>;
    }
}

/// The trait's own: a server whose state could be moved to another is asked for by nobody, and is refused.
impl<F> SerializableFileSystem for Bounded<F> {}

#[cfg(test)]
mod tests;
