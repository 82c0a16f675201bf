use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::Duration;

use kata_api::guest_services::UnsealSecretResponse;
use oci_spec::runtime::MountBuilder;
use ttrpc::Code;

use super::super::fake::{self, services};
use super::*;

const LONG: Duration = Duration::from_secs(20);

fn spec(annotation: Option<&str>, mounts: Vec<Mount>) -> Spec {
    let mut spec = Spec::default();
    let annotations = annotation.map(|text| HashMap::from([(ANNOTATION.to_owned(), text.to_owned())]));
    spec.set_annotations(annotations).set_mounts(Some(mounts));
    spec
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Mount {
    let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
    MountBuilder::default()
        .typ("bind")
        .source(source)
        .destination(destination)
        .options(options)
        .build()
        .unwrap()
}

fn secrets(dir: &Path, annotation: Option<&str>, implicit: bool) -> Arc<Secrets> {
    Secrets::of(&spec(annotation, Vec::new()), implicit, services(dir, LONG)).unwrap()
}

fn env() -> Vec<String> {
    ["A=plain", "B=sealed.b", "C=x sealed.c", "sealed.d"].map(str::to_owned).to_vec()
}

/// A secret of Kubernetes: names are links into a directory that is exchanged whole.
fn volume(dir: &Path) -> PathBuf {
    let volume = dir.join("volumes/secret");
    std::fs::create_dir_all(volume.join("..2026")).unwrap();
    std::fs::write(volume.join("..2026/key"), "sealed.key\n").unwrap();
    std::fs::write(volume.join("..2026/name"), "plain").unwrap();
    std::fs::set_permissions(volume.join("..2026/key"), std::fs::Permissions::from_mode(0o440)).unwrap();
    symlink("..2026", volume.join("..data")).unwrap();
    for name in ["key", "name"] {
        symlink(format!("..data/{name}"), volume.join(name)).unwrap();
    }
    volume
}

#[tokio::test]
async fn variables_are_opened_where_the_container_asks_for_it_or_the_agent_does() {
    let dir = tempfile::tempdir().unwrap();
    let _service = fake::unseals(dir.path(), fake::open).await;
    for (annotation, implicit, opens) in [
        (Some("env"), false, true),
        (Some(" env , files=/x"), false, true),
        (None, true, true),
        (None, false, false),
        (Some("files=/x"), true, false),
    ] {
        let mut env = env();
        secrets(dir.path(), annotation, implicit).open_env(&mut env).await.unwrap();
        let b = if opens { "B=open b" } else { "B=sealed.b" };
        assert_eq!(env, ["A=plain", b, "C=x sealed.c", "sealed.d"], "{annotation:?} {implicit}");
    }
}

#[tokio::test]
async fn a_variable_that_cannot_be_opened_fails_and_names_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    let secrets = secrets(dir.path(), Some("env"), false);
    let error = secrets.open_env(&mut env()).await.unwrap_err();
    let text = crate::chain(&error);
    assert!(matches!(error, SealedError::Service { .. }), "{text}");
    assert!(text.contains("variable \"B\"") && text.contains("opens sealed secrets"), "{text}");
    assert!(!text.contains("sealed.b"), "{text}");

    let refuse = |_: &_| Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::PERMISSION_DENIED, "no key")));
    let _service = fake::unseals(dir.path(), refuse).await;
    let text = crate::chain(&secrets.open_env(&mut env()).await.unwrap_err());
    assert!(text.contains("PERMISSION_DENIED") && text.contains("no key"), "{text}");
}

#[tokio::test]
async fn what_no_variable_can_be_is_refused() {
    for plain in [b"a\0b".to_vec(), vec![0xff], vec![b'x'; VARIABLE_MAX]] {
        let dir = tempfile::tempdir().unwrap();
        let answer = move |_: &_| Ok(UnsealSecretResponse { plaintext: plain.clone(), ..Default::default() });
        let _service = fake::unseals(dir.path(), answer).await;
        let error = secrets(dir.path(), Some("env"), false).open_env(&mut env()).await.unwrap_err();
        assert!(matches!(&error, SealedError::NotText(name) if name == "B"), "{error}");
    }
}

#[tokio::test]
async fn programs_that_are_run_later_do_not_need_the_service_again() {
    let dir = tempfile::tempdir().unwrap();
    let secrets = secrets(dir.path(), Some("env"), false);
    let service = fake::unseals(dir.path(), fake::open).await;
    secrets.open_env(&mut env()).await.unwrap();
    service.stop().await;
    let mut later = env();
    secrets.open_env(&mut later).await.unwrap();
    assert_eq!(later[1], "B=open b");
}

#[test]
fn an_annotation_that_is_not_understood_is_an_error() {
    for text in ["", "environment", "env,file=/x", "files=x", "files=", "files"] {
        let error = Wanted::of(&spec(Some(text), Vec::new()), false).unwrap_err();
        assert!(matches!(error, SealedError::Annotation(_)), "{text:?}");
    }
    let wanted = Wanted::of(&spec(Some("files=/a:/b"), Vec::new()), true).unwrap();
    assert_eq!(wanted, Wanted::Named { env: false, files: vec!["/a".into(), "/b".into()] });
}

