use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;
use rustix::fs::CWD;

use super::*;
use crate::mount::silent::SilentMount;

/// A volume and its copy, in a directory of their own.
struct Pair {
    _dir: tempfile::TempDir,
    volume: PathBuf,
    copy: PathBuf,
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (volume, copy) = (dir.path().join("volume"), dir.path().join("copy"));
        std::fs::create_dir(&volume).unwrap();
        std::fs::create_dir(&copy).unwrap();
        Self { _dir: dir, volume, copy }
    }

    fn update(&self) {
        assert!(Copy::new(&self.volume, &self.copy).update().unwrap());
    }

    fn read(&self, name: &str) -> io::Result<String> {
        std::fs::read_to_string(self.copy.join(name))
    }
}

/// A volume as Kubernetes writes it: all names lead through one link.
fn publish(volume: &Path, version: &str, keys: &[(&str, &str)]) {
    let directory = volume.join(version);
    std::fs::create_dir_all(&directory).unwrap();
    for (key, text) in keys {
        std::fs::write(directory.join(key), text).unwrap();
        if std::fs::symlink_metadata(volume.join(key)).is_err() {
            symlink(Path::new("..data").join(key), volume.join(key)).unwrap();
        }
    }
    let old = std::fs::read_link(volume.join("..data"));
    symlink(version, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if let Ok(old) = old {
        std::fs::remove_dir_all(volume.join(old)).unwrap();
    }
}

#[test]
fn a_copy_follows_what_is_new_changed_and_gone() {
    let pair = Pair::new();
    publish(&pair.volume, "..1", &[("a", "one"), ("b", "two")]);
    pair.update();
    assert_eq!(pair.read("a").unwrap(), "one");
    publish(&pair.volume, "..2", &[("a", "changed"), ("c", "three")]);
    std::fs::remove_file(pair.volume.join("b")).unwrap();
    pair.update();
    assert_eq!((pair.read("a").unwrap().as_str(), pair.read("c").unwrap().as_str()), ("changed", "three"));
    assert!(pair.read("b").is_err() && !pair.copy.join("..1").exists());

    // What did not change keeps its inode and its times: nobody is told of it.
    let state = |name: &str| {
        let found = std::fs::metadata(pair.copy.join(name)).unwrap();
        (found.ino(), found.ctime(), found.ctime_nsec())
    };
    let before = (state("a"), state("..2"));
    std::thread::sleep(Duration::from_millis(20));
    pair.update();
    assert_eq!((state("a"), state("..2")), before);

    // A directory in place of a file, and a file in place of a directory that is not empty.
    std::fs::remove_file(pair.volume.join("c")).unwrap();
    std::fs::create_dir_all(pair.volume.join("c/sub")).unwrap();
    std::fs::write(pair.volume.join("c/sub/file"), "deep").unwrap();
    pair.update();
    assert_eq!(pair.read("c/sub/file").unwrap(), "deep");
    std::fs::remove_dir_all(pair.volume.join("c")).unwrap();
    std::fs::write(pair.volume.join("c"), "flat").unwrap();
    pair.update();
    assert_eq!(pair.read("c").unwrap(), "flat");
}

#[test]
fn modes_and_owners_follow_too() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!("skipped: only root gives files away");
    }
    let pair = Pair::new();
    std::fs::create_dir(pair.volume.join("dir")).unwrap();
    std::fs::write(pair.volume.join("dir/file"), "x").unwrap();
    pair.update();
    for (name, mode) in [("dir", 0o2750), ("dir/file", 0o640)] {
        std::os::unix::fs::chown(pair.volume.join(name), Some(7), Some(8)).unwrap();
        std::fs::set_permissions(pair.volume.join(name), std::fs::Permissions::from_mode(mode)).unwrap();
        pair.update();
        let found = std::fs::metadata(pair.copy.join(name)).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (7, 8, mode), "{name}");
    }
}

#[test]
fn a_copy_that_is_fuller_than_an_original_may_be_is_brought_up_to_date() {
    let pair = Pair::new();
    for number in 0..ENTRIES {
        std::fs::write(pair.copy.join(format!("old{number}")), "").unwrap();
    }
    // One that was written halfway, and what its owner could put there: two versions' worth.
    std::fs::write(pair.copy.join(GROWING), vec![0; usize::try_from(BYTES).unwrap() + 1]).unwrap();
    std::fs::create_dir(pair.copy.join("kept")).unwrap();
    std::fs::create_dir(pair.volume.join("kept")).unwrap();
    std::fs::write(pair.volume.join("kept/new"), "new").unwrap();
    pair.update();
    assert_eq!(pair.read("kept/new").unwrap(), "new");
    assert_eq!(std::fs::read_dir(&pair.copy).unwrap().count(), 1);
}

