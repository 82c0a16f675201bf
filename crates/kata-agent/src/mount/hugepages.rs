//! Huge pages for volumes of them.
//!
//! A `hugetlbfs` gives its files pages that the kernel has set aside before. The guest's kernel has none at boot: each
//! volume has as many set aside as it may hold, and they go with it.

use std::path::{Path, PathBuf};

use super::error::StorageError;

const POOLS: &str = "/sys/kernel/mm/hugepages";
/// What such a file system is called.
pub(super) const FILE_SYSTEM: &str = "hugetlbfs";

/// Pages that were set aside for one volume.
#[derive(Debug)]
pub(super) struct Reserved {
    pool: PathBuf,
    pages: u64,
}

impl Reserved {
    /// Sets aside what a file system with these options (`pagesize=`, `size=`, in bytes or with K, M, G) may hold.
    pub(super) fn new(point: &Path, options: &[String]) -> Result<Self, StorageError> {
        Self::from(Path::new(POOLS), point, options)
    }

    fn from(pools: &Path, point: &Path, options: &[String]) -> Result<Self, StorageError> {
        let invalid =
            |reason: String| StorageError::Invalid { mount_point: point.display().to_string(), reason };
        let amount = |key: &str| {
            let text = options.iter().find_map(|option| option.strip_prefix(key));
            let text = text.ok_or_else(|| invalid(format!("huge pages need the option {key}")))?;
            bytes(text).ok_or_else(|| invalid(format!("{key}{text} is no amount")))
        };
        let (page, size) = (amount("pagesize=")?, amount("size=")?);
        let pool = pools.join(format!("hugepages-{}kB", page / 1024)).join("nr_hugepages");
        if !pool.exists() {
            return Err(invalid(format!("the guest's kernel has no pages of {page} bytes")));
        }
        let pages = size.div_ceil(page.max(1));
        let before = read(&pool)?;
        let reserved = Self { pool, pages };
        reserved.set(before.saturating_add(pages))?;
        let there = read(&reserved.pool)?.saturating_sub(before);
        if there < pages {
            // The kernel gives what it can find, and says nothing.
            reserved.set(before)?;
            return Err(invalid(format!(
                "the guest has memory for {there} of {pages} pages of {page} bytes: give the pod more memory"
            )));
        }
        Ok(reserved)
    }

    /// Gives the pages back, once no file holds them.
    pub(super) fn release(&self) -> Result<(), StorageError> {
        self.set(read(&self.pool)?.saturating_sub(self.pages))
    }

    fn set(&self, pages: u64) -> Result<(), StorageError> {
        let failed = super::error::system("setting the number of", &self.pool);
        std::fs::write(&self.pool, pages.to_string()).map_err(failed)
    }
}

fn read(pool: &Path) -> Result<u64, StorageError> {
    let failed = super::error::system("reading the number of", pool);
    let text = std::fs::read_to_string(pool).map_err(&failed)?;
    text.trim().parse().map_err(|_| failed(std::io::ErrorKind::InvalidData.into()))
}

/// An amount as mount options write it.
fn bytes(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'k' | b'K' => (text.get(..text.len() - 1)?, 10),
        b'm' | b'M' => (text.get(..text.len() - 1)?, 20),
        b'g' | b'G' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| *bytes > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("hugepages-2048kB")).unwrap();
        std::fs::write(dir.path().join("hugepages-2048kB/nr_hugepages"), "3\n").unwrap();
        dir
    }

    fn options(words: &[&str]) -> Vec<String> {
        words.iter().map(|word| (*word).to_owned()).collect()
    }

    #[test]
    fn pages_are_added_to_those_of_others_and_taken_away_again() {
        let dir = pools();
        let wanted = options(&["pagesize=2M", "size=5242880"]);
        let reserved = Reserved::from(dir.path(), Path::new("/x"), &wanted).unwrap();
        let count = || read(&dir.path().join("hugepages-2048kB/nr_hugepages")).unwrap();
        assert_eq!(count(), 6);
        reserved.release().unwrap();
        assert_eq!(count(), 3);
    }

    #[test]
    fn what_names_no_pool_or_no_amount_is_invalid() {
        let dir = pools();
        for wrong in [
            &["pagesize=2M"][..],
            &["size=2M"],
            &["pagesize=2M", "size=0"],
            &["pagesize=1G", "size=1G"],
            &["pagesize=two", "size=2M"],
            &["pagesize=2M", "size=99999999999999G"],
        ] {
            let error = Reserved::from(dir.path(), Path::new("/x"), &options(wrong)).unwrap_err();
            assert!(matches!(error, StorageError::Invalid { .. }), "{wrong:?}: {error}");
        }
    }
}
