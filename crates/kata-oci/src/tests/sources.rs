//! Layouts, archives and the store.

use super::*;

fn layer(files: &[(&str, &str)]) -> (Vec<u8>, Vec<u8>) {
    let tar = files.iter().fold(Tar::new(), |tar, (path, content)| tar.file(path, content)).bytes();
    (gzip(&tar), tar)
}

#[test]
fn sources_are_told_apart() {
    let parse = |text: &str| text.parse::<ImageSource>();
    let layout = |dir: &str, tag: Option<&str>| {
        Ok(ImageSource::OciLayout { dir: dir.into(), tag: tag.map(str::to_owned) })
    };
    assert_eq!(parse("oci:/a/b"), layout("/a/b", None));
    assert_eq!(parse("oci:/a/b:v1"), layout("/a/b", Some("v1")));
    assert_eq!(parse("oci:/a:b/c"), layout("/a:b/c", None));
    assert_eq!(parse("docker-archive:/x.tar"), Ok(ImageSource::DockerArchive { file: "/x.tar".into() }));
    for reference in ["busybox", "localhost:5000/a/b:v1", "r.test/a@sha256:00"] {
        assert_eq!(parse(reference), Ok(ImageSource::Registry { reference: reference.to_owned() }));
    }
    assert_eq!(parse("docker://busybox"), Ok(ImageSource::Registry { reference: "busybox".to_owned() }));
    for bad in ["oci:", "docker-archive:", "dir:/x", "oci-archive:/x", "", "-x", "a b", "ä", "/abs"] {
        assert!(parse(bad).is_err(), "{bad:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let colon = dir.path().join("a:b");
    fs::create_dir(&colon).unwrap();
    let text = colon.to_str().unwrap();
    assert_eq!(parse(&format!("oci:{text}")), layout(text, None), "a directory of that name wins over a tag");
}

#[test]
fn layers_are_unpacked_once_and_shared_by_chain() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let (base, top) = (layer(&[("base", "b")]), layer(&[("top", "t")]));
    write_layout(&place.path("one"), &[base.clone(), top.clone()]);
    write_layout(&place.path("two"), &[base, top.clone()]);
    write_layout(&place.path("alone"), &[top]);
    let one = place.layout("one", None).unwrap();
    assert_eq!(fs::read_to_string(one.layers[0].join("top")).unwrap(), "t", "topmost first");
    assert_eq!(fs::read_to_string(one.layers[1].join("base")).unwrap(), "b");
    // The blobs are not read again.
    fs::remove_dir_all(place.path("two/blobs")).unwrap();
    write_layout(&place.path("two"), &[layer(&[("base", "b")]), layer(&[("top", "t")])]);
    let before = fs::metadata(&one.layers[0]).unwrap().ino();
    let two = place.layout("two", Some("latest")).unwrap();
    assert_eq!(one.layers, two.layers);
    assert_eq!(fs::metadata(&two.layers[0]).unwrap().ino(), before);
    let alone = place.layout("alone", None).unwrap();
    assert_ne!(alone.layers[0], one.layers[0], "the same layer over others is another one");
    assert_eq!(place.stored().len(), 3, "{:?}", place.stored());
    assert_eq!(fs::metadata(place.path("state/images/layers")).unwrap().mode() & 0o777, 0o700);
    assert_eq!(one.config.config.unwrap().cmd.unwrap(), ["/bin/x"]);
}

#[test]
fn plain_gzip_and_zstd_layers_are_read_whatever_the_manifest_calls_them() {
    if !is_root() {
        return;
    }
    let tar = |name: &str| Tar::new().file(name, name).bytes();
    let place = Place::new();
    let twice = [gzip(&tar("c")[..700]), gzip(&tar("c")[700..])].concat();
    let zstd = zstd::encode_all(tar("b").as_slice(), 3).unwrap();
    let layers = [(tar("a"), tar("a")), (zstd, tar("b")), (twice, tar("c"))];
    write_layout(&place.path("mixed"), &layers);
    let image = place.layout("mixed", None).unwrap();
    for (dir, name) in image.layers.iter().rev().zip(["a", "b", "c"]) {
        assert_eq!(fs::read_to_string(dir.join(name)).unwrap(), name);
    }
}

#[test]
fn a_corrupt_layer_is_named_with_both_digests_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let (stored, _) = layer(&[("file", &"content ".repeat(1000))]);
    let expected = Digest::of(&stored);
    let mut flipped = stored.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    let (other, _) = layer(&[("file", "something else")]);
    for (bad, what) in [
        (flipped.clone(), Some(Digest::of(&flipped))),
        (stored[..middle].to_vec(), Some(Digest::of(&stored[..middle]))),
        (other.clone(), Some(Digest::of(&other))),
        (Vec::new(), Some(Digest::of(b""))),
        ([stored.clone(), b"more".to_vec()].concat(), None),
    ] {
        let place = Place::new();
        write_layout(&place.path("x"), &[layer(&[("file", &"content ".repeat(1000))])]);
        fs::write(place.path("x/blobs/sha256").join(expected.hex()), &bad).unwrap();
        let error = place.layout("x", None).unwrap_err();
        let text = chain(&error);
        assert!(text.contains(&format!("layer {expected} is corrupt")), "{text}");
        match what {
            Some(actual) => assert!(text.contains(&actual.to_string()), "{text}"),
            None => assert!(matches!(error, ImageError::Blob(BlobError::Size { .. })), "{text}"),
        }
        assert_eq!(place.stored(), Vec::<String>::new());
    }
}

