//! The clients against services that are absent, slow, lying and broken.

use std::os::unix::fs::symlink;

use kata_api::guest_services::{ImagePullResponse, SecureMountResponse, UnsealSecretResponse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use ttrpc::Code;

use super::fake::{self, services};
use super::*;

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_secs(2);
const BUNDLE: &str = "/run/kata-containers/c1";

fn listener(dir: &Path, name: &str) -> UnixListener {
    UnixListener::bind(dir.join(name).with_extension("socket")).unwrap()
}

async fn pull_error(dir: &Path) -> ServiceError {
    services(dir, LONG).pull_image("image", Path::new(BUNDLE)).await.unwrap_err()
}

#[tokio::test]
async fn each_service_is_asked_on_its_socket_and_its_answer_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let digest = format!("sha256:{}", "0a".repeat(32));
    let told = digest.clone();
    let _pull = fake::pulls(dir.path(), move |request| {
        assert_eq!((request.image_url.as_str(), request.bundle_path.as_str()), ("docker.io/a", BUNDLE));
        Ok(ImagePullResponse { manifest_digest: told.clone(), ..Default::default() })
    })
    .await;
    let _unseal = fake::unseals(dir.path(), fake::open).await;
    let _mount = fake::mounts(dir.path(), |request| {
        assert_eq!(request.volume_type, "block-device");
        Ok(SecureMountResponse::new())
    })
    .await;
    let services = services(dir.path(), LONG);
    assert_eq!(services.pull_image("docker.io/a", Path::new(BUNDLE)).await.unwrap(), digest);
    assert_eq!(services.unseal(b"sealed.x").await.unwrap(), b"open x");
    let request = SecureMountRequest { volume_type: "block-device".into(), ..Default::default() };
    services.secure_mount(request).await.unwrap();
}

#[tokio::test]
async fn one_program_may_serve_several_by_links() {
    let dir = tempfile::tempdir().unwrap();
    let _unseal = fake::unseals(dir.path(), fake::open).await;
    symlink("sealed-secrets.socket", dir.path().join("image-pull.socket")).unwrap();
    assert_eq!(services(dir.path(), LONG).unseal(b"sealed.x").await.unwrap(), b"open x");
    let error = pull_error(dir.path()).await;
    assert!(error.is_absent() && error.to_string().contains("does not do this"), "{error}");
}

#[tokio::test]
async fn an_absent_service_is_told_with_what_it_is_for_and_where_it_would_be() {
    let dir = tempfile::tempdir().unwrap();
    let error = pull_error(dir.path()).await;
    let text = error.to_string();
    assert!(error.is_absent(), "{text}");
    assert!(text.contains("pulls images") && text.contains("image-pull.socket"), "{text}");
    assert!(text.contains("does not exist"), "{text}");
}

#[tokio::test]
async fn a_path_that_exists_proves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image-pull.socket");
    std::fs::write(&path, "").unwrap();
    let error = pull_error(dir.path()).await;
    assert!(error.to_string().contains("is no socket") && !error.is_absent(), "{error}");
    std::fs::remove_file(&path).unwrap();

    drop(listener(dir.path(), "image-pull"));
    let error = pull_error(dir.path()).await;
    assert!(error.to_string().contains("is not listened on") && !error.is_absent(), "{error}");
    std::fs::remove_file(&path).unwrap();

    symlink("nowhere", &path).unwrap();
    let error = pull_error(dir.path()).await;
    assert!(error.to_string().contains("is a link to a socket that does not exist"), "{error}");
}

#[tokio::test]
async fn a_refusal_comes_with_its_code_and_words() {
    let dir = tempfile::tempdir().unwrap();
    let refuse = |_: &_| Err(ttrpc::Error::RpcStatus(ttrpc::get_status(Code::NOT_FOUND, "no such\nimage")));
    let _pull = fake::pulls(dir.path(), refuse).await;
    let error = pull_error(dir.path()).await;
    assert!(matches!(&error, ServiceError::Refused { code: Code::NOT_FOUND, .. }), "{error}");
    assert!(error.to_string().ends_with("image-pull has refused (NOT_FOUND): no such image"), "{error}");
}

#[tokio::test]
async fn a_service_that_does_not_answer_is_given_up_and_hears_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let listener = listener(dir.path(), "image-pull");
    let service = tokio::spawn(async move {
        let (mut peer, _) = listener.accept().await.unwrap();
        // All that comes, until the caller closes.
        let mut all = Vec::new();
        peer.read_to_end(&mut all).await.unwrap();
        all.len()
    });
    let error = services(dir.path(), SHORT).pull_image("image", Path::new(BUNDLE)).await.unwrap_err();
    assert!(matches!(error, ServiceError::Late { name: "image-pull", limit: SHORT }), "{error}");
    assert!(tokio::time::timeout(LONG, service).await.expect("the connection stays open").unwrap() > 0);
}

#[tokio::test]
async fn garbage_an_end_without_an_answer_and_a_frame_too_large_are_a_broken_service() {
    // A header: length, stream, type of a response, flags.
    let header = |length: u32| {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, 1, 2, 0]);
        bytes
    };
    let garbage = [header(4), vec![0xff; 4]].concat();
    let cases = [
        ("no answer", Vec::new(), "closed the connection"),
        ("garbage", garbage, "cannot be read"),
        ("half a header", vec![0; 4], "closed the connection"),
        ("too large", [header(5 << 20), vec![0; 5 << 20]].concat(), "longer than a frame"),
        ("larger than it says", header(64), "closed the connection"),
    ];
    for (case, answer, words) in cases {
        let dir = tempfile::tempdir().unwrap();
        let listener = listener(dir.path(), "sealed-secrets");
        let service = tokio::spawn(async move {
            let (mut peer, _) = listener.accept().await.unwrap();
            let mut some = [0; 16];
            let _ = peer.read(&mut some).await;
            let _ = peer.write_all(&answer).await;
        });
        let error = services(dir.path(), LONG).unseal(b"sealed.x").await.unwrap_err();
        assert!(matches!(error, ServiceError::Broken { .. }), "{case}: {error}");
        assert!(error.to_string().contains(words), "{case}: {error}");
        service.await.unwrap();
    }
}

#[tokio::test]
async fn an_answer_beyond_its_bounds_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let large =
        |_: &_| Ok(UnsealSecretResponse { plaintext: vec![b'x'; SECRET_MAX + 1], ..Default::default() });
    let _unseal = fake::unseals(dir.path(), large).await;
    let error = services(dir.path(), LONG).unseal(b"sealed.x").await.unwrap_err();
    assert!(error.to_string().contains("1048577 bytes"), "{error}");
    let lie = |_: &_| Ok(ImagePullResponse { manifest_digest: "sha256:\n".into(), ..Default::default() });
    let _pull = fake::pulls(dir.path(), lie).await;
    let error = pull_error(dir.path()).await;
    assert!(error.to_string().contains("a digest that is none"), "{error}");
}

#[tokio::test]
async fn a_service_that_was_restarted_is_asked_again_without_more_ado() {
    let dir = tempfile::tempdir().unwrap();
    let services = services(dir.path(), LONG);
    let first = fake::unseals(dir.path(), fake::open).await;
    services.unseal(b"sealed.1").await.unwrap();
    first.stop().await;
    let _ = std::fs::remove_file(dir.path().join("sealed-secrets.socket"));
    assert!(services.unseal(b"sealed.2").await.unwrap_err().is_absent());
    let _second = fake::unseals(dir.path(), fake::open).await;
    assert_eq!(services.unseal(b"sealed.3").await.unwrap(), b"open 3");
}
