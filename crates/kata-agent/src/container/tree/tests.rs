use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};

use super::*;

/// A container root beside something that must not be reached.
fn world() -> (tempfile::TempDir, Tree) {
    let world = tempfile::tempdir().unwrap();
    fs::create_dir_all(world.path().join("root/etc")).unwrap();
    fs::write(world.path().join("secret"), "guest").unwrap();
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(world.path().join("root"), flags, Mode::empty()).unwrap();
    (world, Tree::new(root))
}

fn exists(world: &tempfile::TempDir, path: &str) -> bool {
    world.path().join(path).symlink_metadata().is_ok()
}

#[test]
fn dots_and_links_stay_inside_the_root() {
    let (world, tree) = world();
    symlink("/../../secret", world.path().join("root/up")).unwrap();
    symlink(world.path().join("secret"), world.path().join("root/absolute")).unwrap();
    for path in ["../secret", "/../../secret", "up", "absolute", "/etc/../../secret"] {
        assert_eq!(tree.find(Path::new(path)).unwrap_err(), Errno::NOENT, "{path}");
    }
}

#[test]
fn making_a_path_through_links_that_lead_out_makes_it_inside() {
    let (world, tree) = world();
    symlink("../../..", world.path().join("root/out")).unwrap();
    tree.find_or_make(Path::new("/out/made/file"), Node::File).unwrap();
    assert!(exists(&world, "root/made/file"));
    assert!(!exists(&world, "made"));
    symlink("/nowhere/at/all", world.path().join("root/etc/conf")).unwrap();
    tree.find_or_make(Path::new("/etc/conf"), Node::File).unwrap();
    assert!(exists(&world, "root/nowhere/at/all"), "a dangling link's target is made below the root");
}

#[test]
fn parents_are_directories_and_the_last_part_is_what_was_asked_for() {
    let (world, tree) = world();
    tree.find_or_make(Path::new("a/b/../c"), Node::Directory).unwrap();
    tree.find_or_make(Path::new("a/d/e"), Node::File).unwrap();
    let mode = |path: &str| world.path().join(path).metadata().unwrap();
    assert!(mode("root/a/c").is_dir() && mode("root/a/d").is_dir() && mode("root/a/d/e").is_file());
    assert_eq!(mode("root/a/d").permissions().mode() & 0o022, 0);
    assert!(is_directory(tree.find(Path::new("/a/c")).unwrap().as_fd()).unwrap());
}

#[test]
fn a_file_in_the_way_is_an_error() {
    let (world, tree) = world();
    fs::write(world.path().join("root/file"), "").unwrap();
    assert_eq!(tree.find_or_make(Path::new("/file/below"), Node::File).unwrap_err(), Errno::NOTDIR);
}

#[test]
fn links_in_a_circle_end_with_an_error() {
    let (world, tree) = world();
    symlink("b", world.path().join("root/a")).unwrap();
    symlink("a", world.path().join("root/b")).unwrap();
    assert_eq!(tree.find_or_make(Path::new("/a"), Node::File).unwrap_err(), Errno::LOOP);
    assert_eq!(tree.walk(Path::new("/a/c"), Node::File).unwrap_err(), Errno::LOOP);
}

#[test]
fn plain_paths_take_no_link_at_all() {
    let (world, tree) = world();
    symlink("etc", world.path().join("root/link")).unwrap();
    assert_eq!(tree.find_plain(Path::new("/link")).unwrap_err(), Errno::LOOP);
    assert!(tree.find_plain(Path::new("/etc")).is_ok());
}

#[test]
fn an_existing_special_file_is_found_as_it_is() {
    let (world, tree) = world();
    let fifo = world.path().join("root/fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    tree.find_or_make(Path::new("/fifo"), Node::File).unwrap();
    assert!(fifo.metadata().unwrap().file_type().is_fifo());
}

#[test]
fn the_root_itself_can_be_walked_to() {
    let (_world, tree) = world();
    for path in ["/", "", "..", "/etc/.."] {
        assert!(tree.walk(Path::new(path), Node::Directory).is_ok(), "{path:?}");
    }
}

proptest::proptest! {
    #[test]
    fn no_path_escapes_or_panics(path in "[a-c./]{0,24}", link in "[a-c./]{1,12}") {
        let (world, tree) = world();
        let _ = symlink(&link, world.path().join("root/b"));
        let _ = tree.find_or_make(Path::new(&path), Node::File);
        let mut outside: Vec<_> = fs::read_dir(world.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        outside.sort();
        proptest::prop_assert_eq!(outside, ["root", "secret"]);
    }
}
