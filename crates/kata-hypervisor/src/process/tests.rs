use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::*;

const NOBODY: u32 = 65_534;

struct Place {
    dir: tempfile::TempDir,
    record: Record,
}

/// A test that fails must not leave a child.
impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = Record::release(self.record.path()) {
            eprintln!("{error}");
        }
    }
}

fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let record = Record::open(dir.path().join("resources.jsonl")).unwrap();
    Place { dir, record }
}

fn sh(script: &str) -> Spawn {
    Spawn::new("test", "/bin/sh").arg("-c").arg(script)
}

/// Runs to the end and gives back the output.
async fn output_of(spawn: Spawn) -> String {
    let place = place();
    let child = spawn.spawn(&place.record).unwrap();
    assert_eq!(child.wait().await, Exit::Code(0), "{}", child.output_tail());
    child.output_tail()
}

fn is_root(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: {test} needs root");
    }
    root
}

fn status_of(text: &str) -> BTreeMap<&str, &str> {
    text.lines().filter_map(|line| line.split_once(':')).map(|(key, value)| (key, value.trim())).collect()
}

fn nobody(groups: &[u32]) -> Identity {
    Identity { uid: NOBODY, gid: NOBODY, groups: groups.to_vec() }
}

#[tokio::test]
async fn child_has_its_identity_no_capability_and_no_way_to_get_any() {
    if !is_root("identity") {
        return;
    }
    let text = output_of(sh("cat /proc/self/status; umask").identity(nobody(&[7, 9]))).await;
    let status = status_of(&text);
    assert_eq!(status["Uid"], "65534\t65534\t65534\t65534");
    assert_eq!(status["Gid"], "65534\t65534\t65534\t65534");
    assert_eq!(status["Groups"], "7 9");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    for set in ["SigBlk", "SigIgn"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert!(text.ends_with("0077\n"), "{text}");
}

#[tokio::test]
async fn child_without_an_identity_keeps_the_capabilities_and_gains_none() {
    if !is_root("capabilities") {
        return;
    }
    let ours = fs::read_to_string("/proc/self/status").unwrap();
    let text = output_of(sh("cat /proc/self/status")).await;
    assert_eq!(status_of(&text)["CapEff"], status_of(&ours)["CapEff"]);
    assert_eq!(status_of(&text)["NoNewPrivs"], "1");
}

#[tokio::test]
async fn child_gets_exactly_the_descriptors_named_in_their_order() {
    // Something that is not close-on-exec must not get through.
    let (stray, _other) = std::io::pipe().unwrap();
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty()).unwrap();
    let mut ends = Vec::new();
    // The shell itself opens nothing, and echo and the glob run inside it.
    let mut spawn = sh("echo /proc/$$/fd/*; cat <&3; cat <&5");
    for text in ["first ", "second ", "third "] {
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(text.as_bytes()).unwrap();
        ends.push(spawn.hand_over(OwnedFd::from(read)));
    }
    assert_eq!(ends, [3, 4, 5]);
    let text = output_of(spawn).await;
    let (fds, rest) = text.split_once('\n').unwrap();
    let fds: Vec<&str> = fds.split(' ').filter_map(|path| path.rsplit('/').next()).collect();
    assert_eq!(fds[..6], ["0", "1", "2", "3", "4", "5"]);
    // The glob itself reads the directory through one more.
    assert!(fds.len() <= 7, "{fds:?}");
    assert_eq!(rest, "first third ");
}

#[tokio::test]
async fn child_has_an_empty_environment_null_input_its_own_session_and_limits() {
    let text = output_of(Spawn::new("test", "/usr/bin/env").env("ONLY", "this").env("AND", "that")).await;
    assert_eq!(text, "ONLY=this\nAND=that\n");
    let script = "readlink /proc/self/fd/0; ulimit -n; ulimit -c; cut -d' ' -f1,6,7 /proc/$$/stat; echo $$";
    let text = output_of(sh(script).open_files(77)).await;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[..3], ["/dev/null", "77", "0"]);
    let own: Vec<&str> = lines[3].split(' ').collect();
    assert_eq!((own[0], own[1], own[2]), (lines[4], lines[4], "0"), "pid, session, terminal");
}

