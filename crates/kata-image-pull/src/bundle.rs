//! A pulled image as a bundle: `rootfs`, an overlay of the image's layers and a writable one, and `config.json`.
//!
//! ```text
//!   <work_dir>/roots/<id>/0, 1, 2 …   links to the layers, topmost first: short names for the mount call
//!                         upper, work  the writable layer
//!   <bundle>/rootfs                    the overlay, whose source is called image-pull-<id>
//! ```
//!
//! Nobody says when a bundle is over: its overlay is unmounted. What no mount needs any more is removed before the next pull.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Component, Path, PathBuf};

use kata_oci::{Digest, Image, ImageConfig, Interrupt, RootStack, User};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::{Value, json};

use crate::mounts::Mounts;
use crate::words::sentence;

/// Where programs are looked for when the image does not say.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A bundle that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// Somewhere that bundles are not.
    #[error("{} is no place for a bundle: it has to be an absolute path below {}", path.display(), bundles.display())]
    Place {
        /// As it was asked for.
        path: PathBuf,
        /// Where they are.
        bundles: PathBuf,
    },
    /// There is one already.
    #[error("{} is a bundle already", .0.display())]
    Exists(PathBuf),
    /// The image has no layers.
    #[error("the image has no layers: there is nothing to run in it")]
    Empty,
    /// The caller is no longer interested.
    #[error("interrupted while the bundle was made")]
    Interrupted,
    /// The system said no.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl BundleError {
    fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, path: path.to_owned(), source }
    }
}

/// A bundle to be.
#[derive(Clone, Debug)]
pub struct Bundle {
    dir: PathBuf,
    id: String,
    roots: PathBuf,
}

impl Bundle {
    /// The one at `path`, which has to be below `bundles` and not where layers are.
    ///
    /// # Errors
    /// [`BundleError::Place`].
    pub fn at(path: &str, bundles: &Path, work_dir: &Path) -> Result<Self, BundleError> {
        let dir = Path::new(path);
        let plain = dir.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_)));
        let below = dir.strip_prefix(bundles).is_ok_and(|rest| rest.components().next().is_some());
        if !plain || !below || dir.starts_with(work_dir) || work_dir.starts_with(dir) || path.contains('\0') {
            return Err(BundleError::Place { path: dir.to_owned(), bundles: bundles.to_owned() });
        }
        let dir: PathBuf = dir.components().collect();
        let id = Digest::of(dir.as_os_str().as_encoded_bytes()).hex().chars().take(32).collect();
        Ok(Self { dir, id, roots: roots(work_dir) })
    }

    /// What tells it from others.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Mounts `image` and describes it. Blocks.
    ///
    /// # Errors
    /// [`BundleError`]; nothing is mounted then, and the bundle's directory may stay.
    pub fn make(&self, image: &Image, interrupt: &Interrupt) -> Result<(), BundleError> {
        let rootfs = self.dir.join("rootfs");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&rootfs)
            .map_err(BundleError::system("create", &rootfs))?;
        let rootfs = rootfs.canonicalize().map_err(BundleError::system("find", &rootfs))?;
        if Mounts::read()
            .map_err(BundleError::system("list the mounts of", Path::new("/proc/self")))?
            .at(&rootfs)
        {
            return Err(BundleError::Exists(self.dir.clone()));
        }
        let place = self.roots.join(&self.id);
        let made = self.fill(&place, image).and_then(|()| {
            self.mount(&place, &rootfs, image.layers.len())?;
            let described = self.describe(image).and_then(|()| match interrupt.is_set() {
                true => Err(BundleError::Interrupted),
                false => Ok(()),
            });
            if described.is_err() {
                let unmounted =
                    rustix::mount::unmount(&rootfs, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
                unmounted.map_err(|error| BundleError::system("unmount", &rootfs)(error.into()))?;
            }
            described
        });
        if made.is_err()
            && let Err(error) = remove(&place)
        {
            tracing::warn!("{}", sentence(&error));
        }
        made
    }

    /// The writable layer, and short names for those of the image.
    fn fill(&self, place: &Path, image: &Image) -> Result<(), BundleError> {
        let top = image.layers.first().ok_or(BundleError::Empty)?;
        // What a service that was killed has left.
        remove(place)?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(place)
            .map_err(BundleError::system("create", place))?;
        for (index, layer) in image.layers.iter().enumerate() {
            let link = place.join(index.to_string());
            symlink(layer, &link).map_err(BundleError::system("create", &link))?;
        }
        let (upper, work) = (place.join("upper"), place.join("work"));
        kata_oci::writable_layer(top, &upper, &work).map_err(BundleError::system("create", &upper))
    }

    fn mount(&self, place: &Path, rootfs: &Path, layers: usize) -> Result<(), BundleError> {
        let lower: Vec<String> = (0..layers).map(|index| index.to_string()).collect();
        let options = format!("lowerdir={},upperdir=upper,workdir=work", lower.join(":"));
        let source = source(&self.id);
        let mount = || -> io::Result<()> {
            // All options have to fit into a page: the links are named relative to a directory that only this thread is in.
            // SAFETY: the thread ends with this closure; no other code relies on it sharing its working directory.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }?;
            std::env::set_current_dir(place)?;
            let options = std::ffi::CString::new(options)?;
            Ok(rustix::mount::mount(source, rootfs, "overlay", MountFlags::empty(), options.as_c_str())?)
        };
        let fault = BundleError::system("mount the image at", rootfs);
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().spawn_scoped(scope, mount)?;
            thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread for it panicked")))
        })
        .map_err(fault)
    }

    fn describe(&self, image: &Image) -> Result<(), BundleError> {
        let path = self.dir.join("config.json");
        let text = spec(&image.config, &RootStack(image.layers.clone())).to_string();
        let part = self.dir.join(".config.json.part");
        fs::write(&part, text).map_err(BundleError::system("write", &part))?;
        fs::rename(&part, &path).map_err(BundleError::system("write", &path))
    }
}

