//! The service in a mount namespace of its own, registries, and images to put into them.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "each test file uses its part, and a test fails by panicking"
)]

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kata_api::guest_services::ImagePullRequest;
use kata_api::guest_services_ttrpc::ImagePullServiceClient;
use kata_oci::Digest;
use oci_client::client::{Certificate, CertificateEncoding, ClientConfig, ClientProtocol};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use serde_json::json;
pub use ttrpc::Code;

pub mod liar;

/// The user of registries that want to know, and the password.
pub const USER: &str = "puller";
pub const PASSWORD: &str = "s3cret-of-the-registry";
/// Of that password, by bcrypt.
const HTPASSWD: &str = "puller:$2y$05$pDGkAsH3Rpfs2AUgdZ.dp.QkJFWGJBeiUkHozxwTtO6HCGBWqCqIe\n";

/// Says why a test is skipped, where it has to be.
pub fn can_run(programs: &[&str]) -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: mounting needs root");
        return false;
    }
    for program in programs {
        let found =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        if found.is_err() {
            eprintln!("skipped: {program} is not installed");
            return false;
        }
    }
    true
}

pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A port that is free now.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A process that ends with the value.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The service, serving.
pub struct Service {
    pub process: Running,
    pub dir: tempfile::TempDir,
}

impl Service {
    /// With this configuration behind what every test needs: accept by default, unless `config` has `[signatures]`.
    pub fn start(config: &str) -> Self {
        Self::start_with(config, &[])
    }

    /// The same, in a guest that knows no authority.
    pub fn start_without_authorities(config: &str) -> Self {
        Self::start_with(config, &[("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_DIR", "/nonexistent")])
    }

    fn start_with(config: &str, env: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let signatures =
            if config.contains("[signatures]") { "" } else { "[signatures]\ndefault = \"accept\"\n" };
        let base = dir.path().display();
        let text =
            format!("work_dir = \"{base}/work\"\nbundles = \"{base}/bundles\"\n{config}\n{signatures}");
        fs::write(dir.path().join("config.toml"), text).unwrap();
        let process = Self::spawn(dir.path(), env);
        let service = Self { process: Running(process), dir };
        wait_for("the service", || UnixStream::connect(service.socket()).is_ok());
        service
    }

    fn spawn(dir: &Path, env: &[(&str, &str)]) -> Child {
        Command::new("unshare")
            .args(["-m", "--propagation", "private", env!("CARGO_BIN_EXE_kata-image-pull"), "--config"])
            .arg(dir.join("config.toml"))
            .arg("--socket")
            .arg(dir.join("s"))
            .envs(env.iter().copied())
            .stderr(fs::File::options().create(true).append(true).open(dir.join("log")).unwrap())
            .spawn()
            .unwrap()
    }

    /// Kills the service, and starts another in its place.
    pub fn restart(&mut self) {
        let _ = self.process.0.kill();
        let _ = self.process.0.wait();
        self.process = Running(Self::spawn(self.dir.path(), &[]));
        wait_for("the service", || UnixStream::connect(self.socket()).is_ok());
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    pub async fn client(&self) -> ImagePullServiceClient {
        let address = format!("unix://{}", self.socket().display());
        ImagePullServiceClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap())
    }

    /// Pulls into the bundle called `bundle`; the digest, or code and words of the failure.
    pub fn pull(&self, image: &str, bundle: &str) -> Result<String, (Code, String)> {
        let path = self.dir.path().join("bundles").join(bundle);
        self.pull_at(image, path.to_str().unwrap())
    }

    pub fn pull_at(&self, image: &str, path: &str) -> Result<String, (Code, String)> {
        let request = ImagePullRequest {
            image_url: image.to_owned(),
            bundle_path: path.to_owned(),
            ..Default::default()
        };
        let answer = runtime().block_on(async {
            let client = self.client().await;
            client.pull_image(ttrpc::context::with_duration(Duration::from_secs(60)), &request).await
        });
        match answer {
            Ok(answer) => Ok(answer.manifest_digest),
            Err(ttrpc::Error::RpcStatus(status)) => Err((status.code(), status.message().to_owned())),
            Err(error) => panic!("{error}; the log:\n{}", self.log()),
        }
    }

    /// The bundle as the service sees it, mounts and all.
    pub fn bundle(&self, bundle: &str) -> PathBuf {
        let pid = self.process.0.id();
        PathBuf::from(format!("/proc/{pid}/root{}", self.dir.path().join("bundles").join(bundle).display()))
    }

    pub fn unmount(&self, bundle: &str) {
        let path = self.dir.path().join("bundles").join(bundle).join("rootfs");
        run("nsenter", &["-t", &self.process.0.id().to_string(), "-m", "umount", path.to_str().unwrap()]);
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Names in one of the directories of the service's work.
    pub fn names(&self, dir: &str) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path().join("work").join(dir));
        let mut names: Vec<String> =
            entries.into_iter().flatten().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Whole layers and those in the making, locks, writable layers.
    pub fn left(&self) -> Vec<String> {
        ["images/layers", "images/locks", "roots"].into_iter().flat_map(|dir| self.names(dir)).collect()
    }
}

pub fn wait_for(what: &str, ready: impl Fn() -> bool) {
    let began = Instant::now();
    while !ready() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what} does not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Debian's docker-registry on a port of the loopback address.
pub struct LocalRegistry {
    _process: Running,
    pub dir: tempfile::TempDir,
    pub port: u16,
    authority: Option<Vec<u8>>,
    auth: bool,
}

