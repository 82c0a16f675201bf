//! Pulls from Debian's docker-registry on loopback.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use base64::Engine as _;
use kata_oci::Digest;
use serde_json::json;
use support::{Code, LocalRegistry, Made, PASSWORD, Service, USER, Wants, can_run, free_port, layer, run};

/// A file of credentials for the registry on `port`.
fn auth_file(dir: &Path, host: &str, password: &str) -> String {
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"));
    let path = dir.join("auth.json");
    fs::write(&path, json!({ "auths": { host: { "auth": auth } } }).to_string()).unwrap();
    format!("auth_file = \"{}\"\n", path.display())
}

#[test]
fn an_image_is_mounted_writable_with_a_configuration_and_its_digest_is_told() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    let base = layer(&[("etc/kept", "kept"), ("etc/gone", "gone")]);
    let top = layer(&[("etc/.wh.gone", ""), ("new", "new")]);
    let digest = registry.push("app:v1", &Made::of(&[base, top]));
    let service = Service::start(&registry.insecure());
    assert_eq!(service.pull(&registry.name("app:v1"), "one"), Ok(digest.to_string()));
    let bundle = service.bundle("one");
    assert_eq!(fs::read_to_string(bundle.join("rootfs/etc/kept")).unwrap(), "kept");
    assert_eq!(fs::read_to_string(bundle.join("rootfs/new")).unwrap(), "new");
    assert!(!bundle.join("rootfs/etc/gone").exists());
    fs::write(bundle.join("rootfs/written"), "x").unwrap();
    let config = oci_spec::runtime::Spec::load(bundle.join("config.json")).unwrap();
    let process = config.process().as_ref().unwrap();
    assert_eq!((process.user().uid(), process.args().as_ref().unwrap()[0].as_str()), (7, "/bin/x"));
    let by_digest = registry.name(&format!("app@{digest}"));
    assert_eq!(service.pull(&by_digest, "two"), Ok(digest.to_string()));
    assert!(
        !service.bundle("two").join("rootfs/written").exists(),
        "each bundle has a writable layer of its own"
    );
}

#[test]
fn images_of_a_pod_share_their_layers() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    let base = layer(&[("base", "b")]);
    registry.push("one:v1", &Made::of(&[base.clone(), layer(&[("one", "1")])]));
    registry.push("two:v1", &Made::of(&[base, layer(&[("two", "2")])]));
    let service = Service::start(&registry.insecure());
    service.pull(&registry.name("one:v1"), "one").unwrap();
    service.pull(&registry.name("two:v1"), "two").unwrap();
    assert_eq!(service.names("images/layers").len(), 3);
    let inode = |bundle: &str| fs::metadata(service.bundle(bundle).join("rootfs/base")).unwrap().ino();
    assert_eq!(inode("one"), inode("two"));
}

#[test]
fn a_registry_that_demands_auth_gets_it_and_no_log_does() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants { auth: true, ..Wants::default() });
    let digest = registry.push("app:v1", &Made::file("f"));
    let name = registry.name("app:v1");
    let anonymous = Service::start(&registry.insecure());
    assert_eq!(anonymous.pull(&name, "one").unwrap_err().0, Code::UNAUTHENTICATED);
    let host = format!("127.0.0.1:{}", registry.port);
    for (password, expected) in
        [(PASSWORD, Ok(digest.to_string())), ("wr0ng-of-the-registry", Err(Code::UNAUTHENTICATED))]
    {
        let config = auth_file(registry.dir.path(), &host, password);
        let service = Service::start(&format!("log_level = \"debug\"\n{config}{}", registry.insecure()));
        let answer = service.pull(&name, "one");
        let words = answer.as_ref().err().map(|(_, words)| words.clone()).unwrap_or_default();
        assert_eq!(answer.map_err(|(code, _)| code), expected);
        let encoded = base64::engine::general_purpose::STANDARD.encode(format!("{USER}:{password}"));
        let log = service.log();
        assert!(log.contains("one"), "there is a log: {log}");
        for secret in [password, &encoded] {
            assert!(!log.contains(secret) && !words.contains(secret), "{secret} in {words} or {log}");
        }
    }
}

