//! Who a container's process runs as: names are those of the image, from its own /etc/passwd and /etc/group.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Longest /etc/passwd or /etc/group that is read.
const LIMIT: u64 = 8 << 20;

/// Where a bundle says what its root file system is made of.
const FILE: &str = "root.json";

/// The directories that make up a root file system, topmost first.
#[derive(Clone, Debug, Default)]
pub struct RootStack(pub Vec<PathBuf>);

impl RootStack {
    /// Writes itself into the bundle in `dir`: an exec resolves users, too.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn store(&self, dir: &Path) -> io::Result<()> {
        std::fs::write(dir.join(FILE), serde_json::to_vec(&self.0)?)
    }

    /// Reads what was written into the bundle in `dir`; one of containerd's is its mounted root file system alone.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn load(dir: &Path) -> Result<Self, UserError> {
        let path = dir.join(FILE);
        let read = || match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(vec![dir.join("rootfs")]),
            text => Ok(serde_json::from_slice(&text?)?),
        };
        read().map(Self).map_err(|source| UserError::Read { path: path.clone(), source })
    }

    /// The file at `path` (relative to the root), as the topmost layer that has it shows it. Links are followed within a
    /// layer, and never out of it.
    fn read(&self, path: &str) -> Result<Option<String>, UserError> {
        for layer in &self.0 {
            let fault = |source: io::Error| UserError::Read { path: layer.join(path), source };
            let root =
                rustix::fs::open(layer, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|error| fault(error.into()))?;
            // Not blocking: a layer may have a FIFO there.
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
            let file = match rustix::fs::openat2(&root, path, flags, Mode::empty(), resolve) {
                Ok(fd) => File::from(fd),
                // A whiteout is a device without a driver.
                Err(Errno::NXIO | Errno::NODEV) => return Ok(None),
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                Err(error) => return Err(fault(error.into())),
            };
            let metadata = file.metadata().map_err(fault)?;
            if metadata.file_type().is_char_device() && metadata.rdev() == 0 {
                return Ok(None);
            }
            if !metadata.is_file() {
                return Err(fault(io::Error::other("not a file")));
            }
            let mut bytes = Vec::new();
            file.take(LIMIT).read_to_end(&mut bytes).map_err(fault)?;
            return Ok(Some(String::from_utf8_lossy(&bytes).into_owned()));
        }
        Ok(None)
    }
}

/// A user with all that follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
    /// Home directory.
    pub home: String,
}

/// A user or group that the image does not know.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// No such user.
    #[error("the image's /etc/passwd has no user {0:?}")]
    NoUser(String),
    /// No such group.
    #[error("the image's /etc/group has no group {0:?}")]
    NoGroup(String),
    /// A number that is none.
    #[error("{0:?} is not a user or group id")]
    Id(String),
    /// The files cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl User {
    /// Resolves `user`, `uid`, `user:group` or any mix; empty is root. A number needs no entry in the files.
    ///
    /// # Errors
    /// [`UserError`].
    pub fn resolve(text: &str, root: &RootStack) -> Result<Self, UserError> {
        let (name, group) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
        let name = if name.is_empty() { "0" } else { name };
        let passwd = root.read("etc/passwd")?.unwrap_or_default();
        let groups = root.read("etc/group")?.unwrap_or_default();
        let number = id(name)?;
        let account = passwd.lines().filter_map(Account::parse).find(|account| match number {
            Some(number) => account.uid == number,
            None => account.name == name,
        });
        let uid = account.as_ref().map(|account| account.uid).or(number);
        let uid = uid.ok_or_else(|| UserError::NoUser(name.to_owned()))?;
        let gid = match group.filter(|group| !group.is_empty()) {
            Some(group) => group_id(group, &groups)?,
            None => account.as_ref().map_or(0, |account| account.gid),
        };
        // With a group given, that one replaces the user's memberships.
        let member = account.as_ref().filter(|_| group.is_none()).map(|account| account.name);
        Ok(Self {
            uid,
            gid,
            groups: member.map_or_else(Vec::new, |name| memberships(name, gid, &groups)),
            home: account
                .map(|account| account.home)
                .filter(|home| !home.is_empty())
                .unwrap_or("/")
                .to_owned(),
        })
    }
}

/// A line of /etc/passwd (passwd(5)).
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty() && !name.starts_with('#'))?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some(Self { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    }
}

