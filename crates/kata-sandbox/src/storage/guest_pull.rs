//! Roots that the guest pulls by itself: of such an image the host knows the name, and has no part of it to share.
//!
//! | asked by | |
//! |---|---|
//! | the snapshotter | a mount of the root has the option `io.katacontainers.volume=BASE64`, JSON with `"volume_type":"image_guest_pull"` |
//! | the configuration | `runtime.experimental = ["force_guest_pull"]`: whatever mounts the root has are not looked at |
//!
//! The name is in an annotation of whoever speaks CRI. The pod's own container needs no image: the agent has a pause. For any other,
//! the guest image has to have a service that pulls, which its manifest says; with extensions only the guest knows.

use std::collections::{BTreeMap, HashMap};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use kata_api::agent::Storage;
use kata_config::{Artefacts, Config};
use kata_image::manifest::{Need, capability};
use serde::{Deserialize, Serialize};

use super::StorageError;
use super::rootfs;
use crate::boot::image;
use crate::pod::RootfsMount;

/// The mount option of snapshotters that mean the guest.
const OPTION: &str = "io.katacontainers.volume=";
/// What the option calls a root that the guest pulls, and what the agent calls the driver.
const DRIVER: &str = "image_guest_pull";
/// What asks for it, as users find it.
const BY_SNAPSHOTTER: &str = "a snapshotter that leaves images to the guest (io.katacontainers.volume)";
const BY_CONFIGURATION: &str = "runtime.experimental = [\"force_guest_pull\"]";
/// Where containerd and CRI-O write the image's name.
pub(super) const IMAGE_NAME: [&str; 2] = ["io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName"];
/// Where they write whose container it is, and what they call a pod's own.
const CONTAINER_TYPE: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOX: &str = "sandbox";
/// What stands for the image of a pod's own container.
const PAUSE: &str = "pause";

/// An image that the guest is to pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pull {
    image: String,
    is_pods_own: bool,
    asked_by: &'static str,
    /// For the service that pulls.
    metadata: BTreeMap<String, String>,
}

/// The option's text. Upstream's has more, for other kinds.
#[derive(Deserialize)]
struct Volume {
    volume_type: String,
    #[serde(default)]
    image_pull: Option<Details>,
}

/// The part that goes to the agent as it is.
#[derive(Default, Serialize, Deserialize)]
struct Details {
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
}

impl Pull {
    /// What `mounts` ask for, or `forced` does, for a container with these annotations.
    pub(crate) fn asked(
        mounts: &[RootfsMount],
        forced: bool,
        annotations: Option<&HashMap<String, String>>,
    ) -> Result<Option<Self>, StorageError> {
        let options = mounts.iter().flat_map(|mount| &mount.options);
        let volume = options.filter_map(|option| option.strip_prefix(OPTION)).next();
        let (details, asked_by) = match volume {
            Some(text) => (parse(text)?, BY_SNAPSHOTTER),
            None if forced => (Details::default(), BY_CONFIGURATION),
            None => return Ok(None),
        };
        let annotation = |keys: &[&str]| keys.iter().find_map(|key| annotations?.get(*key)).cloned();
        let kind = annotation(&CONTAINER_TYPE);
        let is_pods_own = kind.as_deref() == Some(SANDBOX);
        let name = if is_pods_own { Some(PAUSE.to_owned()) } else { annotation(&IMAGE_NAME) };
        let image = name.filter(|name| !name.is_empty()).ok_or(StorageError::NoImageName)?;
        let mut metadata = details.metadata.unwrap_or_default();
        metadata.extend(kind.map(|kind| (CONTAINER_TYPE[0].to_owned(), kind)));
        Ok(Some(Self { image, is_pods_own, asked_by, metadata }))
    }

    /// Refuses a guest image that is known to have nothing that pulls. The agent would, too: once the machine has booted, and
    /// without the image's name.
    pub(crate) fn require(&self, config: &Config, artefacts: &Artefacts) -> Result<(), StorageError> {
        if self.is_pods_own || !config.hypervisor.qemu.guest_extension_images.is_empty() {
            return Ok(());
        }
        match image::manifest(config, artefacts)? {
            Some(manifest) => Ok(manifest.require(Need::new(capability::GUEST_PULL, self.asked_by))?),
            None => Ok(()),
        }
    }

    /// The image's name.
    pub(crate) fn image(&self) -> &str {
        &self.image
    }