#[test]
fn a_layer_with_another_content_than_its_diff_id_says_is_refused() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let (stored, tar) = layer(&[("file", "real")]);
    let (_, claimed) = layer(&[("file", "claimed")]);
    write_layout(&place.path("x"), &[(stored, claimed.clone())]);
    let error = place.layout("x", None).unwrap_err();
    let ImageError::Blob(BlobError::Mismatch { expected, actual, .. }) = error else { panic!("{error}") };
    assert_eq!((expected, actual), (Digest::of(&claimed), Digest::of(&tar)));
    assert_eq!(place.stored(), Vec::<String>::new());
}

#[test]
fn a_layer_that_leads_out_of_itself_leaves_nothing() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let tar = Tar::new().file("good", "g").file("../bad", "b").bytes();
    write_layout(&place.path("x"), &[(gzip(&tar), tar)]);
    let text = chain(&place.layout("x", None).unwrap_err());
    assert!(text.contains("../bad leads out of the layer"), "{text}");
    assert_eq!(place.stored(), Vec::<String>::new());
    assert!(!place.path("state/images/layers/bad").exists());
}

#[test]
fn a_corrupt_manifest_or_configuration_is_refused() {
    let place = Place::new();
    write_layout(&place.path("x"), &[layer(&[("f", "f")])]);
    let index: spec::Index = serde_json::from_slice(&fs::read(place.path("x/index.json")).unwrap()).unwrap();
    let path = place.path("x/blobs/sha256").join(index.manifests[0].digest.hex());
    let mut bytes = fs::read(&path).unwrap();
    bytes[20] ^= 1;
    fs::write(&path, bytes).unwrap();
    let text = chain(&place.layout("x", None).unwrap_err());
    assert!(
        text.contains("manifest is corrupt") && text.contains(&index.manifests[0].digest.to_string()),
        "{text}"
    );
}

#[test]
fn what_is_not_in_an_index_is_told_with_what_is() {
    let place = Place::new();
    write_layout(&place.path("x"), &[layer(&[("f", "f")])]);
    let text = chain(&place.layout("x", Some("v2")).unwrap_err());
    assert!(text.contains("tagged \"v2\"") && text.contains("latest"), "{text}");
    let text = chain(&place.layout("nowhere", None).unwrap_err());
    assert!(text.contains("nowhere/index.json") && text.contains("No such file"), "{text}");
}

