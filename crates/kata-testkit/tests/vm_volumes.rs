//! Volumes as Kubernetes makes them, in real machines: what containers see of them, share through them, and may not do.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kata_config::direct_volume::Entry;
use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{stderr, stdout};

const PROBE: &str = env!("CARGO_BIN_EXE_volume-probe");
const SANDBOX: &str = "io.kubernetes.cri.container-type=sandbox";
const CONTAINER: &str = "io.kubernetes.cri.container-type=container";

/// kubelet's directory of a volume, made.
fn volume(rig: &Containerd, plugin: &str, name: &str) -> PathBuf {
    let path = rig.host().scratch("pods/4711/volumes").join(plugin).join(name);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Publishes a version of a volume as kubelet does.
fn publish(volume: &Path, version: &str, text: &str) {
    let directory = volume.join(version);
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("key"), text).unwrap();
    std::fs::set_permissions(directory.join("key"), PermissionsExt::from_mode(0o640)).unwrap();
    let old = std::fs::read_link(volume.join("..data"));
    symlink(version, volume.join("..data_tmp")).unwrap();
    std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    match old {
        Ok(old) => std::fs::remove_dir_all(volume.join(old)).unwrap(),
        Err(_) => symlink("..data/key", volume.join("key")).unwrap(),
    }
}

/// A tmpfs of the host until it is dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn new(path: &Path, options: &std::ffi::CStr) -> Self {
        rustix::mount::mount("tmpfs", path, "tmpfs", rustix::mount::MountFlags::empty(), options).unwrap();
        Self(path.to_owned())
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// A mount option of `ctr`.
fn bind(source: &Path, at: &str, how: &str) -> String {
    format!("type=bind,src={},dst={at},options=rbind:{how}", source.display())
}

/// The probe at `/probe`, with the libraries that it runs with.
fn probe() -> Vec<String> {
    let listed = Command::new("ldd").arg(PROBE).output().unwrap();
    let text = stdout(&listed);
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/'));
    let files: BTreeSet<&str> = libraries.map(|word| word.trim_end_matches(':')).collect();
    let mut mounts = vec![bind(Path::new(PROBE), "/probe", "ro")];
    mounts.extend(files.iter().map(|file| bind(&Path::new(file).canonicalize().unwrap(), file, "ro")));
    mounts
}

/// Starts a container of pod `pod`, as Kubernetes marks them; the pod's first has its name.
fn of_pod(rig: &Containerd, id: &str, options: &[&str], mounts: &[String]) {
    let kind = if id == "pod" { SANDBOX } else { CONTAINER };
    let mut words = vec!["--annotation", kind, "--annotation", "io.kubernetes.cri.sandbox-id=pod"];
    words.extend(options);
    mounts.iter().for_each(|mount| words.extend(["--mount", mount]));
    rig.detached(&words, id, "exec sleep 1000");
}

/// What a script in a container says; it must succeed.
#[track_caller]
fn say(rig: &Containerd, id: &str, script: &str) -> String {
    let output = rig.exec(id, "say", script);
    assert!(output.status.success(), "{script}: {}{}", stdout(&output), stderr(&output));
    stdout(&output)
}

/// That a script in a container fails, with these words.
#[track_caller]
fn refuse(rig: &Containerd, id: &str, script: &str, words: &str) {
    let output = rig.exec(id, "refuse", script);
    assert!(!output.status.success() && stderr(&output).contains(words), "{script}: {}", stderr(&output));
}

