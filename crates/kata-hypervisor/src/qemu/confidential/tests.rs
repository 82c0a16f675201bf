use std::io::Write;
use std::process::{Command, Stdio};

use super::*;

fn snp() -> Confidential {
    Confidential {
        kind: ConfidentialKind::SevSnp { policy: 0x3_0000, id_block: String::new(), id_auth: String::new() },
        host_data: Some(vec![7; 32]),
    }
}

fn with_ids(block: usize, auth: usize) -> Confidential {
    let text = |size: usize| STANDARD.encode(vec![1; size]);
    let kind = ConfidentialKind::SevSnp { policy: 0x3_0000, id_block: text(block), id_auth: text(auth) };
    Confidential { kind, host_data: None }
}

#[test]
fn object_of_snp_has_the_digest_and_the_hashes_of_what_is_booted() {
    assert_eq!(
        object(&snp(), 51),
        json!({
            "qom-type": "sev-snp-guest", "id": "tee", "cbitpos": 51, "reduced-phys-bits": 1, "policy": 196_608,
            "kernel-hashes": true, "host-data": "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=",
        })
    );
    let with = object(&with_ids(96, 4096), 47);
    assert_eq!((with["cbitpos"].as_u64(), with["id-block"].as_str().map(str::len)), (Some(47), Some(128)));
    assert!(with["host-data"].is_null() && with["id-auth"].is_string());
}

#[test]
fn object_of_tdx_has_the_digest_and_the_way_to_the_signer() {
    let tdx = |quote_port, host_data| Confidential { kind: ConfidentialKind::Tdx { quote_port }, host_data };
    assert_eq!(
        object(&tdx(4050, Some(vec![0; 48])), 51),
        json!({
            "qom-type": "tdx-guest", "id": "tee", "mrconfigid": STANDARD.encode([0; 48]),
            "quote-generation-socket": { "type": "vsock", "cid": "2", "port": "4050" },
        })
    );
    assert_eq!(
        object(&tdx(0, None), 51)["quote-generation-socket"],
        json!({ "type": "unix", "path": "/var/run/tdx-qgs/qgs.socket" })
    );
}

#[test]
fn what_the_hardware_would_not_take_is_refused_by_the_name_of_its_key() {
    assert_eq!((fault(&snp()), fault(&with_ids(96, 4096))), (None, None));
    let short = Confidential { host_data: Some(vec![7; 31]), ..snp() };
    for (confidential, key) in [
        (short, "host data"),
        (with_ids(95, 4096), "snp_id_block"),
        (with_ids(96, 4095), "snp_id_auth"),
        (with_ids(96, 0), "one without the other"),
    ] {
        let reason = fault(&confidential).unwrap_or_default();
        assert!(reason.contains(key), "{key}: {reason}");
    }
}

#[test]
fn qemu_that_knows_no_such_machine_is_named_with_the_version_that_does() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("qemu");
    let says = |version: &str| {
        let script = format!("#!/bin/sh\necho 'QEMU emulator version {version}'\n");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    };
    let tdx = Confidential { kind: ConfidentialKind::Tdx { quote_port: 1 }, host_data: None };
    says("7.2.22 (Debian)");
    let error = check_version(&program, &snp()).unwrap_err().to_string();
    assert_eq!(error, "SEV-SNP is not supported by QEMU 7.2; install QEMU 9.1 or later");
    says("10.0.2");
    assert!(check_version(&program, &snp()).is_ok());
    let error = check_version(&program, &tdx).unwrap_err().to_string();
    assert_eq!(error, "TDX is not supported by QEMU 10.0; install QEMU 10.1 or later");
}

/// The object alone: a machine needs the hardware.
#[test]
fn qemu_takes_the_object_with_every_property() {
    let named = std::env::var_os("KATA_TEST_NEWER_QEMU");
    let program = named.unwrap_or_else(|| "qemu-system-x86_64".into());
    if check_version(Path::new(&program), &snp()).is_err() || QemuVersion::probe(Path::new(&program)).is_err()
    {
        println!("skipped: no QEMU 9.1 or later here; KATA_TEST_NEWER_QEMU names one");
        return;
    }
    let mut confidential = with_ids(96, 4096);
    confidential.host_data = Some(vec![7; 32]);
    let object = object(&confidential, 51).to_string();
    let ran = |object: &str| {
        let mut command = Command::new(&program);
        command.args(["-nodefaults", "-display", "none", "-machine", "none", "-S", "-object", object]);
        command
            .args(["-monitor", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // One that has refused its arguments reads no more.
        let _ = child.stdin.take().unwrap().write_all(b"quit\n");
        child.wait_with_output().unwrap()
    };
    let output = ran(&object);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let other = ran(&object.replace("host-data", "hostdata"));
    assert!(!other.status.success(), "a property that is not there is refused");
}