#[test]
fn an_image_for_another_machine_is_refused() {
    let config = br#"{"architecture": "s390x", "os": "linux", "rootfs": {"diff_ids": []}}"#;
    assert!(
        matches!(spec::parse_config(config, 0), Err(ImageError::Platform { found, .. }) if found == "linux/s390x")
    );
    let index: spec::Index = serde_json::from_value(serde_json::json!({ "manifests": [
        { "digest": Digest::of(b"a"), "size": 1, "platform": { "architecture": "s390x", "os": "linux" } },
        { "digest": Digest::of(b"b"), "size": 1, "platform": { "architecture": spec::Platform::host().architecture, "os": "linux" } },
        { "digest": Digest::of(b"c"), "size": 1, "platform": { "architecture": "unknown", "os": "unknown" } },
    ] })).unwrap();
    assert_eq!(index.for_host("x").unwrap().digest, Digest::of(b"b"));
}

#[test]
fn an_interrupt_stops_unpacking_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    write_layout(&place.path("x"), &[layer(&[("f", "f")])]);
    let interrupt = Interrupt::default();
    let store = Store::open(&place.path("state"), interrupt.clone()).unwrap();
    interrupt.set();
    let layout = layout::Layout::open(&place.path("x"), None).unwrap();
    assert!(matches!(materialise(&layout, &store), Err(ImageError::Interrupted)));
    assert_eq!(place.stored(), Vec::<String>::new());
}

#[test]
fn two_at_once_unpack_a_layer_once() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    write_layout(&place.path("x"), &[layer(&[("f", &"f".repeat(100_000))])]);
    let layers: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| place.layout("x", None).unwrap().layers)).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert!(layers.windows(2).all(|pair| pair[0] == pair[1]));
    assert_eq!(place.stored().len(), 1);
}

#[test]
fn what_a_killed_process_left_is_taken_over() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let ids = write_layout(&place.path("x"), &[layer(&[("f", "f")])]);
    let left = place.path("state/images/layers").join(ids[0].hex()).with_extension("partial");
    fs::create_dir_all(left.join("half")).unwrap();
    let image = place.layout("x", None).unwrap();
    assert!(image.layers[0].join("f").is_file() && !image.layers[0].join("half").exists());
    assert!(!left.exists());
}

#[test]
fn a_sweep_removes_what_nobody_is_at() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let layers = place.path("state/images/layers");
    for name in ["busy", "left"] {
        fs::create_dir_all(layers.join(name).with_extension("partial")).unwrap();
    }
    fs::create_dir(layers.join("whole")).unwrap();
    let busy = fs::File::create(place.path("state/images/locks/busy")).unwrap();
    rustix::fs::flock(&busy, rustix::fs::FlockOperation::LockExclusive).unwrap();
    place.store.sweep().unwrap();
    assert_eq!(place.stored(), ["busy", "busy.partial", "whole"]);
}

#[test]
fn more_layers_than_an_image_may_have_are_refused_before_one_is_read() {
    let place = Place::new();
    write_layout(&place.path("x"), &[layer(&[("a", "a")]), layer(&[("b", "b")])]);
    let store = place.store.clone().within(Limits { layers: 1, ..Limits::default() });
    let layout = layout::Layout::open(&place.path("x"), None).unwrap();
    let refused = materialise(&layout, &store);
    assert!(
        matches!(refused, Err(ImageError::Store(StoreError::Layers { found: 2, limit: 1 }))),
        "{refused:?}"
    );
}

#[test]
fn a_bomb_is_given_up_at_the_limit_and_leaves_nothing() {
    if !is_root() {
        return;
    }
    let place = Place::new();
    let zeros = "\0".repeat(8 << 20);
    write_layout(&place.path("x"), &[layer(&[("zeros", &zeros)])]);
    let store = place.store.clone().within(Limits { bytes: 1 << 20, ..Limits::default() });
    let layout = layout::Layout::open(&place.path("x"), None).unwrap();
    let text = chain(&materialise(&layout, &store).unwrap_err());
    assert!(text.contains("more bytes than an image may have"), "{text}");
    assert_eq!(place.stored(), Vec::<String>::new());
}

