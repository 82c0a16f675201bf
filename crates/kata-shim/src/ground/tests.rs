use std::os::unix::fs::MetadataExt;

use super::*;

fn ground(dir: &Path) -> Ground {
    Ground { run_dir: dir.join("run/p"), state_dir: dir.join("state/pods/p") }
}

#[test]
fn a_name_can_be_claimed_once() {
    let dir = tempfile::tempdir().unwrap();
    let ground = ground(dir.path());
    let _listener = ground.claim("p").unwrap();
    let error = ground.claim("p").unwrap_err();
    assert!(matches!(error, GroundError::Exists { .. }), "{error}");
    assert!(error.to_string().contains("a pod named p exists"), "{error}");
}

#[test]
fn others_get_through_the_directory_but_not_to_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let ground = ground(dir.path());
    umask(Mode::empty());
    let _listener = ground.claim("p").unwrap();
    std::fs::write(ground.run_dir.join("state.json"), "").unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&ground.run_dir), 0o711);
    assert_eq!(mode(&ground.socket()), 0o700);
    assert_eq!(mode(&ground.run_dir.join("state.json")), 0o600);
}

#[test]
fn a_directory_too_deep_for_sockets_is_refused_before_anything_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let deep = Ground { run_dir: dir.path().join("x".repeat(100)), state_dir: dir.path().into() };
    assert!(matches!(deep.claim("p"), Err(GroundError::TooLong { .. })));
    assert!(!deep.run_dir.exists());
}

#[test]
fn clearing_takes_both_directories_and_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let ground = ground(dir.path());
    let _listener = ground.claim("p").unwrap();
    std::fs::create_dir_all(ground.state_dir.join("upper")).unwrap();
    ground.clear().unwrap();
    assert!(!ground.run_dir.exists() && !ground.state_dir.exists());
    ground.clear().unwrap();
}

#[test]
fn a_mount_below_is_found_and_a_namesake_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let pod = dir.path().join("p d");
    std::fs::create_dir(&pod).unwrap();
    let pod = std::fs::canonicalize(pod).unwrap();
    let escaped = pod.display().to_string().replace(' ', "\\040");
    let lines = |path: &str| {
        format!("22 1 0:21 / / rw - ext4 x rw\n30 22 0:5 / {path} rw - tmpfs t rw\n").into_bytes()
    };
    assert_eq!(mounted_below(&lines(&format!("{escaped}/shared")), &pod), Some(pod.join("shared")));
    assert_eq!(mounted_below(&lines(&escaped), &pod), Some(pod.clone()));
    assert_eq!(mounted_below(&lines(&format!("{escaped}x")), &pod), None);
}

#[test]
fn nothing_is_removed_through_a_mount() {
    let dir = tempfile::tempdir().unwrap();
    let ground = ground(dir.path());
    let _listener = ground.claim("p").unwrap();
    let (theirs, shared) = (dir.path().join("theirs"), ground.run_dir.join("shared"));
    for dir in [&theirs, &shared] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(theirs.join("precious"), "").unwrap();
    if let Err(error) = rustix::mount::mount_bind(&theirs, &shared) {
        eprintln!("skipped: cannot bind mount here: {error}");
        return;
    }
    let error = ground.clear().unwrap_err();
    rustix::mount::unmount(&shared, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert!(matches!(error, GroundError::Mounted { .. }), "{error}");
    assert!(theirs.join("precious").exists());
    ground.clear().unwrap();
}

#[test]
fn names_in_kubernetes_are_noted_where_there_are_all() {
    let dir = tempfile::tempdir().unwrap();
    let ground = Ground { run_dir: dir.path().to_owned(), state_dir: dir.path().to_owned() };
    let mut annotations: HashMap<String, String> =
        [("io.kubernetes.cri.sandbox-uid", "u"), ("io.kubernetes.cri.sandbox-name", "n")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
    ground.note_kubernetes(&annotations);
    assert!(!dir.path().join("kubernetes.json").exists());
    annotations.insert("io.kubernetes.cri.sandbox-namespace".to_owned(), "s".to_owned());
    ground.note_kubernetes(&annotations);
    let text = std::fs::read_to_string(dir.path().join("kubernetes.json")).unwrap();
    assert_eq!(text, r#"{"cri_name":"n","cri_namespace":"s","cri_uid":"u"}"#);
}