    /// What the agent is to have pulled.
    pub(crate) fn storage(&self, container: &str) -> Storage {
        let details = serde_json::json!({ "metadata": self.metadata });
        Storage {
            driver: DRIVER.to_owned(),
            driver_options: vec![format!("{DRIVER}={details}")],
            source: self.image.clone(),
            fstype: "overlay".to_owned(),
            mount_point: rootfs::root(container),
            ..Default::default()
        }
    }
}

fn parse(text: &str) -> Result<Details, StorageError> {
    let invalid = |reason: String| StorageError::VirtualVolume(reason);
    let json = STANDARD.decode(text).map_err(|error| invalid(format!("it is not base64: {error}")))?;
    let volume: Volume =
        serde_json::from_slice(&json).map_err(|error| invalid(format!("it cannot be read: {error}")))?;
    if volume.volume_type != DRIVER {
        return Err(StorageError::VirtualVolumeKind(volume.volume_type));
    }
    Ok(volume.image_pull.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(option: &str) -> Vec<RootfsMount> {
        let options = vec!["lowerdir=/a:/b".to_owned(), option.to_owned()];
        vec![RootfsMount { fs_type: "fuse.nydus-overlayfs".into(), options, ..Default::default() }]
    }

    fn encoded(json: &str) -> Vec<RootfsMount> {
        mount(&format!("{OPTION}{}", STANDARD.encode(json)))
    }

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    const NAMED: [(&str, &str); 2] = [
        ("io.kubernetes.cri.container-type", "container"),
        ("io.kubernetes.cri.image-name", "docker.io/a:1"),
    ];

    #[test]
    fn a_snapshotter_asks_for_a_pull_by_an_option_of_a_mount() {
        let mounts = encoded(
            r#"{"volume_type":"image_guest_pull","source":"dummy","fs_type":"","options":[],
            "image_pull":{"metadata":{"k":"v"}}}"#,
        );
        let pull = Pull::asked(&mounts, false, Some(&annotations(&NAMED))).unwrap().unwrap();
        let storage = pull.storage("c1");
        assert_eq!(storage.source, "docker.io/a:1");
        assert_eq!((storage.driver.as_str(), storage.fstype.as_str()), ("image_guest_pull", "overlay"));
        assert_eq!(storage.mount_point, "/run/kata-containers/c1/rootfs");
        let expected =
            r#"image_guest_pull={"metadata":{"io.kubernetes.cri.container-type":"container","k":"v"}}"#;
        assert_eq!(storage.driver_options, [expected]);
    }

    #[test]
    fn a_pods_own_container_needs_no_image() {
        let own = annotations(&[
            ("io.kubernetes.cri-o.ContainerType", "sandbox"),
            ("io.kubernetes.cri-o.ImageName", "registry/pause"),
        ]);
        let storage = Pull::asked(&[], true, Some(&own)).unwrap().unwrap().storage("p");
        assert_eq!(storage.source, "pause");
        assert!(storage.driver_options[0].contains(r#""io.kubernetes.cri.container-type":"sandbox""#));
    }

    #[test]
    fn the_configuration_asks_for_it_whatever_the_mounts_are() {
        let plain = mount("rw");
        assert_eq!(Pull::asked(&plain, false, Some(&annotations(&NAMED))).unwrap(), None);
        let pull = Pull::asked(&plain, true, Some(&annotations(&NAMED))).unwrap().unwrap();
        assert_eq!(pull.image(), "docker.io/a:1");
    }

    #[test]
    fn an_image_without_a_name_is_an_error() {
        for annotations in [None, Some(annotations(&[])), Some(annotations(&[(IMAGE_NAME[0], "")]))] {
            let error = Pull::asked(&[], true, annotations.as_ref()).unwrap_err();
            assert!(matches!(error, StorageError::NoImageName), "{error}");
        }
    }

    #[test]
    fn a_volume_of_another_kind_and_one_that_is_none_are_told_apart() {
        let error = Pull::asked(&encoded(r#"{"volume_type":"layer_nydus_fs"}"#), false, None).unwrap_err();
        assert!(
            matches!(&error, StorageError::VirtualVolumeKind(kind) if kind == "layer_nydus_fs"),
            "{error}"
        );
        for mounts in [mount("io.katacontainers.volume=%"), encoded("{"), encoded("[]")] {
            let error = Pull::asked(&mounts, true, None).unwrap_err();
            assert!(matches!(error, StorageError::VirtualVolume(_)), "{error}");
        }
    }
}