/// Name, id and members of the lines of /etc/group (group(5)).
fn group_lines(text: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn group_id(group: &str, text: &str) -> Result<u32, UserError> {
    if let Some(number) = id(group)? {
        return Ok(number);
    }
    let found = group_lines(text).find(|(name, _, _)| *name == group).map(|(_, gid, _)| gid);
    found.ok_or_else(|| UserError::NoGroup(group.to_owned()))
}

fn memberships(user: &str, primary: u32, text: &str) -> Vec<u32> {
    let of_user = group_lines(text).filter(|(_, _, members)| members.split(',').any(|member| member == user));
    let mut groups: Vec<u32> = of_user.map(|(_, gid, _)| gid).filter(|gid| *gid != primary).collect();
    groups.sort_unstable();
    groups.dedup();
    groups
}

/// `None` where `text` is a name. Ids end below 2³¹: what is above has no portable meaning.
fn id(text: &str) -> Result<Option<u32>, UserError> {
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Ok(None);
    }
    let number = text.parse().ok().filter(|number| *number <= i32::MAX.unsigned_abs());
    number.map(Some).ok_or_else(|| UserError::Id(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:Web:/var/www:/bin/false\n# comment\nbroken\nodd:x:1:1::\n";
    const GROUP: &str = "root:x:0:\nweb:x:44:\nstaff:x:50:web,other\naudio:x:29:web\nweb2:x:44:web\n";

    fn root() -> (tempfile::TempDir, RootStack) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), PASSWD).unwrap();
        std::fs::write(dir.path().join("etc/group"), GROUP).unwrap();
        let stack = RootStack(vec![dir.path().to_owned()]);
        (dir, stack)
    }

    fn resolved(text: &str) -> Result<(u32, u32, Vec<u32>, String), UserError> {
        let (_dir, root) = root();
        User::resolve(text, &root).map(|user| (user.uid, user.gid, user.groups, user.home))
    }

    #[test]
    fn a_name_brings_group_memberships_and_home() {
        assert_eq!(resolved("web").unwrap(), (33, 44, vec![29, 50], "/var/www".to_owned()));
    }

    #[test]
    fn a_number_with_an_entry_is_that_user() {
        assert_eq!(resolved("33").unwrap(), resolved("web").unwrap());
    }

    #[test]
    fn a_number_without_an_entry_is_allowed() {
        assert_eq!(resolved("4711").unwrap(), (4711, 0, vec![], "/".to_owned()));
        assert_eq!(resolved("4711:12").unwrap(), (4711, 12, vec![], "/".to_owned()));
    }

    #[test]
    fn a_given_group_replaces_the_memberships() {
        assert_eq!(resolved("web:staff").unwrap(), (33, 50, vec![], "/var/www".to_owned()));
        assert_eq!(resolved("web:7").unwrap().1, 7);
        assert_eq!(resolved(":staff").unwrap(), (0, 50, vec![], "/root".to_owned()));
    }

    #[test]
    fn nothing_is_root() {
        assert_eq!(resolved("").unwrap(), (0, 0, vec![], "/root".to_owned()));
    }

    #[test]
    fn what_the_image_does_not_know_is_named() {
        assert!(matches!(resolved("nobody"), Err(UserError::NoUser(name)) if name == "nobody"));
        assert!(matches!(resolved("web:games"), Err(UserError::NoGroup(name)) if name == "games"));
        assert!(matches!(resolved("99999999999"), Err(UserError::Id(_))));
    }

    #[test]
    fn an_image_without_the_files_has_numbers_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = RootStack(vec![dir.path().to_owned()]);
        assert_eq!(User::resolve("", &root).unwrap().home, "/");
        assert_eq!(User::resolve("5", &root).unwrap().uid, 5);
        assert!(User::resolve("web", &root).is_err());
    }

    #[test]
    fn the_topmost_layer_with_the_file_counts() {
        let (_below, mut stack) = root();
        let above = tempfile::tempdir().unwrap();
        std::fs::create_dir(above.path().join("etc")).unwrap();
        std::fs::write(above.path().join("etc/passwd"), "web:x:1000:1000::/home/web:\n").unwrap();
        stack.0.insert(0, above.path().to_owned());
        assert_eq!(User::resolve("web", &stack).unwrap().uid, 1000);
        assert_eq!(User::resolve("web:staff", &stack).unwrap().gid, 50);
    }

    #[test]
    fn a_link_out_of_the_image_stays_in_it() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("etc/passwd")).unwrap();
        let root = RootStack(vec![dir.path().to_owned()]);
        assert!(User::resolve("web", &root).is_err());
        std::fs::write(dir.path().join("etc/hostname"), "web:x:7:7::/:\n").unwrap();
        assert_eq!(User::resolve("web", &root).unwrap().uid, 7);
    }
}
