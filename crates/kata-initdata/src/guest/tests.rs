use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use kata_evidence::Hardware;

use super::*;
use crate::{Initdata, write_image};

const TEXT: &str = "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"aa.toml\" = 'a = 1'\n\"policy.rego\" = 'package agent_policy'\n";

/// The tree of a guest.
struct Guest {
    dir: tempfile::TempDir,
    places: Places,
}

impl Guest {
    /// An ordinary one.
    fn new() -> Self {
        Self::of(None)
    }

    fn of(hardware: Option<Hardware>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let places = Places { root: dir.path().into(), ..Places::default() };
        let guest = Self { dir, places };
        let flag = if hardware == Some(Hardware::Tdx) { "tdx_guest" } else { "sse" };
        guest.file("proc/cpuinfo", format!("processor\t: 0\nflags\t\t: fpu {flag}\n").as_bytes());
        let device = if hardware == Some(Hardware::Snp) { "sev-guest" } else { "serial8250" };
        guest.file(&format!("sys/devices/platform/{device}/uevent"), b"");
        guest
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn file(&self, path: &str, bytes: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn disk(&self, name: &str, serial: &str, holds: &[u8]) {
        self.file(&format!("sys/block/{name}/serial"), serial.as_bytes());
        self.file(&format!("dev/{name}"), holds);
    }

    fn verifier(&self, name: &str, script: &str) {
        let path = format!("usr/lib/kata-initdata/verifiers/{name}");
        self.file(&path, format!("#!/bin/sh\n{script}\n").as_bytes());
        std::fs::set_permissions(self.path(&path), std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// A guest whose hardware says that the machine was started with `field`.
    fn started(hardware: Hardware, field: &[u8]) -> Self {
        let mut guest = Self::of(Some(hardware));
        guest.places.host_data = |root, _| Ok(std::fs::read(root.join("field")).unwrap());
        guest.file("field", field);
        guest
    }

    fn measured(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path("run/measured-cfg")) else { return Vec::new() };
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn fault(&self) -> String {
        let error = process(&self.places).unwrap_err().to_string();
        assert!(self.measured().is_empty(), "{error}");
        error
    }
}

fn initdata() -> Initdata {
    Initdata::parse(TEXT.into()).unwrap()
}

fn image() -> Vec<u8> {
    let mut image = Vec::new();
    write_image(&initdata(), &mut image).unwrap();
    image
}

#[test]
fn keys_become_files_that_nobody_writes() {
    let guest = Guest::new();
    guest.disk("vda", "root", b"something else entirely");
    guest.disk("vdb", "initdata\n", &image());
    let bound = Outcome::Bound { keys: 2, verifiers: vec!["none".to_owned()] };
    assert_eq!(process(&guest.places).unwrap(), bound);
    assert_eq!(guest.measured(), ["aa.toml", "initdata.toml", "policy.rego"]);
    assert_eq!(std::fs::read_to_string(guest.path("run/measured-cfg/aa.toml")).unwrap(), "a = 1");
    assert_eq!(std::fs::read(guest.path("run/measured-cfg/initdata.toml")).unwrap(), initdata().raw());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&guest.path("run/measured-cfg/aa.toml")), 0o444);
    assert_eq!(mode(&guest.path("run/measured-cfg")), 0o755);
    assert_eq!(std::fs::read_dir(guest.path("run")).unwrap().count(), 1);
}

#[test]
fn disk_without_a_serial_number_is_found_by_what_it_holds() {
    let guest = Guest::new();
    guest.disk("sda", "", b"short");
    guest.disk("sdb", "", &image());
    assert!(matches!(process(&guest.places).unwrap(), Outcome::Bound { keys: 2, .. }));
}

#[test]
fn ordinary_guest_without_the_disk_has_nothing_written() {
    let guest = Guest::new();
    assert_eq!(process(&guest.places).unwrap(), Outcome::Absent);
    guest.disk("vda", "root", &[0; 1024]);
    assert_eq!(process(&guest.places).unwrap(), Outcome::Absent);
    assert!(guest.measured().is_empty());
}

#[test]
fn disk_that_is_named_so_and_holds_something_else_is_refused() {
    let guest = Guest::new();
    guest.disk("vda", "initdata", b"something else entirely");
    assert!(guest.fault().contains("holds no initdata"));
}

#[test]
fn initdata_is_taken_once() {
    let guest = Guest::new();
    guest.disk("vda", "initdata", &image());
    process(&guest.places).unwrap();
    let error = process(&guest.places).unwrap_err().to_string();
    assert!(error.contains("is there already"), "{error}");
    let error = deny(&guest.places, "too late").unwrap_err().to_string();
    assert!(error.contains("is there already"), "{error}");
    assert_eq!(guest.measured(), ["aa.toml", "initdata.toml", "policy.rego"]);
}

#[test]
fn disk_that_is_named_so_and_cannot_be_read_is_an_error() {
    let guest = Guest::new();
    guest.file("sys/block/vda/serial", b"initdata");
    assert!(guest.fault().contains("cannot read"));
    // Reads of a directory fail.
    std::fs::create_dir_all(guest.path("dev/vda")).unwrap();
    assert!(guest.fault().contains("first bytes of the disk cannot be read"));
    std::fs::remove_dir(guest.path("dev/vda")).unwrap();
    guest.file("dev/vda", b"initdata");
    assert!(guest.fault().contains("the initdata disk cannot be read"));
}

#[test]
fn disk_without_a_name_that_begins_so_and_cannot_be_read_further_is_an_error() {
    let guest = Guest::new();
    guest.disk("sda", "", &image()[..40]);
    assert!(guest.fault().contains("the initdata disk cannot be read"));
}

#[test]
fn drive_that_cannot_be_read_at_all_hides_no_other_disk() {
    let guest = Guest::new();
    guest.file("sys/block/sda/size", b"0");
    std::fs::create_dir_all(guest.path("dev/sdb")).unwrap();
    guest.file("sys/block/sdb/size", b"0");
    assert_eq!(process(&guest.places).unwrap(), Outcome::Absent);
    guest.disk("sdc", "", &image());
    assert!(matches!(process(&guest.places).unwrap(), Outcome::Bound { .. }));
}

#[test]
fn initdata_of_another_machine_is_refused_by_the_hardware() {
    for (hardware, size, name) in [(Hardware::Snp, 32, "snp"), (Hardware::Tdx, 48, "tdx")] {
        let guest = Guest::started(hardware, &vec![0; size]);
        guest.disk("vda", "initdata", &image());
        let error = guest.fault();
        assert!(error.contains("is not what the machine was started with"), "{error}");
        assert!(error.contains("sha256 digest is") && error.contains(&"00".repeat(size)), "{error}");
        guest.file("field", &initdata().host_data(size));
        let outcome = process(&guest.places).unwrap();
        assert!(matches!(outcome, Outcome::Bound { verifiers, .. } if verifiers == [name]));
    }
}

#[test]
fn guest_whose_disk_was_left_out_is_told_by_the_hardware() {
    for (hardware, size, name) in [(Hardware::Snp, 32, "SEV-SNP's host"), (Hardware::Tdx, 48, "TDX's mr")] {
        let guest = Guest::started(hardware, &initdata().host_data(size));
        let error = guest.fault();
        assert!(error.contains("has no disk with it") && error.contains(name), "{error}");
        // A disk that cannot be read is as good as none.
        std::fs::create_dir_all(guest.path("dev/sda")).unwrap();
        guest.file("sys/block/sda/size", b"0");
        assert!(guest.fault().contains("has no disk with it"));
    }
}

#[test]
fn guest_that_was_started_without_initdata_starts_without() {
    for (hardware, size) in [(Hardware::Snp, 32), (Hardware::Tdx, 48)] {
        let guest = Guest::started(hardware, &vec![0; size]);
        assert_eq!(process(&guest.places).unwrap(), Outcome::Absent);
        assert!(guest.measured().is_empty());
    }
}

#[test]
fn hardware_that_does_not_say_vouches_for_neither_a_document_nor_its_absence() {
    for (hardware, name) in [(Hardware::Snp, "SEV-SNP's host data"), (Hardware::Tdx, "TDX's mrconfigid")] {
        // No configfs, no device: the host does not get around the check by that.
        let guest = Guest::of(Some(hardware));
        let silent = format!("{name} cannot be had");
        assert!(guest.fault().contains(&silent));
        guest.disk("vda", "initdata", &image());
        assert!(guest.fault().contains(&silent));
    }
}

#[test]
fn field_of_tdx_is_the_one_that_the_kernel_shows() {
    let guest = Guest::of(Some(Hardware::Tdx));
    let field = "sys/devices/virtual/misc/tdx_guest/measurements/mrconfigid";
    guest.file(field, &[0; 48]);
    assert_eq!(process(&guest.places).unwrap(), Outcome::Absent);
    guest.file(field, &initdata().host_data(48));
    assert!(guest.fault().contains("has no disk with it"));
    guest.disk("vda", "initdata", &image());
    assert!(matches!(process(&guest.places).unwrap(), Outcome::Bound { .. }));
}

#[test]
fn image_with_verifiers_demands_initdata() {
    let guest = Guest::new();
    guest.verifier("10-first", "exit 0");
    let error = guest.fault();
    assert!(error.contains("demands one") && error.contains("10-first"), "{error}");
    let guest = Guest::started(Hardware::Snp, &[0; 32]);
    guest.verifier("10-first", "exit 0");
    assert!(guest.fault().contains("demands one"));
}

#[test]
fn every_program_has_to_agree() {
    let guest = Guest::new();
    guest.disk("vda", "initdata", &image());
    guest.verifier("10-first", "exit 0");
    guest.verifier("20-second", "exit 3");
    let error = guest.fault();
    assert!(error.contains("20-second does not agree: exit status: 3"), "{error}");
    guest.verifier("20-second", "kill -9 $$");
    assert!(guest.fault().contains("signal: 9"));
    guest.file("usr/lib/kata-initdata/verifiers/20-second", b"exit 0");
    std::fs::set_permissions(
        guest.path("usr/lib/kata-initdata/verifiers/20-second"),
        std::fs::Permissions::from_mode(0o644),
    )
    .unwrap();
    assert!(guest.fault().contains("20-second cannot be run"));
}

#[test]
fn program_is_told_the_document_and_its_digest() {
    let guest = Guest::new();
    guest.disk("vda", "initdata", &image());
    let script = r#"test "$1" = sha256 && test "$(sha256sum | cut -c1-64)" = "$2""#;
    guest.verifier("digest", script);
    let bound = Outcome::Bound { keys: 2, verifiers: vec!["none".to_owned(), "digest".to_owned()] };
    assert_eq!(process(&guest.places).unwrap(), bound);
}

#[test]
fn what_cannot_be_trusted_leaves_a_policy_that_says_why() {
    let guest = Guest::new();
    deny(&guest.places, "the verifier \"x\"\nsaid no\u{7}").unwrap();
    assert_eq!(guest.measured(), ["policy.rego"]);
    let policy = std::fs::read_to_string(guest.path("run/measured-cfg/policy.rego")).unwrap();
    assert!(policy.contains(r#"reason := "the verifier \"x\"\nsaid no ""#), "{policy}");
    assert!(policy.contains("default AllowRequestsFailingPolicy := false"), "{policy}");
}
