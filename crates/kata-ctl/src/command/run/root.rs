//! The root file system of a container, and the mount that makes it.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use kata_oci::{Image, ProcessDefaults, RootStack};

use crate::pod::PodDir;

/// A root file system.
#[derive(Debug)]
pub enum Root {
    /// Layers, topmost first, under a writable one of the pod's own.
    Layers {
        /// The directories.
        layers: Vec<PathBuf>,
        /// How the image wants to be run.
        defaults: ProcessDefaults,
    },
    /// A directory of the user's: as it is, and changes are made in it.
    Dir(PathBuf),
}

/// A root file system that cannot be put together.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The image has no layers.
    #[error("the image has no layers: there is nothing to run in it")]
    Empty,
    /// Overlayfs splits its options at these characters.
    #[error("{} contains one of , : \\ and cannot be used for overlay mounts: choose another KATA_STATE_DIR", .0.display())]
    Unmountable(PathBuf),
    /// The writable layer cannot be made.
    #[error("cannot create {}", path.display())]
    Create {
        /// Its directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Root {
    /// Of an image.
    pub fn image(image: Image) -> Self {
        Self::Layers { layers: image.layers, defaults: image.config.config.unwrap_or_default() }
    }

    /// How the image wants to be run; nothing, for a directory.
    pub fn defaults(&self) -> &ProcessDefaults {
        static NOTHING: ProcessDefaults = ProcessDefaults {
            user: None,
            env: None,
            entrypoint: None,
            cmd: None,
            working_dir: None,
            stop_signal: None,
        };
        match self {
            Self::Layers { defaults, .. } => defaults,
            Self::Dir(_) => &NOTHING,
        }
    }

    /// The directories behind it, topmost first.
    pub fn stack(&self, pod: &PodDir) -> RootStack {
        match self {
            Self::Dir(dir) => RootStack(vec![dir.clone()]),
            Self::Layers { layers, .. } => {
                RootStack(std::iter::once(upper(pod)).chain(layers.iter().cloned()).collect())
            }
        }
    }

    /// Makes the writable layer, and tells the mount: type, source, options.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn mount(&self, pod: &PodDir) -> Result<(&'static str, String, Vec<String>), RootError> {
        create(&pod.state_dir, 0o700)?;
        let layers = match self {
            Self::Dir(dir) => {
                let options = ["rbind", "rw"].map(str::to_owned).to_vec();
                return Ok(("bind", dir.to_string_lossy().into_owned(), options));
            }
            Self::Layers { layers, .. } => layers,
        };
        let top = layers.first().ok_or(RootError::Empty)?;
        let (upper, work) = (upper(pod), pod.state_dir.join("work"));
        for dir in layers.iter().chain([&upper]) {
            if dir.to_string_lossy().contains([',', ':', '\\']) {
                return Err(RootError::Unmountable(dir.clone()));
            }
        }
        kata_oci::writable_layer(top, &upper, &work)
            .map_err(|source| RootError::Create { path: upper.clone(), source })?;
        let lower: Vec<_> = layers.iter().map(|layer| layer.to_string_lossy()).collect();
        let options = vec![
            format!("lowerdir={}", lower.join(":")),
            format!("upperdir={}", upper.display()),
            format!("workdir={}", work.display()),
        ];
        Ok(("overlay", "overlay".to_owned(), options))
    }
}

fn upper(pod: &PodDir) -> PathBuf {
    pod.state_dir.join("upper")
}

fn create(path: &Path, mode: u32) -> Result<(), RootError> {
    let made = DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|source| RootError::Create { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn pod(dir: &Path) -> PodDir {
        PodDir { name: "p".into(), run_dir: dir.join("run"), state_dir: dir.join("pods/p") }
    }

    fn layers(layers: Vec<PathBuf>) -> Root {
        Root::Layers { layers, defaults: ProcessDefaults::default() }
    }

    #[test]
    fn layers_become_one_overlay_mount_that_works() {
        let dir = tempfile::tempdir().unwrap();
        let (top, base, at) = (dir.path().join("top"), dir.path().join("base"), dir.path().join("at"));
        for dir in [&top, &base, &at] {
            fs::create_dir(dir).unwrap();
        }
        fs::set_permissions(&top, Permissions::from_mode(0o751)).unwrap();
        fs::write(top.join("file"), "top").unwrap();
        fs::write(base.join("file"), "base").unwrap();
        fs::write(base.join("other"), "base").unwrap();
        let (fs_type, source, options) = layers(vec![top, base]).mount(&pod(dir.path())).unwrap();
        let mounted = std::process::Command::new("unshare")
            .args(["-m", "sh", "-ec", r#"mount -t "$1" -o "$2" "$3" "$4"; cat "$4/file" "$4/other"; stat -c %a "$4"; echo new > "$4/new""#])
            .args(["sh", fs_type, &options.join(","), &source])
            .arg(&at)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&mounted.stderr).into_owned();
        if error.contains("denied") || error.contains("not permitted") {
            return eprintln!("skipped: mounting needs root: {error}");
        }
        assert_eq!(String::from_utf8_lossy(&mounted.stdout), "topbase751\n", "{error}");
        assert_eq!(fs::read_to_string(dir.path().join("pods/p/upper/new")).unwrap(), "new\n");
        assert_eq!(fs::metadata(dir.path().join("pods/p")).unwrap().mode() & 0o777, 0o700, "for root alone");
    }

    #[test]
    fn a_path_that_overlayfs_would_split_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a:b");
        assert!(matches!(layers(vec![odd]).mount(&pod(dir.path())), Err(RootError::Unmountable(_))));
        assert!(matches!(layers(vec![]).mount(&pod(dir.path())), Err(RootError::Empty)));
    }

    #[test]
    fn a_directory_is_used_as_it_is() {
        let (fs_type, source, _) =
            Root::Dir("/r".into()).mount(&pod(tempfile::tempdir().unwrap().path())).unwrap();
        assert_eq!((fs_type, source.as_str()), ("bind", "/r"));
    }
}