/// What a registry wants.
#[derive(Clone, Copy, Default)]
pub struct Wants {
    pub auth: bool,
    pub tls: bool,
}

impl LocalRegistry {
    pub fn start(wants: Wants) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (port, base) = (free_port(), dir.path().display().to_string());
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {base}/storage}}}}\nhttp:\n  addr: 127.0.0.1:{port}\n"
        );
        if wants.tls {
            certificates(dir.path());
            config += &format!("  tls: {{certificate: {base}/cert.pem, key: {base}/key.pem}}\n");
        }
        if wants.auth {
            fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
            config += &format!("auth: {{htpasswd: {{realm: r, path: {base}/htpasswd}}}}\n");
        }
        fs::write(dir.path().join("config.yml"), config).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("docker-registry", || TcpStream::connect(("127.0.0.1", port)).is_ok());
        let authority = wants.tls.then(|| fs::read(dir.path().join("ca.pem")).unwrap());
        Self { _process: Running(process), dir, port, authority, auth: wants.auth }
    }

    /// A name for an image in it.
    pub fn name(&self, image: &str) -> String {
        let host = if self.authority.is_some() { "localhost" } else { "127.0.0.1" };
        format!("{host}:{}/{image}", self.port)
    }

    /// What the service's configuration has to say to speak to it without TLS.
    pub fn insecure(&self) -> String {
        format!("[registries.\"127.0.0.1:{}\"]\ninsecure = true\n", self.port)
    }

    /// Pushes blobs and their manifest, and tells its digest.
    pub fn push(&self, image: &str, made: &Made) -> Digest {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let reference: Reference = self.name(image).parse().unwrap();
        let config = ClientConfig {
            protocol: match self.authority {
                Some(_) => ClientProtocol::Https,
                None => ClientProtocol::Http,
            },
            extra_root_certificates: self
                .authority
                .iter()
                .map(|pem| Certificate { encoding: CertificateEncoding::Pem, data: pem.clone() })
                .collect(),
            ..ClientConfig::default()
        };
        runtime().block_on(async {
            let client = Client::new(config);
            let auth = match self.auth {
                true => RegistryAuth::Basic(USER.to_owned(), PASSWORD.to_owned()),
                false => RegistryAuth::Anonymous,
            };
            client.auth(&reference, &auth, RegistryOperation::Push).await.unwrap();
            for blob in &made.blobs {
                client.push_blob(&reference, blob.clone(), &Digest::of(blob).to_string()).await.unwrap();
            }
            let kind = "application/vnd.oci.image.manifest.v1+json".parse().unwrap();
            client.push_manifest_raw(&reference, made.manifest.clone(), kind).await.unwrap();
        });
        made.digest()
    }
}

/// An authority, and a certificate of it for localhost.
fn certificates(dir: &Path) {
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
    let ca = ["req", "-x509", "-days", "30", "-subj", "/CN=test authority"];
    run("openssl", &[&ca[..], &key, &["-keyout", &file("ca-key.pem"), "-out", &file("ca.pem")]].concat());
    let request = ["req", "-subj", "/CN=localhost"];
    run("openssl", &[&request[..], &key, &["-keyout", &file("key.pem"), "-out", &file("csr.pem")]].concat());
    fs::write(dir.join("ext"), "subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        .unwrap();
    let sign = ["x509", "-req", "-days", "30", "-CAcreateserial"];
    let from = [
        "-in",
        &file("csr.pem"),
        "-CA",
        &file("ca.pem"),
        "-CAkey",
        &file("ca-key.pem"),
        "-extfile",
        &file("ext"),
        "-out",
        &file("cert.pem"),
    ];
    run("openssl", &[&sign[..], &from].concat());
}

/// An image, ready to be pushed or served.
pub struct Made {
    pub blobs: Vec<Vec<u8>>,
    pub manifest: Vec<u8>,
}

impl Made {
    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Of layers, each (as stored, as tar), that runs `/bin/x` as `7:8`.
    pub fn of(layers: &[(Vec<u8>, Vec<u8>)]) -> Self {
        let config = json!({
            "architecture": kata_oci::Platform::host().architecture, "os": "linux",
            "config": { "Cmd": ["/bin/x"], "User": "7:8", "Env": ["A=b"] },
            "rootfs": { "type": "layers", "diff_ids": layers.iter().map(|(_, tar)| Digest::of(tar)).collect::<Vec<_>>() },
        });
        let config = config.to_string().into_bytes();
        let describe = |bytes: &[u8], kind: &str| json!({ "mediaType": kind, "digest": Digest::of(bytes), "size": bytes.len() });
        let kind = "application/vnd.oci.image.layer.v1.tar+gzip";
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": describe(&config, "application/vnd.oci.image.config.v1+json"),
            "layers": layers.iter().map(|(stored, _)| describe(stored, kind)).collect::<Vec<_>>(),
        });
        let blobs = layers.iter().map(|(stored, _)| stored.clone()).chain([config]).collect();
        Self { blobs, manifest: manifest.to_string().into_bytes() }
    }

    /// Of one layer with `/file`.
    pub fn file(content: &str) -> Self {
        Self::of(&[layer(&[("file", content)])])
    }
}

/// A layer of these files, in gzip and as tar.
pub fn layer(files: &[(&str, &str)]) -> (Vec<u8>, Vec<u8>) {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        header.set_mtime(1_000_000_000);
        tar.append_data(&mut header, path, content.as_bytes()).unwrap();
    }
    let tar = tar.into_inner().unwrap();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    (gzip.finish().unwrap(), tar)
}
