//! Single layers, and how they lie over one another.

use super::*;
use crate::unpack::Budget;

/// Unpacks each stream over the ones before; their directories, lowest first.
fn unpack_all(streams: &[Vec<u8>]) -> Result<(tempfile::TempDir, Vec<PathBuf>), UnpackError> {
    unpack_within(Budget { bytes: u64::MAX, entries: u64::MAX }, streams)
}

/// The same, where all streams together may need no more than `budget`.
fn unpack_within(
    mut budget: Budget,
    streams: &[Vec<u8>],
) -> Result<(tempfile::TempDir, Vec<PathBuf>), UnpackError> {
    let dir = tempfile::tempdir().unwrap();
    let mut layers: Vec<PathBuf> = Vec::new();
    for (index, stream) in streams.iter().enumerate() {
        let layer = dir.path().join(index.to_string());
        fs::create_dir(&layer).unwrap();
        let lowers: Vec<PathBuf> = layers.iter().rev().cloned().collect();
        unpack::unpack(stream.as_slice(), &layer, &lowers, &mut budget)?;
        layers.push(layer);
    }
    Ok((dir, layers))
}

fn unpack_one(stream: Tar) -> Result<(tempfile::TempDir, PathBuf), UnpackError> {
    unpack_all(&[stream.bytes()]).map(|(dir, mut layers)| (dir, layers.remove(0)))
}

fn is_whiteout(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_char_device() && found.rdev() == 0)
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = [0_u8; 64];
    rustix::fs::lgetxattr(path, name, &mut value).ok().map(|length| value[..length].to_vec())
}

fn is_opaque(path: &Path) -> bool {
    xattr(path, "trusted.overlay.opaque").as_deref() == Some(b"y")
}

#[test]
fn owner_mode_times_links_and_devices_are_kept() {
    if !is_root() {
        return;
    }
    let stream = Tar::new()
        .entry(
            "d",
            EntryType::Directory,
            |h| {
                h.set_mode(0o1751);
                h.set_uid(7);
                h.set_gid(8);
                h.set_mtime(1234);
            },
            b"",
        )
        .entry(
            "d/f",
            EntryType::Regular,
            |h| {
                h.set_mode(0o4755);
                h.set_uid(1000);
                h.set_gid(1001);
            },
            b"content",
        )
        .link(EntryType::Symlink, "d/s", "../anywhere/at/all")
        .link(EntryType::Link, "d/h", "d/f")
        .entry(
            "d/c",
            EntryType::Char,
            |h| {
                h.set_device_major(1).unwrap();
                h.set_device_minor(3).unwrap();
            },
            b"",
        )
        .entry(
            "d/b",
            EntryType::Block,
            |h| {
                h.set_device_major(8).unwrap();
                h.set_device_minor(1).unwrap();
            },
            b"",
        )
        .entry("d/p", EntryType::Fifo, |h| h.set_mode(0o600), b"");
    let (_dir, layer) = unpack_one(stream).unwrap();
    let stat = |name: &str| fs::symlink_metadata(layer.join(name)).unwrap();
    let (d, f) = (stat("d"), stat("d/f"));
    assert_eq!(
        (d.mode() & 0o7777, d.uid(), d.gid(), d.mtime()),
        (0o1751, 7, 8, 1234),
        "set after its entries were made"
    );
    assert_eq!((f.mode() & 0o7777, f.uid(), f.gid(), f.mtime()), (0o4755, 1000, 1001, 1_000_000_000));
    assert_eq!(fs::read_link(layer.join("d/s")).unwrap(), Path::new("../anywhere/at/all"));
    assert_eq!((stat("d/h").ino(), f.nlink()), (f.ino(), 2));
    assert!(stat("d/c").file_type().is_char_device() && stat("d/c").rdev() == rustix::fs::makedev(1, 3));
    assert!(stat("d/b").file_type().is_block_device() && stat("d/b").rdev() == rustix::fs::makedev(8, 1));
    assert!(stat("d/p").file_type().is_fifo());
}

#[test]
fn extended_attributes_and_exact_times_are_kept_and_overlays_own_are_not_taken() {
    if !is_root() {
        return;
    }
    let stream = Tar::new()
        .pax(&[
            ("SCHILY.xattr.user.note", b"\x00binary\xff"),
            (
                "SCHILY.xattr.security.capability",
                b"\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
            ),
            ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
            ("mtime", b"1500000000.25"),
        ])
        .file("f", "x");
    let (_dir, layer) = unpack_one(stream).unwrap();
    let file = layer.join("f");
    match xattr(&file, "user.note") {
        Some(note) => assert_eq!(note, b"\x00binary\xff"),
        None => eprintln!("skipped in part: the file system keeps no user attributes"),
    }
    assert!(xattr(&file, "security.capability").is_some(), "set after the owner, which clears it");
    assert_eq!(xattr(&file, "trusted.overlay.redirect"), None);
    let stat = fs::metadata(&file).unwrap();
    assert_eq!((stat.mtime(), stat.mtime_nsec()), (1_500_000_000, 250_000_000));
}