#[tokio::test]
async fn child_lives_in_namespaces_of_its_own_and_mounts_do_not_leak() {
    if !is_root("namespaces") {
        return;
    }
    let place = place();
    let inside = place.dir.path().join("inside");
    fs::create_dir(&inside).unwrap();
    let script = format!(
        "for n in mnt ipc net uts pid; do readlink /proc/self/ns/$n; done; mount -t tmpfs none {} && echo mounted; cat /proc/net/dev",
        inside.display()
    );
    let namespaces = Namespaces { mount: true, ipc: true, network: true, pid: true };
    let text = output_of(sh(&script).env("PATH", "/usr/bin:/bin").namespaces(namespaces)).await;
    let lines: Vec<&str> = text.lines().collect();
    for (index, (name, own)) in
        [("mnt", true), ("ipc", true), ("net", true), ("uts", false), ("pid", true)].into_iter().enumerate()
    {
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_eq!(lines[index] != ours.to_str().unwrap(), own, "{name}");
    }
    assert_eq!(lines[5], "mounted");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(inside.to_str().unwrap()));
    assert_eq!(lines.len(), 6 + 3, "two header lines and the loopback: {text}");
}

#[tokio::test]
async fn program_below_a_directory_the_identity_may_not_enter_still_runs() {
    if !is_root("execution by descriptor") {
        return;
    }
    let place = place();
    let closed = place.dir.path().join("closed");
    fs::create_dir(&closed).unwrap();
    let program = closed.join("id");
    fs::copy("/usr/bin/id", &program).unwrap();
    fs::set_permissions(&closed, fs::Permissions::from_mode(0o700)).unwrap();
    let text = output_of(Spawn::new("test", program).arg("-u").identity(nobody(&[]))).await;
    assert_eq!(text, "65534\n");
}

#[tokio::test]
async fn end_is_told_to_every_waiter_now_and_later() {
    let place = place();
    let child = sh("echo last words >&2; exit 7").spawn(&place.record).unwrap();
    let other = child.clone();
    let (first, second) = tokio::join!(child.wait(), other.wait());
    assert_eq!(
        (first, second, child.wait().await, other.exit()),
        (Exit::Code(7), Exit::Code(7), Exit::Code(7), Some(Exit::Code(7)))
    );
    assert_eq!(child.output_tail(), "last words\n");
}

#[tokio::test]
async fn kill_ends_the_child_and_later_kills_nobody() {
    let place = place();
    let child = sh("exec sleep 600").spawn(&place.record).unwrap();
    assert_eq!(child.exit(), None);
    child.kill().unwrap();
    assert_eq!(child.wait().await, Exit::Signal(9));
    child.kill().unwrap();
}