#[test]
fn volumes_of_a_pod_are_seen_shared_and_kept_as_on_one_host() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    if !rig.has_machines() {
        return;
    }
    let config = volume(&rig, "kubernetes.io~configmap", "config");
    publish(&config, "..1", "one");
    let memory = volume(&rig, "kubernetes.io~empty-dir", "memory");
    let tmpfs = Tmpfs::new(&memory, c"size=4m,mode=2777,gid=42");
    let disk = volume(&rig, "kubernetes.io~empty-dir", "disk");
    let (data, below) = (rig.host().scratch("data"), rig.host().scratch("below"));
    [&data, &below].iter().for_each(|dir| std::fs::create_dir_all(dir).unwrap());
    std::fs::create_dir(data.join("below")).unwrap();
    std::fs::write(data.join("file"), "kept").unwrap();
    let mut mounts = probe();
    mounts.extend([
        bind(&config, "/config", "ro"),
        bind(&memory, "/memory", "rw"),
        bind(&disk, "/disk", "rw"),
        bind(&data, "/data", "ro"),
        bind(&below, "/data/below", "rw"),
        bind(&data.join("file"), "/file", "ro"),
    ]);
    of_pod(&rig, "pod", &[], &mounts);
    of_pod(&rig, "side", &["--privileged"], &mounts);

    // A program that waits for a new version of its configuration hears of it.
    let waits = rig.in_container(&[], "pod", "watch", "/probe watch /config /config/key");
    let mut waits = rig.ctr(waits).stdout(Stdio::piped()).spawn().unwrap();
    let mut told = std::io::BufReader::new(waits.stdout.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut told, &mut line).unwrap();
    assert_eq!(line, "ready\n");
    assert_eq!(say(&rig, "pod", "cat /config/key; stat -L -c ' %a' /config/key"), "one 640\n");
    publish(&config, "..2", "two");
    let mut text = String::new();
    std::io::Read::read_to_string(&mut told, &mut text).unwrap();
    assert!(waits.wait().unwrap().success(), "{text}");
    assert!(text.starts_with("two\n") && text.contains("..data"), "{text}");
    refuse(&rig, "pod", "echo x > /config/key", "Read-only file system");

    // Memory is the guest's own, bounded as on the host, and the pod's.
    assert_eq!(say(&rig, "pod", "stat -c '%a %g' /memory"), "2777 42\n");
    refuse(&rig, "pod", "dd if=/dev/zero of=/memory/big bs=1M count=8", "No space left on device");
    say(&rig, "pod", "rm /memory/big; echo kept > /memory/file");
    assert!(!memory.join("file").exists());
    rig.remove("side");
    of_pod(&rig, "side", &["--privileged"], &mounts);
    assert_eq!(say(&rig, "side", "cat /memory/file"), "kept\n");

    // Containers meet in an emptyDir: by a socket, a FIFO, locks, mapped files.
    for dir in ["/disk", "/memory"] {
        let log = format!("ln -sf {dir}/log /dev/log");
        let serve = format!(
            "{log}; syslogd -O {dir}/told; mkfifo {dir}/fifo; (cat {dir}/fifo > {dir}/heard) >/dev/null 2>&1 &"
        );
        say(&rig, "pod", &serve);
        say(
            &rig,
            "side",
            &format!(
                "{log}; until [ -S {dir}/log ]; do sleep 0.05; done; logger hello; echo spoken > {dir}/fifo"
            ),
        );
        let heard = || {
            let text = rig.exec("side", "look", &format!("cat {dir}/told {dir}/heard"));
            (stdout(&text).contains("hello") && stdout(&text).contains("spoken")).then_some(())
        };
        rig.host().wait_for("both to arrive", heard);
        say(&rig, "pod", "kill $(pidof syslogd)");
        say(
            &rig,
            "pod",
            &format!("touch {dir}/lock; (/probe lock {dir}/lock > {dir}/first) >/dev/null 2>&1 &"),
        );
        rig.host().wait_for("the lock", || {
            (stdout(&rig.exec("side", "look", &format!("cat {dir}/first"))) == "locked\n").then_some(())
        });
        assert_eq!(say(&rig, "side", &format!("/probe lock {dir}/lock")), "busy\n");
        say(&rig, "pod", "kill $(pidof probe)");
    }

    // What cannot be written cannot be made so from inside. What is mounted below is there, and may be.
    assert_eq!(say(&rig, "side", "cat /file /data/file"), "keptkept");
    let remount = "for at in /data /file; do mount -o remount,rw,bind $at; done; echo x > /data/new";
    refuse(&rig, "side", remount, "Read-only file system");
    refuse(&rig, "side", "echo x > /file", "Read-only file system");
    say(&rig, "pod", "echo nested > /data/below/file");
    assert_eq!(std::fs::read_to_string(below.join("file")).unwrap(), "nested\n");

    // A file system as on the host.
    let script = "cd /disk; echo a > a; ln a b; stat -c %h a; echo c > c; mv c b; cat a b; \
                  truncate -s 64M sparse; stat -c %s sparse; du -k sparse | cut -f1; \
                  touch own; chown 7:8 own; chmod 4755 own; stat -c '%u:%g %a' own; \
                  ln -s a link; readlink link; mkdir d; mv d e; rmdir e; fallocate -l 4096 full; stat -c %s full";
    let said = say(&rig, "pod", script);
    assert_eq!(said, "2\na\nc\n67108864\n0\n7:8 4755\na\n4096\n");
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(disk.join("own")).unwrap()), 7);

    rig.remove("side");
    rig.remove("pod");
    drop(tmpfs);
}