#[test]
fn nothing_leads_out_of_the_layer() {
    if !is_root() {
        return;
    }
    for bad in ["../escape", "a/../../escape", "/../escape", "a/.."] {
        let escaped = unpack_one(Tar::new().file(bad, "x"));
        assert!(
            matches!(&escaped, Err(UnpackError::Escape { path }) if path == Path::new(bad)),
            "{bad}: {escaped:?}"
        );
    }
    let escaped = unpack_one(Tar::new().link(EntryType::Link, "h", "../../etc/passwd"));
    assert!(matches!(escaped, Err(UnpackError::Escape { .. })));
}

#[test]
fn absolute_paths_are_relative_to_the_layer() {
    if !is_root() {
        return;
    }
    let stream = Tar::new().file("/abs", "1").file("./dot", "2").link(EntryType::Link, "h", "/abs");
    let (_dir, layer) = unpack_one(stream).unwrap();
    for name in ["abs", "dot", "h"] {
        assert!(layer.join(name).is_file(), "{name}");
    }
}

#[test]
fn links_in_the_layer_are_followed_inside_of_it_only() {
    if !is_root() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    let stream = Tar::new()
        .link(EntryType::Symlink, "abs", target)
        .file("abs/file", "inside")
        .link(EntryType::Symlink, "up", "../../../..")
        .file("up/other", "inside");
    let (_dir, layer) = unpack_one(stream).unwrap();
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    assert_eq!(
        fs::read_to_string(layer.join(target.trim_start_matches('/')).join("file")).unwrap(),
        "inside"
    );
    assert_eq!(fs::read_to_string(layer.join("other")).unwrap(), "inside", "the root's parent is the root");
}

#[test]
fn a_hard_link_does_not_reach_through_a_symbolic_link() {
    if !is_root() {
        return;
    }
    let stream = Tar::new().link(EntryType::Symlink, "s", "/etc/passwd").link(EntryType::Link, "h", "s");
    let (_dir, layer) = unpack_one(stream).unwrap();
    assert!(fs::symlink_metadata(layer.join("h")).unwrap().is_symlink());
}

#[test]
fn links_in_a_circle_are_an_error() {
    if !is_root() {
        return;
    }
    let stream =
        Tar::new().link(EntryType::Symlink, "a", "b").link(EntryType::Symlink, "b", "a").file("a/f", "x");
    assert!(matches!(unpack_one(stream), Err(UnpackError::Links { .. })));
}

#[test]
fn an_entry_below_a_file_is_an_error() {
    if !is_root() {
        return;
    }
    let found = unpack_one(Tar::new().file("f", "x").file("f/below", "y"));
    assert!(matches!(found, Err(UnpackError::NotADirectory { .. })), "{found:?}");
}

#[test]
fn a_later_entry_replaces_an_earlier_one_of_another_kind() {
    if !is_root() {
        return;
    }
    let stream = Tar::new()
        .dir("d")
        .file("d/inner", "x")
        .file("d", "now a file")
        .file("f", "x")
        .dir("f")
        .file("f/inner", "now a directory")
        .link(EntryType::Symlink, "s", "/etc/passwd")
        .file("s", "now a file");
    let (_dir, layer) = unpack_one(stream).unwrap();
    assert_eq!(fs::read_to_string(layer.join("d")).unwrap(), "now a file");
    assert_eq!(fs::read_to_string(layer.join("f/inner")).unwrap(), "now a directory");
    assert!(!layer.join("s").is_symlink());
}

#[test]
fn whiteouts_become_overlays() {
    if !is_root() {
        return;
    }
    let stream = Tar::new()
        .dir("d")
        .file("d/.wh.gone", "")
        .dir("o")
        .file("o/.wh..wh..opq", "")
        .file("o/kept", "k")
        .file(".wh..wh.plnk", "")
        .file(".wh.", "");
    let (_dir, layer) = unpack_one(stream).unwrap();
    assert!(is_whiteout(&layer.join("d/gone")));
    assert!(is_opaque(&layer.join("o")) && !is_opaque(&layer.join("d")));
    let names: Vec<_> = fs::read_dir(&layer).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "bookkeeping of AUFS is no file: {names:?}");
}

#[test]
fn what_is_removed_and_made_anew_in_one_layer_hides_what_is_below() {
    if !is_root() {
        return;
    }
    for stream in [
        Tar::new().file(".wh.d", "").dir("d").file("d/new", "n"),
        Tar::new().dir("d").file("d/new", "n").file(".wh.d", ""),
        Tar::new().file(".wh.d", "").file("d/new", "n"),
    ] {
        let (_dir, layers) =
            unpack_all(&[Tar::new().dir("d").file("d/old", "o").bytes(), stream.bytes()]).unwrap();
        assert!(is_opaque(&layers[1].join("d")));
        assert!(layers[1].join("d/new").is_file() && !layers[1].join("d/old").exists());
    }
    let (_dir, layer) = unpack_one(Tar::new().file(".wh.f", "").file("f", "new")).unwrap();
    assert_eq!(fs::read_to_string(layer.join("f")).unwrap(), "new");
}

