#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicU64, Ordering};

use virtiofsd::read_dir::ReadDir;

use super::*;

const TRUST: Duration = Duration::from_secs(1);

/// Each name is a file of its own, with the number that the name spells.
#[derive(Default)]
struct Names {
    forgotten: AtomicU64,
}

impl FileSystem for Names {
    type Inode = u64;
    type Handle = u64;
    type DirIter = ReadDir<Vec<u8>>;

    fn lookup(&self, _: Context, _: u64, name: &CStr) -> io::Result<Entry> {
        Ok(Entry {
            inode: name.to_str().unwrap().parse().map_err(|_| io::ErrorKind::NotFound)?,
            generation: 0,
            attr: fuse::Attr::default(),
            attr_timeout: TRUST,
            entry_timeout: TRUST,
        })
    }

    fn create(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        _: u32,
        _: bool,
        _: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        Ok((self.lookup(ctx, parent, name)?, None, OpenOptions::empty()))
    }

    fn forget(&self, _: Context, _: u64, count: u64) {
        self.forgotten.fetch_add(count, Ordering::Relaxed);
    }
}

fn caller() -> Context {
    Context { uid: 0.into(), gid: 0.into(), pid: 0 }
}

fn bounded(bound: usize) -> Bounded<Names> {
    Bounded::new(Names::default(), bound)
}

/// How long the guest may trust a name.
fn look(fs: &Bounded<Names>, inode: u64) -> Duration {
    let name = std::ffi::CString::new(inode.to_string()).unwrap();
    fs.lookup(caller(), fuse::ROOT_ID, &name).unwrap().entry_timeout
}

#[test]
fn names_within_the_bound_are_kept_and_others_get_no_time() {
    let fs = bounded(2);
    assert_eq!([10, 11, 12].map(|inode| look(&fs, inode)), [TRUST, TRUST, Duration::ZERO]);
    // One that is known makes room too, when it is used again.
    assert_eq!(look(&fs, 10), Duration::ZERO);
}

#[test]
fn what_the_guest_forgets_makes_room() {
    let fs = bounded(2);
    for inode in [10, 11, 11, 12] {
        look(&fs, inode);
    }
    fs.forget(caller(), 11, 1);
    assert_eq!(look(&fs, 12), Duration::ZERO, "11 was told twice");
    fs.batch_forget(caller(), vec![(11, 1), (12, 2)]);
    assert_eq!(look(&fs, 13), TRUST);
    assert_eq!(fs.fs.forgotten.load(Ordering::Relaxed), 4, "the file system hears of each");
}

#[test]
fn file_that_is_made_counts_and_one_that_is_not_there_does_not() {
    let fs = bounded(1);
    assert!(fs.lookup(caller(), fuse::ROOT_ID, c"absent").is_err());
    assert_eq!(look(&fs, 0), TRUST, "an entry that says there is none");
    let extensions = Extensions::default();
    let made = fs.create(caller(), fuse::ROOT_ID, c"10", 0, false, 0, 0, extensions).unwrap();
    assert_eq!(made.0.entry_timeout, TRUST);
    assert_eq!(look(&fs, 11), Duration::ZERO);
}

#[test]
fn guest_that_begins_anew_knows_nothing() {
    let fs = bounded(1);
    look(&fs, 10);
    fs.destroy();
    assert_eq!(look(&fs, 11), TRUST);
    fs.init(FsOptions::empty()).unwrap();
    assert_eq!(look(&fs, 12), TRUST);
}

/// A guest that keeps what it is told for a time, uses some of it, and lies about what it forgets.
#[test]
fn names_with_time_are_never_more_than_the_bound_whatever_the_guest_says() {
    const BOUND: usize = 8;
    let fs = bounded(BOUND);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut told = BTreeMap::<u64, u64>::new();
    let mut trusted = std::collections::BTreeSet::new();
    for _ in 0..20_000 {
        let inode = random() % 32 + 2;
        match random() % 4 {
            0 | 1 => {
                *told.entry(inode).or_default() += 1;
                if look(&fs, inode) == TRUST {
                    trusted.insert(inode)
                } else {
                    trusted.remove(&inode)
                };
            }
            2 => {
                let count = told.remove(&inode).unwrap_or_default();
                trusted.remove(&inode);
                fs.forget(caller(), inode, count);
            }
            // Of something that it was never told.
            _ => fs.batch_forget(caller(), vec![(inode + 1000, random()), (fuse::ROOT_ID, u64::MAX)]),
        }
        assert!(trusted.len() <= BOUND);
        assert_eq!(fs.known().0, told);
    }
}