#[test]
fn volumes_on_disks_are_file_systems_of_the_guest() {
    let Some(rig) = Containerd::new(Version::V2) else { return };
    if !rig.has_machines() {
        return;
    }
    let limit = "[hypervisor.qemu]\ndisk_rate_limiter_bw_max_rate = 33554432\n";
    rig.host().configure(&format!("[runtime]\nemptydir_mode = \"block-plain\"\n{limit}"));
    let dir = self::volume(&rig, "kubernetes.io~empty-dir", "dir");
    std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
    let (csi, device) = (rig.host().scratch("csi"), rig.host().scratch("device"));
    std::fs::create_dir_all(&csi).unwrap();
    let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&device).arg("16M").status();
    assert!(made.unwrap().success());
    let entry = Entry::of(&csi).unwrap();
    let info = serde_json::json!({
        "volume-type": "directvol", "device": device, "fstype": "ext4", "metadata": {"fsGroup": "42"}
    });
    let volume = |words: &[&str]| {
        let done = rig.host().output(["volume"].iter().chain(words));
        assert!(done.status.success(), "{words:?}: {}", stderr(&done));
        stdout(&done)
    };
    let path = csi.to_str().unwrap();
    volume(&["add", path, &info.to_string()]);
    let mounts = [bind(&dir, "/dir", "rw"), bind(&csi, "/csi", "rw")];
    of_pod(&rig, "pod", &[], &mounts);
    let types = "awk '$2 == \"/dir\" || $2 == \"/csi\" { print $3 }' /proc/mounts";
    assert_eq!(say(&rig, "pod", types), "ext4\next4\n");
    assert_eq!(say(&rig, "pod", "ls /dir; stat -c '%a' /dir; stat -c '%g' /csi"), "777\n42\n");
    say(&rig, "pod", "echo kept > /csi/file; echo x > /dir/file");
    assert_eq!(entry.sandbox().unwrap().unwrap(), "pod");
    assert!(volume(&["stats", "pod", path]).contains("TOTAL"));

    // 8 MiB at 4 MiB a second, less what may pass at once.
    let begin = Instant::now();
    say(&rig, "pod", "dd if=/dev/zero of=/dir/much bs=1M count=8 conv=fsync; rm /dir/much");
    assert!(begin.elapsed() > Duration::from_millis(1700), "{:?}", begin.elapsed());

    // Both outlive a container; what it wrote to the direct volume outlives the pod.
    of_pod(&rig, "side", &[], &mounts);
    assert_eq!(say(&rig, "side", "cat /csi/file /dir/file"), "kept\nx\n");
    rig.remove("side");
    rig.remove("pod");
    assert!(!dir.join("disk.img").exists());
    volume(&["remove", path]);
    let read = Command::new("debugfs").args(["-R", "cat file"]).arg(&device).output().unwrap();
    assert_eq!(stdout(&read), "kept\n", "{}", stderr(&read));
}