/// An image as umoci makes it: two layers, the upper one removing a file of the lower one.
fn umoci_image(place: &Place) -> String {
    let (layout, bundle) = (place.path("layout"), place.path("bundle"));
    let (layout, bundle) = (layout.to_str().unwrap(), bundle.to_str().unwrap());
    let image = format!("{layout}:test");
    tool("umoci", &["init", "--layout", layout]);
    tool("umoci", &["new", "--image", &image]);
    tool("umoci", &["unpack", "--image", &image, bundle]);
    let root = place.path("bundle/rootfs");
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/kept"), "kept").unwrap();
    fs::write(root.join("etc/gone"), "gone").unwrap();
    fs::set_permissions(root.join("etc/kept"), fs::Permissions::from_mode(0o2640)).unwrap();
    tool("umoci", &["repack", "--refresh-bundle", "--image", &image, bundle]);
    fs::remove_file(root.join("etc/gone")).unwrap();
    fs::write(root.join("etc/new"), "new").unwrap();
    tool("umoci", &["repack", "--image", &image, bundle]);
    tool("umoci", &["config", "--image", &image, "--config.cmd", "sh", "--config.user", "7:8"]);
    image
}

fn check_umoci_image(image: &Image) {
    assert_eq!(image.layers.len(), 2);
    let [top, base] = image.layers.as_slice() else { panic!("two layers") };
    assert_eq!(fs::read_to_string(base.join("etc/gone")).unwrap(), "gone");
    assert_eq!(fs::metadata(base.join("etc/kept")).unwrap().mode() & 0o7777, 0o2640);
    assert!(fs::symlink_metadata(top.join("etc/gone")).unwrap().file_type().is_char_device());
    assert_eq!(fs::read_to_string(top.join("etc/new")).unwrap(), "new");
    let defaults = image.config.config.as_ref().unwrap();
    assert_eq!(defaults.user.as_deref(), Some("7:8"));
    assert_eq!(defaults.cmd.as_deref(), Some(["sh".to_owned()].as_slice()));
}

#[test]
fn an_image_that_umoci_made_is_read() {
    if !is_root() || !have(&["umoci"]) {
        return;
    }
    let place = Place::new();
    umoci_image(&place);
    check_umoci_image(&place.layout("layout", Some("test")).unwrap());
    check_umoci_image(&place.layout("layout", None).unwrap());
}

#[test]
fn an_archive_that_skopeo_made_is_read() {
    if !is_root() || !have(&["umoci", "skopeo"]) {
        return;
    }
    let place = Place::new();
    let image = umoci_image(&place);
    let archive = place.path("image.tar");
    let to = format!("docker-archive:{}:name:tag", archive.display());
    tool("skopeo", &["--insecure-policy", "copy", &format!("oci:{image}"), &to]);
    let contents = docker_archive::DockerArchive::open(&archive).unwrap();
    check_umoci_image(&materialise(&contents, &place.store).unwrap());
    // One flipped byte in a layer is found by its diff id.
    let mut bytes = fs::read(&archive).unwrap();
    let at = bytes.windows(4).position(|window| window == b"kept").unwrap();
    let at = at + bytes[at + 4..].windows(4).position(|window| window == b"kept").map_or(0, |next| next + 4);
    bytes[at] ^= 1;
    let broken = place.path("broken.tar");
    fs::write(&broken, bytes).unwrap();
    let store = Store::open(&place.path("other"), Interrupt::default()).unwrap();
    let broken =
        docker_archive::DockerArchive::open(&broken).and_then(|contents| materialise(&contents, &store));
    assert!(broken.is_err());
    assert_eq!(fs::read_dir(place.path("other/images/layers")).unwrap().count(), 0);
}

#[test]
fn an_archive_without_what_it_names_is_refused() {
    let place = Place::new();
    let archive = place.path("x.tar");
    let manifest = r#"[{"Config": "config.json", "RepoTags": null, "Layers": []}]"#;
    fs::write(&archive, Tar::new().file("manifest.json", manifest).bytes()).unwrap();
    let error = docker_archive::DockerArchive::open(&archive).err().unwrap();
    assert!(matches!(&error, ImageError::Missing { member, .. } if member == "config.json"), "{error}");
    let two = r#"[{"Config": "a", "RepoTags": ["x:1"], "Layers": []}, {"Config": "b", "RepoTags": ["y:1"], "Layers": []}]"#;
    fs::write(&archive, Tar::new().file("manifest.json", two).bytes()).unwrap();
    let text = docker_archive::DockerArchive::open(&archive).err().unwrap().to_string();
    assert!(text.contains("x:1, y:1"), "{text}");
}
