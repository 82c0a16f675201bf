use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};

use super::*;
use crate::tests::chain;
use crate::{Credentials, ImageSource, Interrupt, fetch as fetch_image};

/// Debian's docker-registry on a port of the loopback address. Ends with the value.
struct LocalRegistry {
    process: Child,
    dir: tempfile::TempDir,
    port: u16,
}

impl LocalRegistry {
    /// `None`, with the reason printed, where a tool is missing.
    fn start() -> Option<Self> {
        for program in ["docker-registry", "skopeo", "umoci"] {
            if Command::new(program)
                .arg("--version")
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_err()
            {
                eprintln!("skipped: {program} is not installed");
                return None;
            }
        }
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: unpacking layers needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let storage = dir.path().join("storage");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n",
            storage.display()
        );
        let file = dir.path().join("config.yml");
        fs::write(&file, config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self { process, dir, port };
        for _ in 0..1200 {
            if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some(registry);
            }
            std::thread::sleep(Duration::from_millis(25));
        }
        panic!("docker-registry does not listen");
    }

    /// Pushes an image whose only layer has `/file` with `content`.
    fn push(&self, name: &str, content: &str) -> String {
        let layout = self.dir.path().join(format!("layout-{}", content.len()));
        let bundle = self.dir.path().join(format!("bundle-{}", content.len()));
        let image = format!("{}:t", layout.display());
        run("umoci", &["init", "--layout", layout.to_str().unwrap()]);
        run("umoci", &["new", "--image", &image]);
        run("umoci", &["unpack", "--image", &image, bundle.to_str().unwrap()]);
        fs::write(bundle.join("rootfs/file"), content).unwrap();
        run("umoci", &["repack", "--image", &image, bundle.to_str().unwrap()]);
        let reference = format!("127.0.0.1:{}/{name}", self.port);
        let to = format!("docker://{reference}");
        run(
            "skopeo",
            &["--insecure-policy", "copy", "--dest-tls-verify=false", &format!("oci:{image}"), &to],
        );
        reference
    }

    fn store(&self, name: &str) -> Store {
        Store::open(&self.dir.path().join(name), Interrupt::default()).unwrap()
    }
}

impl Drop for LocalRegistry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn pull(reference: &str, store: &Store) -> Result<Image, ImageError> {
    let source: ImageSource = reference.parse().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let options = RegistryOptions {
        plain: PlainHttp::Loopback,
        credentials: Credentials::OfTheUser,
        remember: true,
        ..RegistryOptions::new("kata-oci/test")
    };
    runtime.block_on(fetch_image(source, store.clone(), options))
}

#[test]
fn an_image_is_pulled_and_its_layers_are_kept() {
    let Some(registry) = LocalRegistry::start() else { return };
    let reference = registry.push("test/one:v1", "one");
    let store = registry.store("state");
    let image = pull(&reference, &store).unwrap();
    assert_eq!(fs::read_to_string(image.layers[0].join("file")).unwrap(), "one");
    let before = fs::metadata(&image.layers[0]).unwrap().ino();
    let again = pull(&reference, &store).unwrap();
    assert_eq!(fs::metadata(&again.layers[0]).unwrap().ino(), before);
}

#[test]
fn a_tag_that_moved_is_followed_and_a_digest_never_moves() {
    let Some(registry) = LocalRegistry::start() else { return };
    let store = registry.store("state");
    let reference = registry.push("test/two:v1", "first");
    pull(&reference, &store).unwrap();
    let kept = fs::read_dir(store.root().join("references")).unwrap().next().unwrap().unwrap().path();
    let digest = fs::read_to_string(kept).unwrap();
    registry.push("test/two:v1", "second!");
    let moved = pull(&reference, &store).unwrap();
    assert_eq!(fs::read_to_string(moved.layers[0].join("file")).unwrap(), "second!");
    let by_digest = format!("127.0.0.1:{}/test/two@{digest}", registry.port);
    let first = pull(&by_digest, &store).unwrap();
    assert_eq!(fs::read_to_string(first.layers[0].join("file")).unwrap(), "first");
}

#[test]
fn without_the_registry_the_copy_serves_and_what_was_never_pulled_is_an_error() {
    let Some(mut registry) = LocalRegistry::start() else { return };
    let store = registry.store("state");
    let reference = registry.push("test/three:v1", "three");
    pull(&reference, &store).unwrap();
    registry.process.kill().unwrap();
    registry.process.wait().unwrap();
    assert_eq!(
        fs::read_to_string(pull(&reference, &store).unwrap().layers[0].join("file")).unwrap(),
        "three"
    );
    let other = format!("127.0.0.1:{}/test/never:v1", registry.port);
    let text = chain(&pull(&other, &store).unwrap_err());
    assert!(text.contains("cannot pull the manifest") && text.contains("test/never"), "{text}");
}

#[test]
fn a_layer_that_the_registry_corrupts_is_refused_and_not_kept() {
    let Some(registry) = LocalRegistry::start() else { return };
    let store = registry.store("state");
    let reference = registry.push("test/four:v1", &"four".repeat(1000));
    let blobs = registry.dir.path().join("storage/docker/registry/v2/blobs/sha256");
    let mut changed = 0;
    for prefix in fs::read_dir(blobs).unwrap() {
        for blob in fs::read_dir(prefix.unwrap().path()).unwrap() {
            let data = blob.unwrap().path().join("data");
            let mut bytes = fs::read(&data).unwrap();
            // The layer is the one in gzip.
            if bytes.starts_with(&[0x1f, 0x8b]) {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&data, bytes).unwrap();
                changed += 1;
            }
        }
    }
    assert_eq!(changed, 1);
    let text = chain(&pull(&reference, &store).unwrap_err());
    assert!(text.contains("layer sha256:") && text.to_lowercase().contains("digest"), "{text}");
    assert_eq!(fs::read_dir(store.root().join("layers")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(store.root().join("locks")).unwrap().count(), 0);
}

#[test]
fn a_missing_image_is_told_by_name() {
    let Some(registry) = LocalRegistry::start() else { return };
    let reference = format!("127.0.0.1:{}/test/missing:v1", registry.port);
    let text = chain(&pull(&reference, &registry.store("state")).unwrap_err());
    assert!(text.contains("test/missing:v1"), "{text}");
}

#[test]
fn plain_http_is_for_loopback_only() {
    for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.1.2.3"] {
        assert!(is_loopback(host), "{host}");
    }
    for host in ["docker.io", "localhost.example.org:5000", "10.0.0.1:5000", "127.0.0.1.example.org"] {
        assert!(!is_loopback(host), "{host}");
    }
}