#[test]
fn a_file_of_credentials_that_is_not_there_is_named() {
    if !can_run(&["unshare"]) {
        return;
    }
    let service = Service::start("auth_file = \"/nonexistent/auth.json\"\n");
    let (code, words) = service.pull("127.0.0.1:1/app:v1", "one").unwrap_err();
    assert_eq!(code, Code::UNAUTHENTICATED);
    assert!(words.contains("/nonexistent/auth.json"), "{words}");
}

#[test]
fn a_certificate_counts_where_its_authority_is_known_by_name_too() {
    if !can_run(&["docker-registry", "unshare", "openssl"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants { tls: true, ..Wants::default() });
    let digest = registry.push("app:v1", &Made::file("f"));
    let name = registry.name("app:v1");
    assert!(name.starts_with("localhost:"), "{name}");
    let (code, words) = Service::start("").pull(&name, "one").unwrap_err();
    assert!(code == Code::UNAVAILABLE || code == Code::INTERNAL, "{code:?} {words}");
    let authority = registry.dir.path().join("ca.pem");
    let config = format!("ca_files = [\"{}\"]\n", authority.display());
    assert_eq!(Service::start(&config).pull(&name, "one"), Ok(digest.to_string()));
    let own =
        format!("[registries.\"localhost:{}\"]\nca_files = [\"{}\"]\n", registry.port, authority.display());
    assert_eq!(Service::start(&own).pull(&name, "one"), Ok(digest.to_string()));
}

#[test]
fn a_guest_that_knows_no_authority_says_so_at_each_pull_and_the_service_goes_on() {
    if !can_run(&["docker-registry", "unshare", "openssl"]) {
        return;
    }
    let secure = LocalRegistry::start(Wants { tls: true, ..Wants::default() });
    secure.push("app:v1", &Made::file("secure"));
    let own = format!("ca_files = [\"{}\"]\n", secure.dir.path().join("ca.pem").display());
    for config in [String::new(), secure.insecure(), own] {
        let service = Service::start_without_authorities(&config);
        for bundle in ["one", "two"] {
            let (_, words) = service.pull(&secure.name("app:v1"), bundle).unwrap_err();
            assert!(words.contains("cannot set up HTTPS") && words.contains("No CA certificates"), "{words}");
        }
    }
}

#[test]
fn plain_http_is_not_spoken_unasked() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    registry.push("app:v1", &Made::file("f"));
    assert!(Service::start("").pull(&registry.name("app:v1"), "one").is_err());
}

/// What cosign would leave for `image` in the repository `reference`, signed with the key in `dir`.
fn signature(dir: &Path, image: &Digest, reference: &str) -> Made {
    let payload = json!({
        "critical": {
            "identity": { "docker-reference": reference },
            "image": { "docker-manifest-digest": image },
            "type": "cosign container image signature",
        },
        "optional": null,
    })
    .to_string();
    fs::write(dir.join("payload"), &payload).unwrap();
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    run("openssl", &["dgst", "-sha256", "-sign", &file("key"), "-out", &file("signature"), &file("payload")]);
    let signature =
        base64::engine::general_purpose::STANDARD.encode(fs::read(dir.join("signature")).unwrap());
    let config = b"{}".to_vec();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.dev.cosign.simplesigning.v1+json",
            "digest": Digest::of(payload.as_bytes()), "size": payload.len(),
            "annotations": { "dev.cosignproject.cosign/signature": signature },
        }],
    });
    Made { blobs: vec![config, payload.into_bytes()], manifest: manifest.to_string().into_bytes() }
}

fn key(dir: &Path, name: &str) -> String {
    fs::create_dir_all(dir).unwrap();
    let file = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    run(
        "openssl",
        &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", &file("key")],
    );
    run("openssl", &["pkey", "-in", &file("key"), "-pubout", "-out", &file(name)]);
    file(name)
}

