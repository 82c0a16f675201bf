use std::fs;

use super::*;

/// A guest's root, whose processor has `flags` beside others; under SEV-SNP if `snp`.
pub(crate) fn guest(snp: bool, flags: &str) -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let devices = root.path().join("sys/devices/platform");
    fs::create_dir_all(if snp { devices.join("sev-guest") } else { devices }).unwrap();
    fs::create_dir(root.path().join("proc")).unwrap();
    let cpu = format!("processor\t: 0\nflags\t\t: fpu {flags} sse\n");
    fs::write(root.path().join("proc/cpuinfo"), cpu).unwrap();
    root
}

/// A guest's root under `hardware`.
pub(crate) fn guest_of(hardware: Hardware) -> tempfile::TempDir {
    match hardware {
        Hardware::Snp => guest(true, "hypervisor"),
        Hardware::Tdx => guest(false, "hypervisor tdx_guest"),
    }
}

#[test]
fn hardware_is_known_by_what_its_processor_tells_the_kernel() {
    for hardware in Hardware::ALL {
        assert_eq!(Hardware::of(guest_of(hardware).path()).unwrap(), Some(hardware));
    }
    assert_eq!(Hardware::of(guest(false, "svm vmx").path()).unwrap(), None);
}

#[test]
fn flag_of_a_host_that_starts_such_guests_makes_no_guest_of_it() {
    assert_eq!(Hardware::of(guest(false, "sev sev_es sev_snp").path()).unwrap(), None);
}

#[test]
fn guest_that_shows_neither_devices_nor_processor_is_no_ordinary_one() {
    for hidden in ["sys", "proc"] {
        let root = guest(false, "");
        fs::remove_dir_all(root.path().join(hidden)).unwrap();
        let error = Hardware::of(root.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("/{hidden}/")) && error.contains("is not known"), "{error}");
    }
}
