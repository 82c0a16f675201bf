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
fn guest_without_the_disk_has_nothing_written() {
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
fn initdata_of_another_machine_is_refused_by_snps_report() {
    let guest = Guest::of(Some(Hardware::Snp));
    guest.disk("vda", "initdata", &image());
    // No configfs: the host does not get around the check by that.
    assert!(guest.fault().contains("SEV-SNP's host data cannot be had"));
    let cut = super::verify::compare(&initdata(), "SEV-SNP's host data", &[0; 32]);
    assert!(cut.unwrap_err().to_string().contains("is not what the machine was started with"));
    assert!(super::verify::compare(&initdata(), "SEV-SNP's host data", initdata().digest()).is_ok());
}

#[test]
fn initdata_of_another_machine_is_refused_by_tdxs_field() {
    let guest = Guest::of(Some(Hardware::Tdx));
    guest.disk("vda", "initdata", &image());
    let field = "sys/devices/virtual/misc/tdx_guest/measurements/mrconfigid";
    assert!(guest.fault().contains("TDX's mrconfigid cannot be had"));
    guest.file(field, &[0; 48]);
    let error = guest.fault();
    assert!(error.contains("sha256 digest is") && error.contains(&"0".repeat(96)), "{error}");
    guest.file(field, &[0; 47]);
    assert!(guest.fault().contains("cannot be had"));
    guest.file(field, &initdata().host_data(48));
    assert!(
        matches!(process(&guest.places).unwrap(), Outcome::Bound { verifiers, .. } if verifiers == ["tdx"])
    );
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
