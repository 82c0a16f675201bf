//! A private world for one test: directories, ids and a configuration of its own, and the real programs.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::driver::Driver;
use crate::leaks;

/// Ids that each test's children run under: disjoint, so that what is left over names its test.
const IDS_PER_TEST: u32 = 20;
const FIRST_ID: u32 = 1_000_000;

/// The programs under test with a run and a state directory of their own. When it is dropped, nothing of any pod
/// may be left: see [`leaks`].
pub struct Host {
    dir: tempfile::TempDir,
    programs: PathBuf,
    image: PathBuf,
    ids: std::ops::Range<u32>,
}

impl Host {
    /// A new world, or `None` (said aloud and counted) where the programs under test were not built.
    pub fn new() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let (Some(programs), Some(image)) =
            (std::env::var_os("KATA_TEST_PROGRAMS"), std::env::var_os("KATA_TEST_IMAGE"))
        else {
            crate::skip("KATA_TEST_PROGRAMS and KATA_TEST_IMAGE are not set: run `make test`");
            return None;
        };
        // Short, for socket paths have 107 bytes; under /run like the real one.
        let dir = tempfile::Builder::new().prefix("kt-").rand_bytes(4).tempdir_in("/run").unwrap();
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o711)).unwrap();
        let slot = (std::process::id() + NEXT.fetch_add(1, Ordering::Relaxed) * 997) % 20_000;
        let first = FIRST_ID + slot * IDS_PER_TEST;
        let host =
            Self { dir, programs: programs.into(), image: image.into(), ids: first..first + IDS_PER_TEST };
        host.configure("");
        Some(host)
    }

    /// Replaces the configuration file by `text` and what every test needs.
    pub fn configure(&self, text: &str) {
        self.configure_at(&self.config(), text);
    }

    /// The same in another file. `KATA_TEST_HYPERVISOR` names the driver and `KATA_TEST_GUEST` the image where the test does not.
    pub fn configure_at(&self, path: &Path, text: &str) {
        let driver = Driver::under_test().name();
        let mut runtime = format!("uid_range = \"{}-{}\"\n", self.ids.start, self.ids.end - 1);
        if std::env::var_os("KATA_TEST_HYPERVISOR").is_some() && !text.contains("hypervisor_name") {
            runtime.push_str(&format!("hypervisor_name = \"{driver}\"\n"));
        }
        let mut text = with_keys(text, "runtime", &runtime);
        if let Some(image) = guest_under_test().filter(|_| !text.contains("image = ")) {
            let key = format!("image = \"{}\"\n", image.display());
            text = with_keys(&text, &format!("hypervisor.{driver}"), &key);
        }
        std::fs::write(path, text).unwrap();
    }

    /// Path of the configuration file.
    pub fn config(&self) -> PathBuf {
        self.dir.path().join("configuration.toml")
    }

    /// A place for the test's own files.
    pub fn scratch(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join("scratch").join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    /// Where pods keep their run-time files.
    pub fn run_dir(&self) -> PathBuf {
        self.dir.path().join("run")
    }

    /// Where images and writable layers are.
    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("lib")
    }

    /// A program under test.
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// The image with busybox, as an argument of `kata-ctl run`.
    pub fn image(&self) -> String {
        format!("oci:{}:latest", self.image.display())
    }

    /// The image's directory, an OCI layout.
    pub fn layout(&self) -> &Path {
        &self.image
    }

    /// Has a program, and what it starts, find this world's directories and configuration.
    pub fn enter(&self, command: &mut Command) {
        command
            .env("KATA_RUN_DIR", self.run_dir())
            .env("KATA_STATE_DIR", self.state_dir())
            .env("KATA_CONF_FILE", self.config());
    }

    /// `kata-ctl` in this world.
    pub fn ctl<I: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Command {
        let mut command = Command::new(self.program("kata-ctl"));
        self.enter(&mut command);
        command.stdin(Stdio::null()).args(args);
        command
    }

    /// Runs `kata-ctl` to its end.
    pub fn output<I: AsRef<std::ffi::OsStr>>(&self, args: impl IntoIterator<Item = I>) -> Output {
        self.ctl(args).output().unwrap()
    }

    /// `kata-ctl run --rm IMAGE sh -c SCRIPT` with options before the image.
    pub fn sh(&self, options: &[&str], script: &str) -> Output {
        let image = self.image();
        let words = ["run", "--rm"].iter().chain(options).copied();
        self.output(words.chain([image.as_str(), "sh", "-c", script]))
    }

    /// What a shell command of this world shows on a terminal of its own, which `script` makes.
    pub fn on_terminal(&self, command: &str) -> String {
        let mut script = Command::new("script");
        self.enter(&mut script);
        let output = script.args(["-qec", command, "/dev/null"]).stdin(Stdio::null()).output().unwrap();
        // The end of its own input, which `script` types into the terminal, is echoed at some moment.
        stdout(&output).replace("^@", "")
    }

    /// What of any pod of this world is still there, after leaving it some time to go.
    pub fn leftovers(&self) -> Vec<String> {
        left_of(|| self.remains())
    }

    /// What of any pod of this world is there now.
    pub fn remains(&self) -> Vec<String> {
        leaks::find(self.dir.path(), &self.run_dir(), &self.state_dir(), &self.ids)
    }

    /// Waits until `probe` finds something; fails the test after ten seconds of [`patience`].
    pub fn wait_for<T>(&self, what: &str, probe: impl FnMut() -> Option<T>) -> T {
        wait_for(what, Duration::from_secs(10), probe)
    }

    /// Processes of this world's pods whose program has this name.
    pub fn pids_of(&self, program: &str) -> Vec<u32> {
        leaks::processes(self.dir.path(), &self.ids)
            .into_iter()
            .filter(|process| process.name == program || process.name.starts_with(program))
            .map(|process| process.pid)
            .collect()
    }

    /// The log of a pod's owner.
    pub fn owner_log(&self, pod: &str) -> String {
        read(&self.run_dir().join(pod).join("owner.log"))
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for entry in std::fs::read_dir(self.run_dir()).into_iter().flatten().flatten() {
                let log = read(&entry.path().join("owner.log"));
                eprintln!("--- owner of {} ---\n{log}", entry.file_name().to_string_lossy());
            }
            leaks::clear(self.dir.path(), &self.ids);
            return;
        }
        let left = self.leftovers();
        leaks::clear(self.dir.path(), &self.ids);
        assert!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    }
}

