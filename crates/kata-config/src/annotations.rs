//! The pod's annotations: the last layer, and the only one that the administrator did not write.
//!
//! ```text
//!  io.katacontainers.config.hypervisor.default_memory = "512"
//!    ├ known?      a key has this annotation                       else: unknown, with the nearest
//!    ├ opened?     hypervisor.qemu.enable_annotations lists it     else: denied, with what to list
//!    ├ typed       the text as the key's type                      else: what is wrong with it
//!    ├ reach       a path: below a listed root, through no link    else: denied, with the list
//!    └▶ the key, as if a file had it
//! ```
//!
//! Nothing is open by default. Upstream opens five: see docs/adr/0004.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use regex_lite::Regex;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use toml::de::DeValue;

use crate::deprecation::Surface;
use crate::error::{Fault, Origin};
use crate::keys::{self, Key, Kind, OWN_DRIVER, PREFIX, Place, Reach, Separator};
use crate::layers::Layers;
use crate::settings::Qemu;

/// The key that opens annotations to pods.
pub(crate) const ENABLE: &str = "hypervisor.qemu.enable_annotations";

/// An annotation of upstream's that sets no key.
#[derive(Clone, Copy, Debug)]
pub struct Other {
    /// Full name.
    pub name: &'static str,
    /// What it does there.
    pub doc: &'static str,
    /// Whether it would change the configuration, so that a pod that has it is refused.
    pub refused: bool,
}

const fn refused(name: &'static str, doc: &'static str) -> Other {
    Other { name, doc, refused: true }
}

const fn passed_over(name: &'static str, doc: &'static str) -> Other {
    Other { name, doc, refused: false }
}

/// Every annotation of upstream's that sets no key.
pub const OTHERS: &[Other] = &[
    refused("io.katacontainers.config.hypervisor.kernel_hash", "Digest that the annotated kernel must have."),
    refused("io.katacontainers.config.hypervisor.image_hash", "Digest that the annotated image must have."),
    refused(
        "io.katacontainers.config.hypervisor.initrd_hash",
        "Digest that the annotated initramfs must have.",
    ),
    refused(
        "io.katacontainers.config.hypervisor.firmware_hash",
        "Digest that the annotated firmware must have.",
    ),
    refused(
        "io.katacontainers.config.hypervisor.firmware_volume_hash",
        "Digest that the annotated firmware volume must have.",
    ),
    refused(
        "io.katacontainers.config.hypervisor.path_hash",
        "Digest that the annotated machine monitor must have.",
    ),
    refused("io.katacontainers.config.hypervisor.jailer_hash", "Digest that the annotated jailer must have."),
    refused("io.katacontainers.config.hypervisor.asset_hash_type", "Algorithm of those digests."),
    refused("io.katacontainers.config.hypervisor.prefetch_files.list", "File with what is to be read ahead."),
    passed_over(
        "io.katacontainers.pkg.oci.bundle_path",
        "Written by upstream's runtime: a container's bundle.",
    ),
    passed_over(
        "io.katacontainers.pkg.oci.container_type",
        "Written by upstream's runtime: sandbox or container.",
    ),
    passed_over(
        "io.katacontainers.container.resource.swappiness",
        "A container's swappiness; there is no swap in guests yet.",
    ),
    passed_over(
        "io.katacontainers.container.resource.swap_in_bytes",
        "A container's swap; there is no swap in guests yet.",
    ),
    passed_over("io.katacontainers.volume.overlayfs.create_directory", "Written by snapshotters."),
];

/// The key that an annotation sets, by its full name.
pub fn key_of(name: &str) -> Option<&'static Key> {
    let group = name.strip_prefix(PREFIX)?;
    keys::all().find(|key| key.annotation_group().is_some_and(|own| own == group))
}

/// A pattern of [`ENABLE`], for the whole of a name: `path` does not open `vhost_user_store_path`.
pub(crate) fn pattern(pattern: &str) -> Result<Regex, regex_lite::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