#[test]
fn only_what_the_key_has_signed_is_pulled_where_the_rules_say_so() {
    if !can_run(&["docker-registry", "unshare", "openssl"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    let (ours, theirs) = (registry.dir.path().join("ours"), registry.dir.path().join("theirs"));
    let public = key(&ours, "public.pem");
    key(&theirs, "public.pem");
    let push = |image: &str, content: &str| registry.push(&format!("{image}:v1"), &Made::file(content));
    let sign = |image: &str, digest: &Digest, with: &Path, reference: &str| {
        registry.push(
            &format!("{image}:sha256-{}.sig", digest.hex()),
            &signature(with, digest, &registry.name(reference)),
        );
    };
    let signed = push("signed/good", "good");
    sign("signed/good", &signed, &ours, "signed/good");
    let foreign = push("signed/foreign", "foreign");
    sign("signed/foreign", &foreign, &theirs, "signed/foreign");
    let moved = push("signed/moved", "moved");
    sign("signed/moved", &moved, &ours, "signed/elsewhere");
    let replayed = push("signed/replayed", "replayed");
    registry.push(
        &format!("signed/replayed:sha256-{}.sig", replayed.hex()),
        &signature(&ours, &signed, &registry.name("signed/replayed")),
    );
    push("signed/unsigned", "unsigned");
    push("signed/bad", "bad");
    let free = push("free", "free");
    let host = format!("127.0.0.1:{}", registry.port);
    let service = Service::start(&format!(
        "{}[signatures]\ndefault = \"reject\"\n\
         [[signatures.rule]]\nscope = \"{host}/signed\"\npolicy = \"cosign\"\nkeys = [\"{public}\"]\n\
         [[signatures.rule]]\nscope = \"{host}/signed/bad\"\npolicy = \"reject\"\n\
         [[signatures.rule]]\nscope = \"{host}/free\"\npolicy = \"accept\"\n",
        registry.insecure()
    ));
    let pull = |image: &str| service.pull(&registry.name(&format!("{image}:v1")), &image.replace('/', "-"));
    assert_eq!(pull("signed/good"), Ok(signed.to_string()));
    assert_eq!(pull("free"), Ok(free.to_string()));
    for (image, words) in [
        ("signed/unsigned", "has no signature at sha256-"),
        ("signed/foreign", "by none of the keys"),
        ("signed/moved", "signed/elsewhere"),
        ("signed/replayed", "it signs sha256:"),
        ("signed/bad", "not to be pulled"),
        ("other", "cannot pull"),
    ] {
        let (code, text) = pull(image).unwrap_err();
        assert!(text.contains(words), "{image}: {text}");
        let expected = if image == "other" { Code::NOT_FOUND } else { Code::PERMISSION_DENIED };
        assert_eq!(code, expected, "{image}: {text}");
    }
    push("other", "other");
    assert_eq!(pull("other").unwrap_err().0, Code::PERMISSION_DENIED, "what no rule names");
    assert_eq!(service.names("images/layers").len(), 2, "no layer of what was refused was kept");
}

#[test]
fn a_mirror_serves_and_the_registry_itself_where_the_mirror_cannot() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let (origin, mirror) = (LocalRegistry::start(Wants::default()), LocalRegistry::start(Wants::default()));
    let only_there = origin.push("only-there:v1", &Made::file("there"));
    let mirrored = mirror.push("mirrored:v1", &Made::file("mirrored"));
    let (here, there) = (mirror.port, origin.port);
    let dead = free_port();
    let config = format!(
        "[registries.\"127.0.0.1:{there}\"]\ninsecure = true\nmirrors = [\"127.0.0.1:{dead}\", \"127.0.0.1:{here}\"]\n{}",
        mirror.insecure()
    );
    let service = Service::start(&config);
    assert_eq!(service.pull(&origin.name("mirrored:v1"), "one"), Ok(mirrored.to_string()));
    assert_eq!(service.pull(&origin.name("only-there:v1"), "two"), Ok(only_there.to_string()));
}

#[test]
fn what_the_registry_does_not_have_is_not_found() {
    if !can_run(&["docker-registry", "unshare"]) {
        return;
    }
    let registry = LocalRegistry::start(Wants::default());
    let service = Service::start(&registry.insecure());
    let (code, words) = service.pull(&registry.name("missing:v1"), "one").unwrap_err();
    assert_eq!(code, Code::NOT_FOUND, "{words}");
    assert!(words.contains("missing:v1"), "{words}");
    let away = format!("127.0.0.1:{}/app:v1", free_port());
    assert_eq!(service.pull(&away, "one").unwrap_err().0, Code::UNAVAILABLE);
    assert_eq!(service.pull("not a reference", "one").unwrap_err().0, Code::INVALID_ARGUMENT);
}