#[tokio::test]
async fn end_is_seen_while_a_grandchild_holds_the_output() {
    let place = place();
    let child = sh("sleep 600 & echo $!").spawn(&place.record).unwrap();
    let since = Instant::now();
    assert_eq!(child.wait().await, Exit::Code(0));
    assert!(since.elapsed() < Duration::from_secs(5));
    let orphan = child.output_tail().trim().parse::<i32>().unwrap();
    let orphan = rustix::process::Pid::from_raw(orphan).unwrap();
    rustix::process::kill_process(orphan, rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn output_is_bounded_and_printable() {
    let script = "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done; printf '\\033[31mred\\r\\n'";
    let text = output_of(sh(script).output_limit(100)).await;
    assert!(text.len() <= 100 && text.ends_with("line 2999\n[31mred\n"), "{text:?}");
}

#[tokio::test]
async fn missing_unexecutable_and_impossible_programs_are_told_apart() {
    let place = place();
    let error = Spawn::new("x", "/no/such/program").spawn(&place.record).unwrap_err();
    assert!(
        matches!(&error, SpawnError::Program { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
    );
    assert_eq!(error.to_string(), r#"program "/no/such/program" of process x cannot be opened"#);

    let file = place.dir.path().join("file");
    fs::write(&file, "text").unwrap();
    let error = Spawn::new("x", &file).spawn(&place.record).unwrap_err();
    assert!(
        matches!(&error, SpawnError::Exec { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied)
    );

    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    let error = Spawn::new("x", &file).spawn(&place.record).unwrap_err();
    assert!(
        matches!(&error, SpawnError::Exec { source, .. } if source.raw_os_error() == Some(libc::ENOEXEC))
    );

    let error = sh("true").arg("a\0b").spawn(&place.record).unwrap_err();
    assert!(matches!(error, SpawnError::ZeroByte { .. }));
    assert_no_children();
}

#[test]
fn spawn_outside_a_runtime_is_refused() {
    let place = place();
    assert!(matches!(sh("true").spawn(&place.record), Err(SpawnError::NoRuntime { .. })));
}

#[tokio::test]
async fn child_that_cannot_be_recorded_never_runs() {
    let place = place();
    let marker = place.dir.path().join("ran");
    // A full device takes no entry.
    let record = Record::open("/dev/full").unwrap();
    let error = sh(&format!("touch {}", marker.display())).spawn(&record).unwrap_err();
    assert!(matches!(error, SpawnError::Record { .. }));
    assert_no_children();
    assert!(!marker.exists());
}

/// Every test has a process of its own under nextest; under plain `cargo test` others' children are around.
fn assert_no_children() {
    if std::env::var_os("NEXTEST").is_some() {
        assert!(
            rustix::process::waitpid(None, rustix::process::WaitOptions::NOHANG).is_err(),
            "a child is left"
        );
    }
}

#[tokio::test]
async fn many_children_at_once_do_not_mix_up_their_descriptors() {
    let place = place();
    let mut children = Vec::new();
    for number in 0..24 {
        let (mut read, write) = std::io::pipe().unwrap();
        let spawn = sh(&format!("echo {number} >&3")).inherit(OwnedFd::from(write));
        let record = place.record.clone();
        children.push(tokio::task::spawn_blocking(move || {
            let child = spawn.spawn(&record).unwrap();
            let mut text = String::new();
            // Ends only when the child's is the last copy of the other end.
            read.read_to_string(&mut text).unwrap();
            (child, text, number)
        }));
    }
    for child in children {
        let (child, text, number) = child.await.unwrap();
        assert_eq!(text, format!("{number}\n"));
        assert_eq!(child.wait().await, Exit::Code(0));
    }
}

fn entries(record: &Path) -> Vec<serde_json::Value> {
    fs::read_to_string(record).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[tokio::test]
async fn record_names_the_child_before_it_runs_and_release_kills_it() {
    let place = place();
    let child = sh("exec sleep 600").spawn(&place.record).unwrap();
    let entry = &entries(place.record.path())[0]["process"];
    assert_eq!((&entry["name"], &entry["pid"]), (&"test".into(), &child.pid().into()));
    assert!(entry["start_time"].as_u64().unwrap() > 0);

    let path = place.record.path().to_owned();
    let released = tokio::task::spawn_blocking(move || Record::release(&path)).await.unwrap().unwrap();
    assert_eq!(released, Released { processes: 1, ..Released::default() });
    assert_eq!(child.wait().await, Exit::Signal(9));
    assert!(!place.record.path().exists());
    assert_eq!(Record::release(place.record.path()).unwrap(), Released::default());
}

#[tokio::test]
async fn release_spares_a_process_that_only_has_the_same_pid() {
    let place = place();
    let child = sh("exec sleep 600").spawn(&place.record).unwrap();
    let stale = Record::open(place.dir.path().join("stale.jsonl")).unwrap();
    stale.process("old", child.pid(), 1).unwrap();
    assert_eq!(Record::release(stale.path()).unwrap(), Released::default());
    assert_eq!(child.exit(), None);
    child.kill().unwrap();
    child.wait().await;
}

#[test]
fn release_takes_down_mounts_newest_first_and_then_removes_paths() {
    if !is_root("mounts") {
        return;
    }
    let place = place();
    let outer = place.dir.path().join("outer dir");
    let nested = outer.join("nested");
    let mount = |path: &Path| {
        place.record.dir(path).unwrap();
        fs::create_dir(path).unwrap();
        place.record.mount(path).unwrap();
        rustix::mount::mount("none", path, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    };
    mount(&outer);
    mount(&nested);
    let file = place.dir.path().join("file");
    place.record.file(&file).unwrap();
    fs::write(&file, "").unwrap();
    place.record.file(place.dir.path().join("never made")).unwrap();
    place.record.mount(place.dir.path()).unwrap();

    let released = Record::release(place.record.path()).unwrap();
    assert_eq!(released, Released { processes: 0, mounts: 2, paths: 2 });
    assert!(!outer.exists() && !file.exists());
}

#[test]
fn release_removes_nothing_below_a_mount_that_is_still_up() {
    if !is_root("mounts") {
        return;
    }
    let place = place();
    let precious = place.dir.path().join("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "kept").unwrap();
    let dir = place.dir.path().join("a\tdir");
    let bound = dir.join("bound");
    fs::create_dir_all(&bound).unwrap();
    rustix::mount::mount_bind(&precious, &bound).unwrap();
    place.record.dir(&dir).unwrap();

    let error = Record::release(place.record.path()).unwrap_err();
    assert!(error.to_string().contains("is still mounted"), "{error}");
    assert_eq!(fs::read_to_string(precious.join("file")).unwrap(), "kept");
    // Once the mount is down, trying again goes through.
    rustix::mount::unmount(&bound, rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(Record::release(place.record.path()).unwrap().paths, 1);
    assert_eq!(fs::read_to_string(precious.join("file")).unwrap(), "kept");
}

#[test]
fn record_survives_a_line_that_was_cut_off() {
    let place = place();
    let file = place.dir.path().join("file");
    fs::write(&file, "").unwrap();
    let record = place.dir.path().join("cut.jsonl");
    fs::write(&record, r#"{"file":{"path":"/tmp/never"#).unwrap();
    Record::open(&record).unwrap().file(&file).unwrap();
    assert_eq!(Record::release(&record).unwrap().paths, 1);
    assert!(!file.exists());
}

#[test]
fn cgroups_that_others_are_in_are_left_to_them_within_one_bound() {
    let hierarchies = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup"].map(Path::new);
    let Some(hierarchy) = hierarchies.into_iter().find(|dir| dir.join("cgroup.procs").exists()) else {
        eprintln!("skipped: there are no cgroups");
        return;
    };
    if !is_root("making cgroups") {
        return;
    }
    let place = place();
    let others = [1, 2, 3].map(|number| {
        let cgroup = hierarchy.join(format!("kata-record-{}-{number}", std::process::id()));
        place.record.cgroup(&cgroup).unwrap();
        fs::create_dir(&cgroup).unwrap();
        let other = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(cgroup.join("cgroup.procs"), other.id().to_string()).unwrap();
        (cgroup, other)
    });
    let begin = Instant::now();
    let released = Record::release(place.record.path());
    let took = begin.elapsed();
    for (cgroup, mut other) in others {
        other.kill().unwrap();
        other.wait().unwrap();
        fs::remove_dir(cgroup).unwrap();
    }
    assert_eq!(released.unwrap(), Released::default());
    // One bound is 2 s; three of them, one after the other, would be 6.
    assert!(took < Duration::from_millis(5500), "{took:?}");
}