/// The patterns that are none, each with its key and what is wrong with it.
pub(crate) fn bad_patterns(qemu: &Qemu) -> Vec<(&'static str, String)> {
    let mut bad = Vec::new();
    for (index, text) in qemu.enable_annotations.iter().enumerate() {
        let error = pattern(text).err();
        bad.extend(error.map(|error| (ENABLE, format!("item {}: {text:?}: {error}", index + 1))));
    }
    for (key, globs) in [
        ("hypervisor.qemu.valid_hypervisor_paths", &qemu.valid_hypervisor_paths),
        ("hypervisor.qemu.valid_virtio_fs_daemon_paths", &qemu.valid_virtio_fs_daemon_paths),
        ("hypervisor.qemu.valid_entropy_sources", &qemu.valid_entropy_sources),
        ("hypervisor.qemu.valid_asset_paths", &qemu.valid_asset_paths),
    ] {
        for (index, text) in globs.iter().enumerate() {
            let error = glob::Pattern::new(text).err();
            bad.extend(error.map(|error| (key, format!("item {}: {text:?}: {error}", index + 1))));
        }
    }
    bad
}

/// What to write into `enable_annotations` for this annotation.
pub fn listing(name: &str) -> &str {
    let group = name.strip_prefix(PREFIX).unwrap_or(name);
    group.strip_prefix("hypervisor.").unwrap_or(group)
}

/// What the administrator opened to pods. It is taken before their annotations are read: none of them may open another, or a path,
/// for itself.
pub(crate) struct Opened {
    /// Patterns of names.
    names: Vec<String>,
    lists: Lists,
}

impl Opened {
    pub(crate) fn by(qemu: &Qemu) -> Self {
        let lists = Lists {
            programs: qemu.valid_hypervisor_paths.clone(),
            daemons: qemu.valid_virtio_fs_daemon_paths.clone(),
            entropy: qemu.valid_entropy_sources.clone(),
            assets: qemu.valid_asset_paths.clone(),
        };
        Self { names: qemu.enable_annotations.clone(), lists }
    }
}

/// Lays the annotations over the other layers.
pub(crate) fn apply(layers: &mut Layers, opened: &Opened, annotations: &BTreeMap<String, String>) {
    for (name, text) in annotations.iter().filter(|(name, _)| name.starts_with("io.katacontainers.")) {
        let origin = Origin::Annotation(name.clone());
        let path = key_of(name).map(Key::own_path).unwrap_or_default();
        if layers.departed(Surface::Annotation, name, &path, &DeValue::String(text.into()), &origin) {
            continue;
        }
        match read(name, text, opened) {
            Ok(Some((key, value))) => {
                layers.write(&key.own_path(), Place { key, read: true }, &value, origin);
            }
            Ok(None) => {}
            Err(fault) => layers.fault(origin, &path, fault),
        }
    }
}

fn read<'a>(
    name: &str,
    text: &'a str,
    opened: &Opened,
) -> Result<Option<(&'static Key, DeValue<'a>)>, Fault> {
    let Some(key) = key_of(name) else { return unknown(name).map_or(Ok(None), Err) };
    if !is_open(listing(name), key.reach, &opened.names) {
        return Err(Fault::Denied { listing: listing(name).to_owned(), list: ENABLE.to_owned() });
    }
    let value = typed(key, text)?;
    key.kind.check(&value)?;
    if let Reach::Path(list) | Reach::Program(list) = key.reach
        && !text.is_empty()
    {
        opened.lists.check(list, Path::new(text))?;
    }
    Ok(Some((key, value)))
}

/// The fault of an annotation that sets no key, if it is about the configuration at all.
fn unknown(name: &str) -> Option<Fault> {
    if let Some(other) = OTHERS.iter().find(|other| other.name == name) {
        return other.refused.then_some(Fault::Planned { default: None });
    }
    if !name.starts_with(PREFIX) {
        return None;
    }
    let names: Vec<String> = keys::all().filter_map(Key::annotation_name).collect();
    let nearest = keys::nearest(name, names.iter().map(String::as_str)).map(str::to_owned);
    Some(Fault::UnknownAnnotation { nearest })
}

fn is_open(name: &str, reach: Reach, open: &[String]) -> bool {
    match reach {
        // Whoever wrote `.*` did not think of programs.
        Reach::Program(_) | Reach::Arguments => open.iter().any(|listed| listed == name),
        Reach::Guest | Reach::Path(_) => {
            open.iter().filter_map(|listed| pattern(listed).ok()).any(|pattern| pattern.is_match(name))
        }
    }
}

