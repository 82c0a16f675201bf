//! Registries that lie, stall or want too much.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking"
)]

mod support;

use std::time::{Duration, Instant};

use kata_api::guest_services::ImagePullRequest;
use support::liar::{Answer, Liar, image};
use support::{Code, Made, Service, can_run, layer, runtime, wait_for};

/// Code and words of the refusal to pull from `liar`, of which nothing is left.
fn refused(liar: &Liar, config: &str) -> (Code, String) {
    let service = Service::start(&format!("{config}{}", liar.insecure()));
    let refused = service.pull(&liar.name("app:v1"), "one").unwrap_err();
    assert_eq!(service.left(), Vec::<String>::new(), "{refused:?}");
    refused
}

#[test]
fn a_layer_with_another_digest_is_refused() {
    if !can_run(&["unshare"]) {
        return;
    }
    let liar = image(Made::file("good"), |index| {
        (index == 0).then(|| Answer::Bytes(Made::file("evil").blobs.swap_remove(0)))
    });
    let (code, words) = refused(&liar, "");
    assert_eq!(code, Code::DATA_LOSS, "{words}");
}

#[test]
fn a_layer_with_another_content_than_the_configuration_says_is_refused() {
    if !can_run(&["unshare"]) {
        return;
    }
    // Blob and digest fit; what is inside is not what the image was made of.
    let (stored, _) = layer(&[("file", "evil")]);
    let (_, claimed) = layer(&[("file", "good")]);
    let liar = image(Made::of(&[(stored, claimed)]), |_| None);
    let (code, words) = refused(&liar, "");
    assert_eq!(code, Code::DATA_LOSS, "{words}");
}

#[test]
fn a_manifest_with_another_digest_than_asked_for_is_refused() {
    if !can_run(&["unshare"]) {
        return;
    }
    let liar = image(Made::file("evil"), |_| None);
    let service = Service::start(&liar.insecure());
    let good = Made::file("good").digest();
    let (code, words) = service.pull(&liar.name(&format!("app@{good}")), "one").unwrap_err();
    assert_eq!(code, Code::DATA_LOSS, "{words}");
}

#[test]
fn endless_redirects_end_and_their_signed_links_are_in_no_log() {
    if !can_run(&["unshare"]) {
        return;
    }
    let liar = image(Made::file("f"), |index| {
        (index == 0).then(|| {
            Answer::Status(
                "307 Temporary Redirect",
                "Location: /again?X-Signature=t0ken-of-the-link".to_owned(),
            )
        })
    });
    // Also what the redirect leads to.
    let again = Liar::start(|_| {
        Answer::Status("307 Temporary Redirect", "Location: /again?X-Signature=t0ken-of-the-link".to_owned())
    });
    for liar in [liar, again] {
        let service = Service::start(&format!("log_level = \"debug\"\n{}", liar.insecure()));
        let (code, words) = service.pull(&liar.name("app:v1"), "one").unwrap_err();
        assert!(matches!(code, Code::UNAVAILABLE | Code::NOT_FOUND), "{code:?} {words}");
        let log = service.log();
        assert!(log.contains("cannot pull"), "{log}");
        assert!(!log.contains("t0ken-of-the-link") && !words.contains("t0ken-of-the-link"), "{words}\n{log}");
        assert_eq!(service.left(), Vec::<String>::new());
    }
}

#[test]
fn a_download_that_ends_early_is_refused() {
    if !can_run(&["unshare"]) {
        return;
    }
    for which in [0, 1] {
        let made = Made::file(&"f".repeat(10_000));
        let blob = made.blobs[which].clone();
        let liar = image(made, move |index| (index == which).then(|| Answer::Half(blob.clone())));
        let (code, words) = refused(&liar, "");
        assert!(matches!(code, Code::UNAVAILABLE | Code::DATA_LOSS), "{code:?} {words}");
    }
}

#[test]
fn a_registry_that_stalls_is_given_up() {
    if !can_run(&["unshare"]) {
        return;
    }
    for stage in ["manifests", "blobs"] {
        let made = Made::file("f");
        let manifest = made.manifest.clone();
        let liar = Liar::start(move |path| match path {
            _ if path.contains(stage) => Answer::Stall,
            "/v2/" => Answer::Bytes(Vec::new()),
            _ => Answer::Bytes(manifest.clone()),
        });
        let began = Instant::now();
        let (code, words) = refused(&liar, "[limits]\nstall_seconds = 1\n");
        assert_eq!(code, Code::UNAVAILABLE, "{words}");
        assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    }
}

#[test]
fn a_registry_that_never_stops_nor_ends_is_given_up() {
    if !can_run(&["unshare"]) {
        return;
    }
    let liar = image(Made::file("f"), |index| (index == 0).then_some(Answer::Trickle));
    let service = Service::start(&format!("[limits]\npull_seconds = 2\n{}", liar.insecure()));
    let (code, words) = service.pull(&liar.name("app:v1"), "one").unwrap_err();
    assert_eq!(code, Code::DEADLINE_EXCEEDED, "{words}");
    wait_for("the end of the pull", || service.left().is_empty());
}

#[test]
fn a_bomb_is_refused() {
    if !can_run(&["unshare"]) {
        return;
    }
    let zeros = "\0".repeat(8 << 20);
    let liar = image(Made::of(&[layer(&[("zeros", &zeros)])]), |_| None);
    let (code, words) = refused(&liar, "[limits]\nbytes = 1048576\n");
    assert_eq!(code, Code::RESOURCE_EXHAUSTED, "{words}");
}

