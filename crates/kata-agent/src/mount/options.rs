//! The words of an fstab or OCI option list, taken apart into what the mount calls want.

use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags};

/// An option list, split by who consumes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountOptions {
    /// Per-mount and superblock flags (`MS_*`). For a bind they take effect with a remount.
    pub flags: MountFlags,
    /// Whether this is a bind mount (`bind` or `rbind`).
    pub bind: bool,
    /// Whether a bind takes along the mounts below its source (`rbind`).
    pub recursive: bool,
    /// Propagation to set once the mount exists, `REC` included where asked (`rslave`).
    pub propagation: Option<MountPropagationFlags>,
    /// Attributes to set on the whole mount tree, for `mount_setattr(2)` (`rro`, `rnosuid`, …).
    pub recursive_set: MountAttrFlags,
    /// Attributes to clear on the whole mount tree (`rrw`, `rsuid`, …).
    pub recursive_clear: MountAttrFlags,
    /// What is left for the filesystem, comma separated.
    pub data: String,
    /// `tmpcopyup`: fill a new tmpfs with what the mount point held.
    pub copy_up: bool,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            flags: MountFlags::empty(),
            bind: false,
            recursive: false,
            propagation: None,
            recursive_set: MountAttrFlags::empty(),
            recursive_clear: MountAttrFlags::empty(),
            data: String::new(),
            copy_up: false,
        }
    }
}

/// Sorts `options` into flags, propagation, tree attributes and filesystem data. A later word wins over an earlier one.
///
/// No word is an error: what is not known here is the filesystem's, which refuses what it does not know either.
#[must_use]
pub fn parse(options: &[String]) -> MountOptions {
    let mut parsed = MountOptions::default();
    let mut data: Vec<&str> = Vec::new();
    for word in options.iter().map(|option| option.trim()).filter(|option| !option.is_empty()) {
        let known = parsed.apply_kind(word)
            || parsed.apply_flag(word)
            || parsed.apply_propagation(word)
            || parsed.apply_recursive(word);
        if !known && !is_noise(word) {
            data.push(word);
        }
    }
    parsed.data = data.join(",");
    parsed
}

/// Words that mean something to mount(8) and nothing to the kernel.
fn is_noise(word: &str) -> bool {
    matches!(word, "defaults" | "auto" | "noauto" | "user" | "nouser" | "users" | "_netdev" | "nofail")
        || word.starts_with("x-")
}

impl MountOptions {
    fn apply_kind(&mut self, word: &str) -> bool {
        match word {
            "bind" => self.bind = true,
            "rbind" => (self.bind, self.recursive) = (true, true),
            "tmpcopyup" => self.copy_up = true,
            _ => return false,
        }
        true
    }

    fn apply_flag(&mut self, word: &str) -> bool {
        let atime = MountFlags::NOATIME | MountFlags::RELATIME | MountFlags::STRICTATIME;
        let (set, clear) = match word {
            "ro" => (MountFlags::RDONLY, MountFlags::empty()),
            "rw" => (MountFlags::empty(), MountFlags::RDONLY),
            "nosuid" => (MountFlags::NOSUID, MountFlags::empty()),
            "suid" => (MountFlags::empty(), MountFlags::NOSUID),
            "nodev" => (MountFlags::NODEV, MountFlags::empty()),
            "dev" => (MountFlags::empty(), MountFlags::NODEV),
            "noexec" => (MountFlags::NOEXEC, MountFlags::empty()),
            "exec" => (MountFlags::empty(), MountFlags::NOEXEC),
            "sync" => (MountFlags::SYNCHRONOUS, MountFlags::empty()),
            "async" => (MountFlags::empty(), MountFlags::SYNCHRONOUS),
            "dirsync" => (MountFlags::DIRSYNC, MountFlags::empty()),
            "lazytime" => (MountFlags::LAZYTIME, MountFlags::empty()),
            "nolazytime" => (MountFlags::empty(), MountFlags::LAZYTIME),
            "mand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, MountFlags::empty()),
            "nomand" => (MountFlags::empty(), MountFlags::PERMIT_MANDATORY_FILE_LOCKING),
            "noatime" => (MountFlags::NOATIME, atime),
            "relatime" => (MountFlags::RELATIME, atime),
            "strictatime" => (MountFlags::STRICTATIME, atime),
            "atime" => (MountFlags::empty(), MountFlags::NOATIME),
            "norelatime" => (MountFlags::empty(), MountFlags::RELATIME),
            "nostrictatime" => (MountFlags::empty(), MountFlags::STRICTATIME),
            "nodiratime" => (MountFlags::NODIRATIME, MountFlags::empty()),
            "diratime" => (MountFlags::empty(), MountFlags::NODIRATIME),
            "nosymfollow" => (MountFlags::NOSYMFOLLOW, MountFlags::empty()),
            "symfollow" => (MountFlags::empty(), MountFlags::NOSYMFOLLOW),
            "silent" => (MountFlags::SILENT, MountFlags::empty()),
            "loud" => (MountFlags::empty(), MountFlags::SILENT),
            _ => return false,
        };
        self.flags = (self.flags - clear) | set;
        true
    }