/// An annotation's text as a value of the key's type.
fn typed<'a>(key: &Key, text: &'a str) -> Result<DeValue<'a>, Fault> {
    let wrong = || Fault::WrongType { expected: key.kind.name(), found: "other text" };
    let string = |text: &'a str| DeValue::String(text.into());
    match key.kind {
        Kind::Boolean => text.parse().map(DeValue::Boolean).map_err(|_| wrong()),
        Kind::Integer { .. } | Kind::Number { .. } => {
            let value = DeValue::parse(text.trim()).map_err(|_| wrong())?.into_inner();
            if value.is_integer() || value.is_float() { Ok(value) } else { Err(wrong()) }
        }
        Kind::List => {
            let list = |parts: Vec<&'a str>| {
                let parts = parts.into_iter().map(str::trim).filter(|part| !part.is_empty());
                parts.map(|part| toml::Spanned::new(0..0, string(part))).collect::<Vec<_>>()
            };
            Ok(DeValue::Array(match key.separator {
                Separator::Blank => list(text.split_whitespace().collect()).into_iter().collect(),
                Separator::Semicolon => list(text.split(';').collect()).into_iter().collect(),
                // A JSON array of strings is a TOML array of strings, but for escapes that nobody needs here.
                Separator::Json => {
                    return DeValue::parse(text).map(toml::Spanned::into_inner).map_err(|_| wrong());
                }
            }))
        }
        Kind::Text | Kind::Path | Kind::Word(_) => Ok(string(text)),
        Kind::Tables => Err(wrong()),
    }
}

/// What the administrator lets annotations name, by the key that lists it.
struct Lists {
    programs: Vec<String>,
    daemons: Vec<String>,
    entropy: Vec<String>,
    assets: Vec<String>,
}

impl Lists {
    fn check(&self, list: &str, path: &Path) -> Result<(), Fault> {
        let patterns: &[String] = match list {
            "valid_hypervisor_paths" => &self.programs,
            "valid_virtio_fs_daemon_paths" => &self.daemons,
            "valid_entropy_sources" => &self.entropy,
            "valid_asset_paths" => &self.assets,
            // Lists that this version does not read are empty.
            _ => &[],
        };
        let denied = |why: String| Fault::PathDenied {
            path: path.to_owned(),
            list: format!("hypervisor.{OWN_DRIVER}.{list}"),
            why,
        };
        if path.components().any(|part| part == Component::ParentDir) {
            return Err(denied("it holds \"..\"".to_owned()));
        }
        // As glob(3) has it, a star stops at a slash and does not find hidden files.
        let options = glob::MatchOptions {
            case_sensitive: true,
            require_literal_separator: true,
            require_literal_leading_dot: true,
        };
        let matches = |pattern: &&String| {
            glob::Pattern::new(pattern).is_ok_and(|pattern| pattern.matches_path_with(path, options))
        };
        let pattern =
            patterns.iter().find(matches).ok_or_else(|| denied("no pattern matches it".to_owned()))?;
        reachable(&root_of(pattern), path).map_err(|error| denied(error.to_string()))
    }
}

/// The directory that a pattern's matches lie below: what comes before the first part with a wildcard, and not the last part.
fn root_of(pattern: &str) -> PathBuf {
    let literal = |part: &Component<'_>| !part.as_os_str().to_string_lossy().contains(['*', '?', '[']);
    let mut root: PathBuf = Path::new(pattern).components().take_while(literal).collect();
    if root == Path::new(pattern) {
        root.pop();
    }
    root
}

/// Whether `path` is there below `root`, with no symbolic link on the way. A link in `root` itself is the administrator's.
fn reachable(root: &Path, path: &Path) -> std::io::Result<()> {
    let below = path.strip_prefix(root).map_err(|_| std::io::Error::other("it is outside"))?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, flags | OFlags::DIRECTORY, Mode::empty())?;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    rustix::fs::openat2(root, below, flags, Mode::empty(), resolve)?;
    Ok(())
}

#[cfg(test)]
mod tests;
