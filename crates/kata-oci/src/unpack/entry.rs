//! Owner, mode, extended attributes and times of an entry.

use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{self, AtFlags, Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;
use tar::EntryType;

use super::UnpackError;
use super::tree::{name_of, system_error, through_fd};

/// How tar writers name extended attributes in PAX headers.
const PAX_XATTR: &str = "SCHILY.xattr.";

/// What a tar entry says beside path, kind and content.
pub struct Attributes {
    uid: Uid,
    gid: Gid,
    mode: u32,
    time: Timespec,
    xattrs: Vec<(String, Vec<u8>)>,
    /// Major and minor number, for devices.
    pub device: (u32, u32),
}

impl Attributes {
    pub fn of(entry: &mut tar::Entry<'_, impl Read>, path: &Path) -> Result<Self, UnpackError> {
        let invalid = |what: &'static str| move |source: io::Error| system_error(what, path, source);
        let header = entry.header();
        let id = |id: u64| u32::try_from(id).map_err(|_| io::Error::other("an id beyond 32 bits"));
        let major = header.device_major().ok().flatten().unwrap_or(0);
        let minor = header.device_minor().ok().flatten().unwrap_or(0);
        let seconds = header.mtime().map_err(invalid("read the time of"))?;
        let mut attributes = Self {
            uid: Uid::from_raw(header.uid().and_then(id).map_err(invalid("read the owner of"))?),
            gid: Gid::from_raw(header.gid().and_then(id).map_err(invalid("read the group of"))?),
            mode: header.mode().map_err(invalid("read the mode of"))? & 0o7777,
            time: Timespec { tv_sec: i64::try_from(seconds).unwrap_or(i64::MAX), tv_nsec: 0 },
            xattrs: Vec::new(),
            device: (major, minor),
        };
        if let Some(extensions) = entry.pax_extensions().map_err(invalid("read the PAX header of"))? {
            for extension in extensions {
                let extension = extension.map_err(invalid("read the PAX header of"))?;
                attributes.extend(extension.key_bytes(), extension.value_bytes());
            }
        }
        Ok(attributes)
    }

    fn extend(&mut self, key: &[u8], value: &[u8]) {
        let Ok(key) = std::str::from_utf8(key) else { return };
        if key == "mtime" {
            self.time = std::str::from_utf8(value).ok().and_then(parse_time).unwrap_or(self.time);
        }
        let Some(name) = key.strip_prefix(PAX_XATTR) else { return };
        // Overlayfs takes these for its own, and would follow them anywhere.
        if !name.starts_with("trusted.overlay.") && !name.starts_with("user.overlay.") {
            self.xattrs.push((name.to_owned(), value.to_vec()));
        }
    }

    /// Sets everything; the times of directories are for [`apply_times`](Self::apply_times), later.
    pub fn apply(&self, dir: &OwnedFd, path: &Path, kind: EntryType) -> Result<(), UnpackError> {
        let name = name_of(path);
        fs::chownat(dir, name, Some(self.uid), Some(self.gid), AtFlags::SYMLINK_NOFOLLOW)
            .map_err(UnpackError::system("set the owner of", path))?;
        if kind != EntryType::Symlink {
            // After the owner: changing that clears the set-id bits. What was just made is no link to follow.
            fs::chmodat(dir, name, Mode::from_raw_mode(self.mode), AtFlags::empty())
                .map_err(UnpackError::system("set the mode of", path))?;
        }
        for (key, value) in &self.xattrs {
            match fs::lsetxattr(through_fd(dir, name), key.as_str(), value, XattrFlags::empty()) {
                Err(Errno::OPNOTSUPP) => {
                    tracing::warn!(path = %path.display(), key, "the file system does not keep this attribute");
                }
                set => set.map_err(UnpackError::system("set an extended attribute of", path))?,
            }
        }
        if kind == EntryType::Directory { Ok(()) } else { self.apply_times(dir, path) }
    }

    pub fn apply_times(&self, dir: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
        let times = Timestamps { last_access: self.time, last_modification: self.time };
        match fs::utimensat(dir, name_of(path), &times, AtFlags::SYMLINK_NOFOLLOW) {
            // A later entry replaced the directory.
            Err(Errno::NOENT) => Ok(()),
            set => set.map_err(UnpackError::system("set the time of", path)),
        }
    }
}

/// `[-]seconds[.fraction]`, of which nine digits count.
fn parse_time(text: &str) -> Option<Timespec> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let tv_sec: i64 = seconds.parse().ok()?;
    let digits: String = fraction.chars().chain(std::iter::repeat('0')).take(9).collect();
    let nanoseconds: i64 = digits.parse().ok()?;
    // -1.25 is 1.25 seconds before the epoch: nanoseconds count forward.
    match seconds.starts_with('-') && nanoseconds > 0 {
        true => Some(Timespec { tv_sec: tv_sec - 1, tv_nsec: 1_000_000_000 - nanoseconds }),
        false => Some(Timespec { tv_sec, tv_nsec: nanoseconds }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_keep_their_fraction_and_sign() {
        let parsed = |text| parse_time(text).map(|t| (t.tv_sec, t.tv_nsec));
        assert_eq!(parsed("1700000000"), Some((1_700_000_000, 0)));
        assert_eq!(parsed("5.25"), Some((5, 250_000_000)));
        assert_eq!(parsed("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(parsed("0.1234567891"), Some((0, 123_456_789)));
        assert_eq!(parsed("soon"), None);
    }
}