#[test]
fn more_files_and_layers_than_allowed_are_refused() {
    if !can_run(&["unshare"]) {
        return;
    }
    let many: Vec<(String, &str)> = (0..20).map(|n| (n.to_string(), "")).collect();
    let many: Vec<(&str, &str)> = many.iter().map(|(name, content)| (name.as_str(), *content)).collect();
    let liar = image(Made::of(&[layer(&many)]), |_| None);
    assert_eq!(refused(&liar, "[limits]\nentries = 10\n").0, Code::RESOURCE_EXHAUSTED);
    let layers: Vec<_> = (0..5).map(|n| layer(&[(n.to_string().as_str(), "")])).collect();
    let liar = image(Made::of(&layers), |_| None);
    assert_eq!(refused(&liar, "[limits]\nlayers = 4\n").0, Code::RESOURCE_EXHAUSTED);
    assert!(
        !liar.seen.lock().unwrap().contains(kata_oci::Digest::of(&layers[0].0).hex()),
        "not even asked for"
    );
}

#[test]
fn a_hostile_archive_writes_nothing_outside() {
    if !can_run(&["unshare"]) {
        return;
    }
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(1);
    header.set_mode(0o644);
    header.as_old_mut().name[..11].copy_from_slice(b"../../evil\0");
    header.set_cksum();
    tar.append(&header, &b"x"[..]).unwrap();
    let tar = tar.into_inner().unwrap();
    let liar = image(Made::of(&[(tar.clone(), tar)]), |_| None);
    let service = Service::start(&liar.insecure());
    let (code, words) = service.pull(&liar.name("app:v1"), "one").unwrap_err();
    assert_eq!(code, Code::INTERNAL);
    assert!(words.contains("leads out of the layer"), "{words}");
    assert!(
        !service.dir.path().join("work/images/evil").exists()
            && !service.dir.path().join("work/evil").exists()
    );
}

#[test]
fn a_registry_that_lets_nobody_in_is_told_from_one_that_is_away() {
    if !can_run(&["unshare"]) {
        return;
    }
    for challenge in
        ["Basic realm=\"r\"", "Bearer realm=\"http://127.0.0.1:1/token\",service=\"s\"", "Nonsense"]
    {
        let liar = Liar::start(move |_| {
            Answer::Status("401 Unauthorized", format!("WWW-Authenticate: {challenge}"))
        });
        let (code, words) = refused(&liar, "");
        assert_eq!(code, Code::UNAUTHENTICATED, "{challenge}: {words}");
    }
}

#[test]
fn a_mirror_does_not_get_the_registrys_password() {
    if !can_run(&["unshare"]) {
        return;
    }
    let mirror =
        Liar::start(|_| Answer::Status("401 Unauthorized", "WWW-Authenticate: Basic realm=\"r\"".to_owned()));
    let origin =
        Liar::start(|_| Answer::Status("401 Unauthorized", "WWW-Authenticate: Basic realm=\"r\"".to_owned()));
    let (there, here) = (origin.port, mirror.port);
    let dir = tempfile::tempdir().unwrap();
    let auth = dir.path().join("auth.json");
    let text = format!("{{\"auths\": {{\"127.0.0.1:{there}\": {{\"auth\": \"dTpwYXNz\"}}}}}}");
    std::fs::write(&auth, text).unwrap();
    let service = Service::start(&format!(
        "auth_file = \"{}\"\n[registries.\"127.0.0.1:{there}\"]\ninsecure = true\nmirrors = [\"127.0.0.1:{here}\"]\n{}",
        auth.display(),
        mirror.insecure()
    ));
    assert_eq!(service.pull(&origin.name("app:v1"), "one").unwrap_err().0, Code::UNAUTHENTICATED);
    assert!(origin.seen.lock().unwrap().contains("dTpwYXNz"), "the registry itself gets it");
    let seen = mirror.seen.lock().unwrap();
    assert!(seen.contains("GET") && !seen.contains("dTpwYXNz"), "{seen}");
}

#[test]
fn a_caller_that_goes_away_ends_its_pull_and_the_service_goes_on() {
    if !can_run(&["unshare"]) {
        return;
    }
    let made = Made::of(&[layer(&[("a", "a")]), layer(&[("b", "b")])]);
    let liar = image(made, |index| (index == 1).then_some(Answer::Stall));
    let good = image(Made::file("good"), |_| None);
    let service = Service::start(&format!("concurrency = 1\n{}{}", liar.insecure(), good.insecure()));
    runtime().block_on(async {
        let client = service.client().await;
        let request = ImagePullRequest {
            image_url: liar.name("app:v1"),
            bundle_path: service.dir.path().join("bundles/one").to_str().unwrap().to_owned(),
            ..Default::default()
        };
        let context = ttrpc::context::with_duration(Duration::from_secs(60));
        let pull = client.pull_image(context, &request);
        assert!(tokio::time::timeout(Duration::from_secs(2), pull).await.is_err(), "it stalls");
    });
    // The only slot is free again; layers that are whole may stay.
    service.pull(&good.name("app:v1"), "two").unwrap();
    wait_for("the end of the pull", || service.names("images/locks").is_empty());
    assert!(service.names("images/layers").iter().all(|name| !name.contains("partial")));
    assert_eq!(service.names("roots").len(), 1);
}
