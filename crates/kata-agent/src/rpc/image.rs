//! What a container takes from an image that was pulled in the guest, and the disk that such images are kept on.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use kata_api::agent::{Device, Storage};
use oci_spec::runtime::{Process, Spec, User};
use serde::Deserialize;

use super::error::RpcError;
use crate::aside;
use crate::mount::Image;
use crate::pause;

/// Longest description of an image that is read, in bytes.
const CONFIG_MAX: u64 = 1 << 20;
/// What a container calls a disk that images are to be kept on, encrypted. The name is upstream's.
const TRUSTED_STORE: &str = "/dev/trusted_store";
/// Where services keep images.
const IMAGES: &str = "/run/kata-containers/image";

/// What of an image's `config.json` is of use. To understand all of it would make the agent by half larger.
#[derive(Deserialize)]
struct Description {
    process: Option<Described>,
}

#[derive(Deserialize)]
#[serde(default)]
struct Described {
    args: Option<Vec<String>>,
    env: Option<Vec<String>>,
    cwd: PathBuf,
    user: DescribedUser,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DescribedUser {
    uid: u32,
    gid: u32,
    additional_gids: Option<Vec<u32>>,
}

impl Default for Described {
    fn default() -> Self {
        Self { args: None, env: None, cwd: "/".into(), user: DescribedUser::default() }
    }
}

/// Fits `spec` to its root: a pod's own container gets the agent's pause, and one without arguments the process of its image.
///
/// # Errors
/// The image says of no process, or cannot be read.
pub async fn adapt(spec: &mut Spec, image: &Image) -> Result<(), RpcError> {
    if image.is_pods_own {
        let program = std::env::current_exe().map_err(RpcError::file("finding", "/proc/self/exe"))?;
        pause::adapt(spec, &program);
        return Ok(());
    }
    let Some(asked) = spec.process().clone().filter(is_left_to_the_image) else { return Ok(()) };
    let path = image.config();
    let own = aside::run(format!("reading {}", path.display()), move || read(&path)).await??;
    let own = own.process.ok_or_else(|| {
        RpcError::Invalid(format!(
            "the container leaves its process to the image {}, which has none or one of an unknown user",
            image.reference
        ))
    })?;
    spec.set_process(Some(merge(asked, own)));
    Ok(())
}

/// Who leaves the arguments to the image leaves all of the process to it that is not given.
fn is_left_to_the_image(process: &Process) -> bool {
    process.args().iter().flatten().all(String::is_empty)
}

fn merge(mut asked: Process, own: Described) -> Process {
    asked.set_args(own.args);
    let name = |variable: &String| variable.split('=').next().unwrap_or_default().to_owned();
    let mut env = asked.env().clone().unwrap_or_default();
    let given: Vec<String> = env.iter().map(name).collect();
    env.extend(own.env.into_iter().flatten().filter(|variable| !given.contains(&name(variable))));
    asked.set_env(Some(env));
    if asked.cwd() == Path::new("/") {
        asked.set_cwd(own.cwd);
    }
    let user = asked.user();
    if user.uid() == 0 && user.gid() == 0 && user.additional_gids().iter().flatten().next().is_none() {
        let mut of_image = User::default();
        of_image
            .set_uid(own.user.uid)
            .set_gid(own.user.gid)
            .set_additional_gids(own.user.additional_gids)
            .set_umask(user.umask());
        asked.set_user(of_image);
    }
    asked
}

fn read(path: &PathBuf) -> Result<Description, RpcError> {
    let file = File::open(path).map_err(RpcError::file("opening", path))?;
    let mut text = Vec::new();
    file.take(CONFIG_MAX).read_to_end(&mut text).map_err(RpcError::file("reading", path))?;
    serde_json::from_slice(&text).map_err(|error| {
        // The parser quotes values.
        let place = format!("line {}, column {}", error.line(), error.column());
        RpcError::file("understanding", path)(io::Error::new(io::ErrorKind::InvalidData, place))
    })
}

/// Takes the disk for images from a container, and gives the storage that has it mounted, encrypted, before the others. The
/// container itself does not see it. It stays until the sandbox goes.
///
/// # Errors
/// [`RpcError::Unsupported`] for a disk behind a bus that has none.
pub fn trusted_store(spec: &mut Spec, devices: &[Device]) -> Result<Option<Storage>, RpcError> {
    let Some(device) = devices.iter().find(|device| device.container_path == TRUSTED_STORE) else {
        return Ok(None);
    };
    let source = match device.type_.as_str() {
        "blk" | "scsi" => &device.id,
        "mmioblk" | "nvdimm" => &device.vm_path,
        _ => return Err(RpcError::Unsupported("keeping images on a device that is no disk")),
    };
    if let Some(nodes) = spec.linux_mut().as_mut().and_then(|linux| linux.devices_mut().as_mut()) {
        nodes.retain(|node| node.path() != Path::new(TRUSTED_STORE));
    }
    Ok(Some(Storage {
        driver: device.type_.clone(),
        driver_options: vec![crate::mount::EPHEMERAL_KEY.to_owned()],
        source: source.clone(),
        mount_point: IMAGES.to_owned(),
        shared: true,
        ..Default::default()
    }))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDevice;

    use super::*;

    fn process(args: &[&str], env: &[&str], cwd: &str, user: (u32, u32)) -> Process {
        let texts = |words: &[&str]| Some(words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>());
        let mut of = User::default();
        of.set_uid(user.0).set_gid(user.1);
        let mut process = Process::default();
        process.set_args(texts(args)).set_env(texts(env)).set_cwd(cwd.into()).set_user(of);
        process
    }

    fn image(dir: &Path, own: bool) -> Image {
        let metadata = if own { r#"{"io.kubernetes.cri.container-type":"sandbox"}"# } else { "{}" };
        let storage = Storage {
            driver: "image_guest_pull".into(),
            driver_options: vec![format!(r#"image_guest_pull={{"metadata":{metadata}}}"#)],
            source: "docker.io/a".into(),
            mount_point: dir.join("rootfs").to_str().unwrap().into(),
            ..Default::default()
        };
        Image::of(&storage).unwrap().unwrap()
    }

    #[tokio::test]
    async fn a_process_that_is_given_is_not_the_images() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = Spec::default();
        let given = process(&["run"], &[], "/", (0, 0));
        spec.set_process(Some(given.clone()));
        // There is no config.json: it is not even looked for.
        adapt(&mut spec, &image(dir.path(), false)).await.unwrap();
        assert_eq!(spec.process(), &Some(given));
    }

    #[tokio::test]
    async fn a_process_without_arguments_is_the_images_where_nothing_else_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let mut own = Spec::default();
        own.set_process(Some(process(&["/serve", "x"], &["A=image", "B=image"], "/srv", (7, 8))));
        std::fs::write(dir.path().join("config.json"), serde_json::to_vec(&own).unwrap()).unwrap();
        for (asked, expected) in [
            (
                process(&[], &["A=given"], "/", (0, 0)),
                process(&["/serve", "x"], &["A=given", "B=image"], "/srv", (7, 8)),
            ),
            (
                process(&[""], &[], "/w", (5, 5)),
                process(&["/serve", "x"], &["A=image", "B=image"], "/w", (5, 5)),
            ),
        ] {
            let mut spec = Spec::default();
            spec.set_process(Some(asked));
            adapt(&mut spec, &image(dir.path(), false)).await.unwrap();
            assert_eq!(spec.process(), &Some(expected));
        }
    }

    #[tokio::test]
    async fn an_image_without_a_process_makes_no_container_of_none() {
        let dir = tempfile::tempdir().unwrap();
        let text = r#"{"ociVersion":"1.1.0","root":{"path":"rootfs"}}"#;
        std::fs::write(dir.path().join("config.json"), text).unwrap();
        let mut spec = Spec::default();
        spec.set_process(Some(process(&[], &[], "/", (0, 0))));
        let error = adapt(&mut spec, &image(dir.path(), false)).await.unwrap_err();
        assert!(error.to_string().contains("leaves its process to the image docker.io/a"), "{error}");
        std::fs::write(dir.path().join("config.json"), "{").unwrap();
        let error = adapt(&mut spec, &image(dir.path(), false)).await.unwrap_err();
        assert!(matches!(error, RpcError::File { what: "understanding", .. }), "{error}");
        // Variables of an image that nobody else has may be secret.
        std::fs::write(dir.path().join("config.json"), r#"{"process":{"env":"TOKEN=hunter2"}}"#).unwrap();
        let error = crate::chain(&adapt(&mut spec, &image(dir.path(), false)).await.unwrap_err());
        assert!(error.contains("line 1, column ") && !error.contains("hunter2"), "{error}");
    }

    #[tokio::test]
    async fn a_pods_own_container_pauses_by_the_agents_program() {
        let dir = tempfile::tempdir().unwrap();
        let mut spec = Spec::default();
        adapt(&mut spec, &image(dir.path(), true)).await.unwrap();
        assert_eq!(spec.process().as_ref().unwrap().args().as_ref().unwrap(), &[pause::PATH]);
    }

    #[test]
    fn a_disk_for_images_is_not_the_containers_and_is_encrypted() {
        let device = Device {
            type_: "blk".into(),
            id: "02/00".into(),
            container_path: TRUSTED_STORE.into(),
            ..Default::default()
        };
        let mut spec = Spec::default();
        let node = |path: &str| {
            let mut node = LinuxDevice::default();
            node.set_path(path.into());
            node
        };
        spec.linux_mut().as_mut().unwrap().set_devices(Some(vec![node("/dev/x"), node(TRUSTED_STORE)]));
        assert_eq!(trusted_store(&mut spec, &[]).unwrap(), None);
        let storage = trusted_store(&mut spec, std::slice::from_ref(&device)).unwrap().unwrap();
        assert_eq!((storage.driver.as_str(), storage.source.as_str()), ("blk", "02/00"));
        assert!(storage.shared && storage.mount_point == IMAGES);
        assert_eq!(storage.driver_options, ["encryption_key=ephemeral"]);
        assert_eq!(spec.linux().as_ref().unwrap().devices().as_ref().unwrap(), &[node("/dev/x")]);
        let strange = Device { type_: "vfio-pci".into(), ..device };
        assert!(trusted_store(&mut spec, &[strange]).is_err());
    }
}
