//! Roots that the guest pulls, over a fake machine and a fake agent: what is known of the guest before it is asked.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod rig;

use kata_config::{ExtensionImage, Feature};
use kata_sandbox::{ContainerSpec, ErrorKind, RootfsMount, Stdio};
use rig::{Rig, soon};

const IMAGE_NAME: &str = "io.kubernetes.cri.image-name";
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// `{"volume_type":"image_guest_pull"}`
const OF_SNAPSHOTTER: &str = "io.katacontainers.volume=eyJ2b2x1bWVfdHlwZSI6ImltYWdlX2d1ZXN0X3B1bGwifQ==";

/// A pod whose images the guest is to pull, on an image that can do this.
async fn rig(capabilities: &[&'static str]) -> Option<Rig> {
    let mut rig = Rig::new().await?;
    rig.capabilities = capabilities.to_vec();
    rig.config.runtime.experimental = vec![Feature::ForceGuestPull];
    Some(rig)
}

fn container(rig: &Rig, annotations: &[(&str, &str)]) -> ContainerSpec {
    let mut container = rig.container("c", &["sleep"], Stdio::default());
    let pairs = annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    container.spec.set_annotations(Some(pairs.collect()));
    container
}

fn named(rig: &Rig) -> ContainerSpec {
    container(rig, &[(IMAGE_NAME, "docker.io/a:1")])
}

/// What the agent is asked to mount for a container of the pod, which it takes.
async fn asked(rig: &Rig, container: ContainerSpec) -> Vec<(String, String)> {
    let pod = rig.pod().await;
    pod.create_container(container).await.unwrap();
    let storages = rig.agent.created().remove(0).storages;
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
    storages.into_iter().map(|storage| (storage.driver, storage.source)).collect()
}

/// Why a container of the pod is refused. The agent is not asked.
async fn refused(rig: &Rig, container: ContainerSpec) -> (ErrorKind, String) {
    let pod = rig.pod().await;
    let error = pod.create_container(container).await.unwrap_err();
    assert!(rig.agent.created().is_empty());
    soon(pod.shutdown()).await.unwrap();
    rig.assert_clean().await;
    (error.kind(), error.chain())
}

fn pulled(image: &str) -> Vec<(String, String)> {
    vec![("image_guest_pull".to_owned(), image.to_owned())]
}

#[tokio::test]
async fn an_image_whose_guests_pull_is_asked_for_the_root() {
    let Some(rig) = rig(&["guest-pull"]).await else { return };
    assert_eq!(asked(&rig, named(&rig)).await, pulled("docker.io/a:1"));
}

#[tokio::test]
async fn an_image_whose_guests_do_not_pull_is_refused_with_who_asks_and_which_can() {
    let Some(rig) = rig(&["extensions", "guest-services"]).await else { return };
    let (kind, text) = refused(&rig, named(&rig)).await;
    assert_eq!(kind, ErrorKind::Unimplemented, "{text}");
    for words in ["no guest-pull", "force_guest_pull", "--flavour services --image-pull"] {
        assert!(text.contains(words), "no `{words}` in: {text}");
    }
}

#[tokio::test]
async fn a_snapshotter_that_asks_for_it_is_named() {
    let Some(mut rig) = rig(&[]).await else { return };
    rig.config.runtime.experimental.clear();
    let mut container = named(&rig);
    let options = vec![OF_SNAPSHOTTER.to_owned()];
    container.rootfs = vec![RootfsMount { fs_type: "overlay".into(), options, ..Default::default() }];
    let (kind, text) = refused(&rig, container).await;
    assert_eq!(kind, ErrorKind::Unimplemented, "{text}");
    assert!(text.contains("no guest-pull") && text.contains("io.katacontainers.volume"), "{text}");
}

#[tokio::test]
async fn with_an_extension_only_the_guest_knows_whether_something_pulls() {
    let Some(mut rig) = rig(&["extensions"]).await else { return };
    let verity = format!(
        "root_hash={},salt=00,data_blocks=1,data_block_size=4096,hash_block_size=4096",
        "a".repeat(64)
    );
    let image = ExtensionImage { name: "puller".into(), path: "/puller.img".into(), verity_params: verity };
    rig.config.hypervisor.qemu.guest_extension_images = vec![image];
    assert_eq!(asked(&rig, named(&rig)).await, pulled("docker.io/a:1"));
}

#[tokio::test]
async fn the_pods_own_container_pauses_in_any_guest() {
    let Some(rig) = rig(&[]).await else { return };
    let own = container(&rig, &[(CONTAINER_TYPE, "sandbox")]);
    assert_eq!(asked(&rig, own).await, pulled("pause"));
}

#[tokio::test]
async fn a_root_of_the_users_own_is_asked() {
    let Some(mut rig) = rig(&[]).await else { return };
    rig.config.hypervisor.qemu.initrd = Some(rig.dir.path().join("image/initrd"));
    assert_eq!(asked(&rig, named(&rig)).await, pulled("docker.io/a:1"));
}
