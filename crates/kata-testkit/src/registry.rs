//! A registry on the host's side of a pod's network.
//!
//! ```text
//!   containerd's network namespace                        the pod's      the guest
//!   docker-registry on 10.88.0.1, .3 (bridge kt0) ── veth ── eth0 ── tap ── eth0 10.88.0.2 ◀── what pulls
//! ```

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::mount::{UnmountFlags, unmount};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::containerd::{Containerd, IMAGE};
use crate::host::stderr;

/// The registry.
pub const REGISTRY: &str = "10.88.0.1:5000";
/// The same registry under another name, which nobody has credentials for.
pub const ALIAS: &str = "10.88.0.3:5000";
/// Who may push and pull where the registry asks, and the password.
pub const USER: &str = "puller";
/// See [`USER`].
pub const PASSWORD: &str = "s3cret-of-the-registry";
/// Of that password, by bcrypt.
const HTPASSWD: &str = "puller:$2y$05$pDGkAsH3Rpfs2AUgdZ.dp.QkJFWGJBeiUkHozxwTtO6HCGBWqCqIe\n";

/// A network for one pod with a registry in it; both end with the value. The containerd has to be in a network namespace of
/// its own.
pub struct Registry {
    netns: PathBuf,
    process: Child,
    /// Whether it asks who pulls and pushes.
    asks: bool,
}

impl Registry {
    /// One that serves everybody; `None` (said and counted) where the program is missing.
    #[track_caller]
    pub fn open(rig: &Containerd) -> Option<Self> {
        Self::start(rig, false)
    }

    /// One that serves those who have the password.
    #[track_caller]
    pub fn with_password(rig: &Containerd) -> Option<Self> {
        Self::start(rig, true)
    }

    #[track_caller]
    fn start(rig: &Containerd, asks: bool) -> Option<Self> {
        if Command::new("docker-registry").arg("--version").output().is_err() {
            crate::skip("docker-registry is not installed");
            return None;
        }
        let netns = network(rig);
        let process = serve(rig, asks);
        let registry = Self { netns, process, asks };
        rig.host().wait_for("the registry", || rig.on_its_host(|| TcpStream::connect(REGISTRY).ok()));
        Some(registry)
    }

    /// What `ctr run --with-ns` takes for a container that is to be in the network.
    pub fn network(&self) -> String {
        format!("network:{}", self.netns.display())
    }

    /// Pushes the test's image as `image`, e.g. `library/busybox:1`, and answers its digest.
    #[track_caller]
    pub fn push(&self, rig: &Containerd, image: &str) -> String {
        let name = format!("{REGISTRY}/{image}");
        rig.ok(["images", "tag", IMAGE, &name]);
        let mut push = rig.beside(rig.client());
        push.arg("--address").arg(rig.socket()).args(["images", "push", "--plain-http"]);
        if self.asks {
            push.arg("--user").arg(format!("{USER}:{PASSWORD}"));
        }
        let output = push.arg(&name).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{}", stderr(&output));
        let listed = rig.ok(["images", "ls", &format!("name=={name}")]);
        listed.split_whitespace().find(|word| word.starts_with("sha256:")).unwrap().to_owned()
    }

    /// Stores a blob of a repository.
    #[track_caller]
    pub fn push_blob(&self, rig: &Containerd, repository: &str, digest: &str, blob: &[u8]) {
        let upload = self.request(rig, "POST", &format!("/v2/{repository}/blobs/uploads/"), "", b"");
        let place = upload.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap();
        let (_, path) = place.split_once("/v2/").unwrap();
        let target = format!("/v2/{path}&digest={digest}");
        self.request(rig, "PUT", &target, "application/octet-stream", blob);
    }

    /// Stores a manifest of a repository under a tag.
    #[track_caller]
    pub fn push_manifest(&self, rig: &Containerd, repository: &str, tag: &str, manifest: &str) {
        let target = format!("/v2/{repository}/manifests/{tag}");
        self.request(rig, "PUT", &target, "application/vnd.oci.image.manifest.v1+json", manifest.as_bytes());
    }