#[test]
fn a_directory_that_the_stream_does_not_describe_is_like_the_one_below() {
    if !is_root() {
        return;
    }
    let base = Tar::new()
        .entry(
            "d",
            EntryType::Directory,
            |h| {
                h.set_mode(0o1777);
                h.set_uid(5);
                h.set_gid(6);
                h.set_mtime(77);
            },
            b"",
        )
        .bytes();
    let (_dir, layers) = unpack_all(&[base, Tar::new().file("d/f", "x").file("new/f", "y").bytes()]).unwrap();
    let d = fs::metadata(layers[1].join("d")).unwrap();
    assert_eq!((d.mode() & 0o7777, d.uid(), d.gid()), (0o1777, 5, 6));
    assert_eq!(fs::metadata(layers[1].join("new")).unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn a_link_of_a_lower_layer_is_followed() {
    if !is_root() {
        return;
    }
    let base = Tar::new().dir("usr").dir("usr/lib").link(EntryType::Symlink, "lib", "usr/lib").bytes();
    let (_dir, layers) = unpack_all(&[base, Tar::new().file("lib/x.so", "x").bytes()]).unwrap();
    assert!(layers[1].join("usr/lib/x.so").is_file());
    assert!(fs::symlink_metadata(layers[1].join("lib")).is_err(), "the link below stays visible");
}

#[test]
fn a_link_that_a_layer_in_between_removed_is_not_followed() {
    if !is_root() {
        return;
    }
    let base = Tar::new().dir("usr").link(EntryType::Symlink, "lib", "usr").bytes();
    let streams = [base, Tar::new().file(".wh.lib", "").bytes(), Tar::new().file("lib/x.so", "x").bytes()];
    let (_dir, layers) = unpack_all(&streams).unwrap();
    assert!(layers[2].join("lib/x.so").is_file());
}

#[test]
fn a_stream_that_is_cut_off_or_of_unknown_kind_is_an_error() {
    let whole = Tar::new().file("f", &"x".repeat(5000)).bytes();
    let cut = unpack_all(&[whole[..2000].to_vec()]);
    assert!(cut.is_err());
    let odd = unpack_one(Tar::new().entry("odd", EntryType::new(b'Q'), |_| {}, b""));
    assert!(!is_root() || matches!(odd, Err(UnpackError::Kind { kind: 'Q', .. })), "{odd:?}");
}

#[test]
fn an_image_with_more_files_than_it_may_have_is_refused() {
    if !is_root() {
        return;
    }
    let layers = [Tar::new().file("a", "").file("b", "").bytes(), Tar::new().file("c", "").bytes()];
    let within = |entries| unpack_within(Budget { bytes: u64::MAX, entries }, &layers);
    assert!(within(3).is_ok());
    assert!(matches!(within(2), Err(UnpackError::TooMany)), "what lower layers took is gone");
}

#[test]
fn an_image_with_more_bytes_than_it_may_have_is_refused() {
    if !is_root() {
        return;
    }
    let layers = [Tar::new().file("a", "1234").bytes(), Tar::new().file("b", "5678").bytes()];
    let within = |bytes| unpack_within(Budget { bytes, entries: u64::MAX }, &layers);
    assert!(within(8).is_ok());
    assert!(matches!(within(7), Err(UnpackError::TooLarge)), "what lower layers took is gone");
}

#[test]
fn the_holes_of_a_sparse_file_count_as_bytes() {
    if !is_root() {
        return;
    }
    let huge = |header: &mut Header| {
        let gnu = Header::new_gnu();
        let (name, size) = (header.as_old().name, header.as_old().size);
        *header = gnu;
        header.as_old_mut().name = name;
        header.as_old_mut().size = size;
        header.set_entry_type(EntryType::GNUSparse);
        header.set_mode(0o644);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        // All hole: no part has data, and the real size is a terabyte.
        let gnu = header.as_gnu_mut().unwrap();
        gnu.realsize = *b"20000000000000".first_chunk::<12>().unwrap();
        gnu.sparse[0].offset = *b"20000000000000".first_chunk::<12>().unwrap();
        gnu.sparse[0].numbytes = *b"000000000000";
    };
    let stream = Tar::new().entry("sparse", EntryType::GNUSparse, huge, b"").bytes();
    let refused = unpack_within(Budget { bytes: 1 << 20, entries: 10 }, &[stream]);
    assert!(matches!(refused, Err(UnpackError::TooLarge)), "{refused:?}");
}

#[test]
fn a_header_that_would_fill_the_memory_is_refused() {
    if !is_root() {
        return;
    }
    let value = vec![b'x'; 8 << 20];
    let stream = Tar::new().pax(&[("comment", &value)]).file("f", "f").bytes();
    let refused = unpack_all(&[stream]);
    assert!(matches!(refused, Err(UnpackError::Stream(_))), "{refused:?}");
}