#[tokio::test]
async fn files_are_opened_in_a_copy_and_the_volume_stays_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let _service = fake::unseals(dir.path(), fake::open).await;
    let mut spec = spec(Some("files=/etc/secret"), vec![bind(&volume, "/etc/secret", &["rbind", "ro"])]);
    let secrets = Secrets::of(&spec, false, services(dir.path(), LONG)).unwrap();
    let found = secrets.find(&spec, &[]).await.unwrap();
    assert!(!found.is_empty());
    let place = dir.path().join("open");
    std::fs::create_dir(&place).unwrap();
    secrets.open_files(found, &place, &mut spec).await.unwrap();
    let mount = &spec.mounts().as_ref().unwrap()[0];
    let source = mount.source().as_ref().unwrap();
    assert_eq!(source, &place.join("0"));
    assert_eq!(std::fs::read_to_string(source.join("key")).unwrap(), "open key");
    assert_eq!(std::fs::read_to_string(source.join("name")).unwrap(), "plain");
    assert_eq!(std::fs::metadata(source.join("key")).unwrap().mode() & 0o7777, 0o440);
    assert_eq!(std::fs::read_link(source.join("..data")).unwrap(), Path::new("..2026"));
    assert_eq!(std::fs::read_to_string(volume.join("key")).unwrap(), "sealed.key\n");
}

#[tokio::test]
async fn one_file_is_opened_as_a_tree_is() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let _service = fake::unseals(dir.path(), fake::open).await;
    let mut spec = spec(Some("files=/key"), vec![bind(&volume.join("key"), "/key", &["bind"])]);
    let secrets = Secrets::of(&spec, false, services(dir.path(), LONG)).unwrap();
    let found = secrets.find(&spec, &[]).await.unwrap();
    secrets.open_files(found, dir.path(), &mut spec).await.unwrap();
    assert_eq!(std::fs::read_to_string(dir.path().join("0")).unwrap(), "open key");
}

#[tokio::test]
async fn a_path_that_is_no_mount_or_holds_nothing_sealed_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain");
    std::fs::write(&plain, "plain").unwrap();
    let spec = spec(Some("files=/there"), vec![bind(&plain, "/there", &["ro"])]);
    let secrets = Secrets::of(&spec, false, services(dir.path(), LONG)).unwrap();
    let error = secrets.find(&spec, &[]).await.unwrap_err();
    assert!(matches!(error, SealedError::NothingSealed(_)), "{error}");
    let error = secrets.find(&Spec::default(), &[]).await.unwrap_err();
    assert!(matches!(error, SealedError::NoMount(_)), "{error}");
}

#[tokio::test]
async fn implicitly_only_small_readonly_volumes_of_the_host_are_looked_through() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let many = dir.path().join("volumes/many");
    std::fs::create_dir(&many).unwrap();
    for number in 0..300 {
        std::fs::write(many.join(number.to_string()), "ordinary").unwrap();
    }
    let given = [dir.path().join("volumes")];
    let spec = |mounts| spec(None, mounts);
    let secrets = Secrets::of(&spec(Vec::new()), true, services(dir.path(), LONG)).unwrap();
    let ro = ["rbind", "ro"].as_slice();
    for (mount, found) in [
        (bind(&volume, "/etc/secret", ro), true),
        (bind(&volume, "/etc/secret", &["rbind", "rw"]), false),
        (bind(&volume, "/var/run/secrets/kubernetes.io/serviceaccount", ro), false),
        (bind(&many, "/data", ro), false),
        (bind(dir.path(), "/data", ro), false),
    ] {
        let destination = mount.destination().clone();
        let sealed = secrets.find(&spec(vec![mount]), &given).await.unwrap();
        assert_eq!(!sealed.is_empty(), found, "{destination:?}");
    }
    // By name it is an error.
    let error = Tree::read(&many).unwrap_err().to_string();
    assert!(error.contains("holds more than secrets do"), "{error}");
}

#[tokio::test]
async fn a_volume_that_is_too_large_to_be_opened_is_refused_once_something_sealed_is_seen_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let given = [dir.path().to_owned()];
    let (padded, long) = (dir.path().join("padded"), dir.path().join("long"));
    std::fs::create_dir(&padded).unwrap();
    std::fs::write(padded.join("0"), "sealed.hunter2").unwrap();
    for number in 1..300 {
        std::fs::write(padded.join(number.to_string()), "padding").unwrap();
    }
    std::fs::create_dir(&long).unwrap();
    std::fs::write(long.join("key"), format!("sealed.hunter2{}", "x".repeat(tree::BYTES_MAX))).unwrap();
    for volume in [padded, long] {
        let spec = spec(None, vec![bind(&volume, "/data", &["rbind", "ro"])]);
        let secrets = Secrets::of(&spec, true, services(dir.path(), LONG)).unwrap();
        let error = secrets.find(&spec, &given).await.unwrap_err().to_string();
        assert!(error.contains("holds more than secrets do") && !error.contains("hunter2"), "{error}");
    }
}

#[tokio::test]
async fn no_text_of_a_secret_is_in_what_is_printed_for_debugging() {
    let dir = tempfile::tempdir().unwrap();
    let volume = volume(dir.path());
    let _service = fake::unseals(dir.path(), fake::open).await;
    let secrets = secrets(dir.path(), Some("env"), false);
    secrets.open_env(&mut env()).await.unwrap();
    let mut tree = Tree::read(&volume).unwrap();
    for (_, content) in tree.sealed() {
        *content = b"open key".to_vec();
    }
    let printed = format!("{secrets:?} {tree:?} {:?}", Sealed(vec![(0, tree_of("open key"))]));
    assert!(!printed.contains("open") && !printed.contains("sealed.b"), "{printed}");
}

fn tree_of(text: &str) -> Tree {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    Tree::read(file.path()).unwrap()
}