#[test]
fn links_and_pipes_that_take_the_place_of_files_are_neither_followed_nor_opened() {
    let pair = Pair::new();
    let secret = pair.volume.with_file_name("secret");
    std::fs::create_dir(&secret).unwrap();
    std::fs::write(secret.join("file"), "secret").unwrap();
    std::fs::create_dir(pair.volume.join("dir")).unwrap();
    std::fs::write(pair.volume.join("dir/file"), "public").unwrap();
    let original = Root::open(&pair.volume).unwrap();
    let tree = original.list(ENTRIES, BYTES).unwrap().unwrap();

    // Between the look and the reading: the directory becomes a link, then the file a pipe.
    std::fs::rename(pair.volume.join("dir"), pair.volume.join("moved")).unwrap();
    symlink(&secret, pair.volume.join("dir")).unwrap();
    let error = crate::chain(&original.read_changed(&tree, &Tree::new()).unwrap_err());
    assert!(error.contains("dir/file"), "{error}");
    std::fs::remove_file(pair.volume.join("dir")).unwrap();
    std::fs::rename(pair.volume.join("moved"), pair.volume.join("dir")).unwrap();
    std::fs::remove_file(pair.volume.join("dir/file")).unwrap();
    let pipe = pair.volume.join("dir/file");
    rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let error = crate::chain(&original.read_changed(&tree, &Tree::new()).unwrap_err());
    assert!(error.contains("dir/file") && error.contains("no file"), "{error}");

    // A pipe that is there from the beginning is left out; and one in the copy goes.
    rustix::fs::mknodat(CWD, pair.copy.join("pipe"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    // What a container has put into the copy leads nowhere.
    symlink(&secret, pair.copy.join("dir")).unwrap();
    pair.update();
    assert_eq!(std::fs::read_dir(pair.copy.join("dir")).unwrap().count(), 0);
    assert!(std::fs::symlink_metadata(pair.copy.join("pipe")).is_err());
    assert_eq!(std::fs::read_to_string(secret.join("file")).unwrap(), "secret");
}

#[test]
fn too_many_names_or_bytes_are_not_copied() {
    let dir = tempfile::tempdir().unwrap();
    for name in 0..ENTRIES {
        std::fs::write(dir.path().join(name.to_string()), "").unwrap();
    }
    assert!(fits(dir.path()).unwrap());
    std::fs::create_dir(dir.path().join("more")).unwrap();
    assert!(!fits(dir.path()).unwrap());
    std::fs::remove_dir(dir.path().join("more")).unwrap();
    std::fs::write(dir.path().join("0"), vec![0; usize::try_from(BYTES).unwrap() + 1]).unwrap();
    assert!(!fits(dir.path()).unwrap());
}

#[tokio::test]
async fn a_follower_that_is_stopped_writes_nothing_more_and_stopping_waits_for_no_host() {
    let pair = Pair::new();
    std::fs::write(pair.volume.join("key"), "value").unwrap();
    let copy = Copy::new(&pair.volume, &pair.copy);
    let follower = copy.clone().follow();
    // A look that is under way when the copy is unmounted ends after it.
    follower.stop();
    assert!(copy.update().unwrap());
    assert_eq!(std::fs::read_dir(&pair.copy).unwrap().count(), 0);

    let Some(server) = SilentMount::at(&pair.volume.with_file_name("silent")) else { return };
    let copy = Copy::new(&pair.volume.with_file_name("silent"), &pair.copy);
    let follower = copy.clone().follow();
    let stuck = std::thread::spawn(move || copy.update());
    while !stuck.is_finished() && !waits_in_kernel(&stuck) {
        std::thread::yield_now();
    }
    follower.stop();
    assert!(!stuck.is_finished(), "it should be waiting for the host");
    drop(server);
    assert!(stuck.join().unwrap().is_err());
}

/// Whether the only other thread that this test has made sleeps in a call.
fn waits_in_kernel<T>(_: &std::thread::JoinHandle<T>) -> bool {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("wchan")).ok())
        .any(|place| place.contains("fuse"))
}

#[derive(Clone, Debug)]
enum Step {
    File(Vec<usize>, String),
    Directory(Vec<usize>),
    Link(Vec<usize>, String),
    Remove(Vec<usize>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let path = || prop::collection::vec(0_usize..4, 1..4);
    prop::collection::vec(
        prop_oneof![
            (path(), "[a-z]{0,8}").prop_map(|(path, text)| Step::File(path, text)),
            path().prop_map(Step::Directory),
            (path(), "[a-z./]{1,8}").prop_map(|(path, text)| Step::Link(path, text)),
            path().prop_map(Step::Remove),
        ],
        1..24,
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is made of an original between two looks, the copy is the same after the next.
    #[test]
    fn a_copy_becomes_whatever_its_original_has_become(rounds in prop::collection::vec(steps(), 1..4)) {
        const NAMES: [&str; 4] = ["a", "b", "..data", "c.d"];
        let pair = Pair::new();
        for steps in rounds {
            for step in steps {
                let at = |path: &[usize]| path.iter().fold(pair.volume.clone(), |path, name| path.join(NAMES[*name]));
                // Whatever the names before have made impossible does not happen.
                let _ = match &step {
                    Step::File(path, text) => std::fs::write(at(path), text),
                    Step::Directory(path) => std::fs::create_dir(at(path)),
                    Step::Link(path, target) => symlink(target, at(path)),
                    Step::Remove(path) => std::fs::remove_dir_all(at(path)).or_else(|_| std::fs::remove_file(at(path))),
                };
            }
            let list = |path: &Path| Root::open(path).unwrap().list(usize::MAX, u64::MAX).unwrap().unwrap();
            if !fits(&pair.volume).unwrap() {
                break;
            }
            pair.update();
            let (original, copy) = (list(&pair.volume), list(&pair.copy));
            // A link's own mode and owner mean nothing.
            let plain = |tree: &Tree| -> Vec<_> {
                tree.iter().map(|(name, entry)| {
                    let link = matches!(entry.kind, Kind::Link { .. });
                    (name.clone(), entry.kind.clone(), if link { (0, 0, 0) } else { (entry.mode, entry.uid, entry.gid) })
                }).collect()
            };
            prop_assert_eq!(plain(&original), plain(&copy));
        }
    }
}