#[test]
fn pod_without_a_share_has_its_volumes_all_the_same() {
    let Some(rig) = Containerd::with_blockfiles(Version::V2) else { return };
    if !rig.has_machines() {
        return;
    }
    rig.host().configure("[hypervisor.qemu]\nshared_fs = \"none\"\n");
    let config = volume(&rig, "kubernetes.io~projected", "token");
    publish(&config, "..1", "one");
    let dir = volume(&rig, "kubernetes.io~empty-dir", "dir");
    let hosts = rig.host().scratch("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost\n").unwrap();
    let mounts = [bind(&config, "/token", "ro"), bind(&dir, "/dir", "rw"), bind(&hosts, "/etc/hosts", "rw")];
    of_pod(&rig, "pod", &["--snapshotter", "blockfile"], &mounts);
    assert_eq!(rig.host().pids_of("kata-virtiofsd"), [] as [u32; 0]);
    assert_eq!(say(&rig, "pod", "cat /etc/hosts /token/key; echo x > /dir/file"), "127.0.0.1 localhost\none");
    publish(&config, "..2", "two");
    rig.host().wait_for("the new token", || {
        (stdout(&rig.exec("pod", "look", "cat /token/key; ls -a /token | grep -c '\\.\\.1'")) == "two0\n")
            .then_some(())
    });
    rig.remove("pod");
}

/// Walks a tree of `files` in a container, and answers what the file server had open before, after, and once the guest forgot.
fn descriptors_over_a_tree(files: usize, arguments: &str) -> Option<[usize; 3]> {
    let rig = Containerd::new(Version::V2)?;
    if !rig.has_machines() {
        return None;
    }
    rig.host().configure(&format!("[hypervisor.qemu]\nvirtio_fs_extra_args = [{arguments}]\n"));
    let tree = rig.host().scratch("tree");
    std::fs::create_dir(&tree).unwrap();
    let _tmpfs = Tmpfs::new(&tree, c"nr_inodes=0");
    for number in 0..files {
        let dir = tree.join((number / 100).to_string());
        if number % 100 == 0 {
            std::fs::create_dir(&dir).unwrap();
        }
        std::fs::write(dir.join(number.to_string()), "").unwrap();
    }
    rig.detached(&["--privileged", "--mount", &bind(&tree, "/tree", "ro")], "pod", "exec sleep 1000");
    let servers = || rig.host().pids_of("kata-virtiofsd").into_iter();
    let count = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    let open = || servers().map(count).max().unwrap();
    let idle = open();
    say(&rig, "pod", "(find /tree -type f | xargs stat -c %s | wc -l) > /walked 2> /dev/null < /dev/null &");
    let seen = || stdout(&rig.exec("pod", "look", "cat /walked")) == format!("{files}\n");
    let within = Duration::from_secs(30 + files as u64 / 200);
    kata_testkit::host::wait_for("the walk", within, || seen().then_some(()));
    let walked = open();
    // What was dropped is there again when it is asked for.
    assert_eq!(say(&rig, "pod", "cat /tree/0/* /tree/1?/* | wc -c; ls /tree/0 | wc -l"), "0\n100\n");
    say(&rig, "pod", "echo 2 > /proc/sys/vm/drop_caches");
    let fallen = || (open() < idle + 100).then(open);
    let forgot = kata_testkit::host::wait_for("descriptors to fall", Duration::from_secs(20), fallen);
    rig.remove("pod");
    Some([idle, walked, forgot])
}

#[test]
fn file_servers_descriptors_stay_under_their_bound_over_a_large_tree_and_fall_when_the_guest_forgets() {
    let Some([idle, walked, _]) = descriptors_over_a_tree(4000, r#""--known-files", "1500""#) else { return };
    assert!((1400..1500 + 200).contains(&walked), "{idle}, then {walked}");
}

#[test]
#[ignore = "takes minutes on emulated machines; docs/storage.md has its figures"]
fn file_servers_descriptors_stay_under_their_bound_over_100_000_files() {
    let begin = std::time::Instant::now();
    let Some(open) = descriptors_over_a_tree(100_000, "") else { return };
    println!("idle, walked, forgotten: {open:?} in {:?}", begin.elapsed());
    assert!(open[1] < 16_384 + 500, "{open:?}");
}