    fn apply_propagation(&mut self, word: &str) -> bool {
        let (kind, tree) = match word.strip_prefix('r') {
            Some(kind) => (kind, MountPropagationFlags::REC),
            None => (word, MountPropagationFlags::empty()),
        };
        let propagation = match kind {
            "private" => MountPropagationFlags::PRIVATE,
            "shared" => MountPropagationFlags::SHARED,
            "slave" => MountPropagationFlags::DOWNSTREAM,
            "unbindable" => MountPropagationFlags::UNBINDABLE,
            _ => return false,
        };
        self.propagation = Some(propagation | tree);
        true
    }

    fn apply_recursive(&mut self, word: &str) -> bool {
        let atime = MountAttrFlags::MOUNT_ATTR__ATIME;
        let none = MountAttrFlags::empty();
        let (set, clear) = match word {
            "rro" => (MountAttrFlags::MOUNT_ATTR_RDONLY, none),
            "rrw" => (none, MountAttrFlags::MOUNT_ATTR_RDONLY),
            "rnosuid" => (MountAttrFlags::MOUNT_ATTR_NOSUID, none),
            "rsuid" => (none, MountAttrFlags::MOUNT_ATTR_NOSUID),
            "rnodev" => (MountAttrFlags::MOUNT_ATTR_NODEV, none),
            "rdev" => (none, MountAttrFlags::MOUNT_ATTR_NODEV),
            "rnoexec" => (MountAttrFlags::MOUNT_ATTR_NOEXEC, none),
            "rexec" => (none, MountAttrFlags::MOUNT_ATTR_NOEXEC),
            "rnodiratime" => (MountAttrFlags::MOUNT_ATTR_NODIRATIME, none),
            "rdiratime" => (none, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
            // The three atime modes are one field: the kernel wants all of it cleared with any of them set.
            "rnoatime" => (MountAttrFlags::MOUNT_ATTR_NOATIME, atime),
            "rstrictatime" => (MountAttrFlags::MOUNT_ATTR_STRICTATIME, atime),
            "rrelatime" | "ratime" => (MountAttrFlags::MOUNT_ATTR_RELATIME, atime),
            "rnosymfollow" => (MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW, none),
            "rsymfollow" => (none, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
            _ => return false,
        };
        self.recursive_set = (self.recursive_set - clear) | set;
        self.recursive_clear = (self.recursive_clear - set) | clear;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &str) -> MountOptions {
        parse(&list.split(' ').map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn what_is_not_a_flag_goes_to_the_filesystem_in_order() {
        let parsed = words("nosuid mode=755 defaults size=65536k noexec x-systemd.automount");
        assert_eq!(parsed.flags, MountFlags::NOSUID | MountFlags::NOEXEC);
        assert_eq!(parsed.data, "mode=755,size=65536k");
    }

    #[test]
    fn a_later_word_wins() {
        assert!(!words("ro rw").flags.contains(MountFlags::RDONLY));
        assert!(words("rw ro").flags.contains(MountFlags::RDONLY));
        assert_eq!(words("noatime relatime").flags, MountFlags::RELATIME);
    }

    #[test]
    fn rbind_is_a_recursive_bind() {
        let parsed = words("rbind rslave");
        assert!(parsed.bind && parsed.recursive);
        assert_eq!(parsed.propagation, Some(MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC));
        assert!(!words("bind").recursive);
    }

    #[test]
    fn recursive_attributes_are_set_and_cleared_for_the_tree() {
        let parsed = words("rro rsuid rnoatime");
        assert_eq!(
            parsed.recursive_set,
            MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME
        );
        assert!(parsed.recursive_clear.contains(MountAttrFlags::MOUNT_ATTR_NOSUID));
        assert!(parsed.data.is_empty());
    }

    #[test]
    fn an_empty_list_is_the_default() {
        assert_eq!(parse(&[]), MountOptions::default());
    }
}