/// Waits until `probe` finds something; fails the test when the [`patience`] for what `usually` takes no longer is over.
pub fn wait_for<T>(what: &str, usually: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let (begin, patience) = (Instant::now(), patience(usually));
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(begin.elapsed() < patience, "waited {patience:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What of something remains that is given some time to go.
pub(crate) fn left_of(mut remains: impl FnMut() -> Vec<String>) -> Vec<String> {
    let (begin, patience) = (Instant::now(), patience(Duration::from_secs(20)));
    loop {
        let found = remains();
        if found.is_empty() || begin.elapsed() > patience {
            return found;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// How long a test gives to what takes at most as long as `usual` on a quiet machine. A busy one has more of it, more yet has a
/// guest with systemd, which takes seconds to boot, and most has the lab, where machines are emulated within an emulated one.
pub fn patience(usual: Duration) -> Duration {
    let slowness = if std::env::var_os("KATA_TEST_LAB").is_some() {
        12
    } else if guest_under_test().is_some() {
        6
    } else {
        3
    };
    usual * slowness
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// That a program has failed, and said all of this.
#[track_caller]
pub fn refused(output: &Output, words: &[&str]) {
    let text = stderr(output);
    assert!(!output.status.success(), "it succeeded: {}{text}", stdout(output));
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
}

/// Standard output as text.
pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Standard error as text.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Puts keys into a table of a configuration that may or may not have it.
fn with_keys(text: &str, table: &str, keys: &str) -> String {
    let header = format!("[{table}]\n");
    if text.contains(&header) {
        text.replacen(&header, &(header.clone() + keys), 1)
    } else {
        format!("{header}{keys}{text}")
    }
}

/// The guest image of pods for which their test names none: `KATA_TEST_GUEST` is `services`, or not there for the one that was
/// built with the programs.
fn guest_under_test() -> Option<PathBuf> {
    match std::env::var("KATA_TEST_GUEST").as_deref() {
        Ok("services") => Some(std::env::var_os("KATA_TEST_SERVICES").unwrap().into()),
        Ok(other) => panic!("KATA_TEST_GUEST is {other:?}, and not services"),
        Err(_) => None,
    }
}