    /// Adds to an image that was pushed to `repository` a layer with one file, of which nobody else has a byte; its new tag.
    #[track_caller]
    pub fn add_file(
        &self,
        rig: &Containerd,
        repository: &str,
        tag: &str,
        name: &str,
        content: &str,
    ) -> String {
        let layout = rig.host().layout();
        let of = |digest: &Value| {
            let digest = digest.as_str().unwrap().trim_start_matches("sha256:");
            serde_json::from_slice::<Value>(&fs::read(layout.join("blobs/sha256").join(digest)).unwrap())
                .unwrap()
        };
        let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
        let mut manifest = of(&index["manifests"][0]["digest"]);
        let mut config = of(&manifest["config"]["digest"]);
        let layer = tar_of(name, content);
        config["rootfs"]["diff_ids"].as_array_mut().unwrap().push(json!(sha256(&layer)));
        // A step for each layer, or none at all.
        config.as_object_mut().unwrap().remove("history");
        let config = config.to_string();
        for blob in [&layer, config.as_bytes()] {
            self.push_blob(rig, repository, &sha256(blob), blob);
        }
        let (media_type, size) = ("application/vnd.oci.image.layer.v1.tar", layer.len());
        let layers = manifest["layers"].as_array_mut().unwrap();
        layers.push(json!({ "mediaType": media_type, "digest": sha256(&layer), "size": size }));
        manifest["config"]["digest"] = json!(sha256(config.as_bytes()));
        manifest["config"]["size"] = json!(config.len());
        let new = format!("{tag}-more");
        self.push_manifest(rig, repository, &new, &manifest.to_string());
        new
    }

    /// One request, which has to succeed; answers the answer.
    #[track_caller]
    fn request(&self, rig: &Containerd, method: &str, target: &str, kind: &str, body: &[u8]) -> String {
        assert!(!self.asks, "the registry asks for a password");
        let length = body.len();
        let head = format!(
            "{method} {target} HTTP/1.1\r\nHost: {REGISTRY}\r\nConnection: close\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n"
        );
        let answer = rig.on_its_host(|| {
            let mut stream = TcpStream::connect(REGISTRY).unwrap();
            stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        assert!(answer.starts_with("HTTP/1.1 2"), "{method} {target}: {answer}");
        answer
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = unmount(&self.netns, UnmountFlags::DETACH);
    }
}

/// Makes the network; answers where the pod's namespace is.
#[track_caller]
fn network(rig: &Containerd) -> PathBuf {
    let netns = rig.host().scratch("netns");
    File::create(&netns).unwrap();
    let path = netns.to_str().unwrap();
    runs(&mut Command::new("unshare"), &format!("--net={path} true"));
    for words in [
        "link set lo up",
        "link add kt0 type bridge",
        "addr add 10.88.0.1/24 dev kt0",
        "addr add 10.88.0.3/24 dev kt0",
        "link set kt0 up",
        "link add kt1 type veth peer name eth0",
        "link set kt1 master kt0 up",
        &format!("link set eth0 netns {path}"),
    ] {
        runs(&mut rig.beside("ip"), words);
    }
    for words in ["link set lo up", "addr add 10.88.0.2/24 dev eth0", "link set eth0 up"] {
        runs(Command::new("nsenter").arg(format!("--net={path}")).arg("ip"), words);
    }
    netns
}

/// Starts the registry on all addresses of containerd's namespace.
fn serve(rig: &Containerd, asks: bool) -> Child {
    let [config, data, passwords] =
        ["registry.yml", "registry", "htpasswd"].map(|name| rig.host().scratch(name));
    let port = REGISTRY.split_once(':').unwrap().1;
    let mut text = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \":{port}\"}}\n",
        data.display()
    );
    if asks {
        fs::write(&passwords, HTPASSWD).unwrap();
        text += &format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", passwords.display());
    }
    fs::write(&config, text).unwrap();
    let mut command = rig.beside("docker-registry");
    command.arg("serve").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap()
}

/// An archive of one file. It is made elsewhere than in the test's own world, where somebody may look for the content.
#[track_caller]
fn tar_of(name: &str, content: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), content).unwrap();
    let output = Command::new("tar").arg("-C").arg(dir.path()).args(["-cf", "-", name]).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    output.stdout
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

#[track_caller]
fn runs(command: &mut Command, words: &str) {
    let output = command.args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "{words}: {}", stderr(&output));
}