fn roots(work_dir: &Path) -> PathBuf {
    work_dir.join("roots")
}

fn source(id: &str) -> String {
    format!("image-pull-{id}")
}

/// Removes the writable layers that no mount needs any more; `busy` says which are being made.
///
/// # Errors
/// The mounts cannot be listed, or something cannot be removed.
pub fn sweep(work_dir: &Path, busy: impl Fn(&str) -> bool) -> Result<(), BundleError> {
    let roots = roots(work_dir);
    // Before the mounts: one that is made in between is busy, or there.
    let entries = match fs::read_dir(&roots) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries.map_err(BundleError::system("list", &roots))?,
    };
    let ids: Vec<String> = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let idle: Vec<&String> = ids.iter().filter(|id| !busy(id)).collect();
    let mounts =
        Mounts::read().map_err(BundleError::system("list the mounts of", Path::new("/proc/self")))?;
    for id in idle {
        if !mounts.from(&source(id)) {
            remove(&roots.join(id))?;
        }
    }
    Ok(())
}

fn remove(dir: &Path) -> Result<(), BundleError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(BundleError::system("remove", dir)(error))
        }
        _ => Ok(()),
    }
}

/// The image's own idea of a container, as an OCI runtime specification. A user that the image does not know leaves no
/// process to run: as somebody else it must not.
fn spec(config: &ImageConfig, root: &RootStack) -> Value {
    let mut spec = json!({ "ociVersion": "1.1.0", "root": { "path": "rootfs" } });
    let image = config.config.clone().unwrap_or_default();
    let user = match User::resolve(image.user.as_deref().unwrap_or_default(), root) {
        Ok(user) => user,
        Err(error) => {
            tracing::warn!(
                "the image's user is unknown, and config.json has no process: {}",
                sentence(&error)
            );
            return spec;
        }
    };
    let mut env = image.env.unwrap_or_default();
    if !env.iter().any(|variable| variable.starts_with("PATH=")) {
        env.push(PATH.to_owned());
    }
    let args: Vec<String> =
        image.entrypoint.into_iter().flatten().chain(image.cmd.into_iter().flatten()).collect();
    let cwd = image.working_dir.filter(|dir| !dir.is_empty()).unwrap_or_else(|| "/".to_owned());
    let process = json!({
        "args": args, "env": env, "cwd": cwd,
        "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
    });
    if let Some(spec) = spec.as_object_mut() {
        spec.insert("process".to_owned(), process);
    }
    spec
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Result<Bundle, BundleError> {
        Bundle::at(path, Path::new("/run/c"), Path::new("/run/c/image"))
    }

    #[test]
    fn bundles_are_below_their_directory_and_not_among_the_layers() {
        for good in ["/run/c/x", "/run/c/x/y", "/run/c//x/"] {
            assert!(at(good).is_ok(), "{good}");
        }
        for bad in ["", "/", "x", "/run/c", "/run/c/", "/run/c/../d", "/run/c/x/../../y", "/run/cc/x"] {
            assert!(matches!(at(bad), Err(BundleError::Place { .. })), "{bad}");
        }
        for bad in ["/run/c/image", "/run/c/image/layers", "/run/c/x\0y"] {
            assert!(matches!(at(bad), Err(BundleError::Place { .. })), "{bad}");
        }
        assert_eq!(at("/run/c/x").unwrap().id(), at("/run/c//x/").unwrap().id());
    }

    #[test]
    fn the_image_says_what_runs() {
        let config = json!({ "config": {
            "User": "7:8", "Entrypoint": ["/e"], "Cmd": ["c"], "Env": ["A=b"], "WorkingDir": "/w",
        }});
        let config: ImageConfig = serde_json::from_value(config).unwrap();
        let text = spec(&config, &RootStack::default());
        let parsed: oci_spec::runtime::Spec = serde_json::from_value(text).unwrap();
        let process = parsed.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["/e", "c"]);
        assert_eq!(process.env().as_ref().unwrap(), &["A=b", PATH]);
        assert_eq!((process.user().uid(), process.user().gid()), (7, 8));
        assert_eq!(process.cwd(), Path::new("/w"));
    }

    #[test]
    fn a_user_whom_the_image_does_not_know_is_not_root() {
        let config: ImageConfig = serde_json::from_value(json!({ "config": { "User": "web" } })).unwrap();
        assert_eq!(spec(&config, &RootStack::default()).get("process"), None);
    }
}
