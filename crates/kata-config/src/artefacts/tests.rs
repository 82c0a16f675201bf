use std::os::unix::fs::PermissionsExt;

use super::*;

/// Three empty places to look at.
struct Places {
    dir: tempfile::TempDir,
    search: Search,
}

fn places() -> Places {
    let dir = tempfile::tempdir().unwrap();
    for sub in ["exe", "path", "opt/bin", "opt/libexec", "opt/share/kata"] {
        std::fs::create_dir_all(dir.path().join(sub)).unwrap();
    }
    let beside = dir.path().join("exe");
    set_mode(&beside, 0o755);
    let search =
        Search { beside: Some(beside), path: dir.path().join("path").into(), prefix: dir.path().join("opt") };
    Places { dir, search }
}

impl Places {
    fn program(&self, path: &str) -> PathBuf {
        let path = self.dir.path().join(path);
        std::fs::write(&path, "").unwrap();
        set_mode(&path, 0o755);
        path
    }

    fn image(&self, path: &str) -> PathBuf {
        let dir = self.dir.path().join(path);
        std::fs::create_dir_all(&dir).unwrap();
        set_mode(&dir, 0o755);
        std::fs::write(dir.join(MANIFEST), "{}").unwrap();
        dir
    }
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

fn qemu_name() -> String {
    format!("qemu-system-{}", std::env::consts::ARCH)
}

#[test]
fn what_lies_beside_the_executable_comes_before_the_installation() {
    let places = places();
    let qemu = places.program(&format!("path/{}", qemu_name()));
    for program in ["kata-vmm", "kata-virtiofsd"] {
        places.program(&format!("opt/libexec/{program}"));
    }
    let installed = places.image("opt/share/kata/guest-image");
    let beside = places.program("exe/kata-vmm");
    let found = places.search.artefacts(&Config::default(), HypervisorChoice::Qemu).unwrap();
    assert_eq!(found.vmm, qemu);
    assert_eq!(found.kata_vmm, beside);
    assert_eq!(found.virtiofsd, Some(places.dir.path().join("opt/libexec/kata-virtiofsd")));
    assert_eq!(found.guest_image, Some(installed));
    let image = places.image("exe/guest-image");
    assert_eq!(
        places.search.artefacts(&Config::default(), HypervisorChoice::Qemu).unwrap().guest_image,
        Some(image)
    );
}

#[test]
fn a_miss_names_every_place_and_why() {
    let places = places();
    let beside = places.program("exe/kata-vmm");
    set_mode(&beside, 0o644);
    let error = places.search.program("kata-vmm").unwrap_err().to_string();
    let dir = places.dir.path().display();
    assert_eq!(
        error,
        format!(
            "kata-vmm not found; looked at {dir}/exe/kata-vmm (not executable), {dir}/opt/bin/kata-vmm (not there), \
             {dir}/opt/libexec/kata-vmm (not there)"
        )
    );
}

#[test]
fn a_directory_that_others_can_write_to_is_not_trusted() {
    let places = places();
    places.program("exe/kata-vmm");
    places.image("exe/guest-image");
    set_mode(&places.dir.path().join("exe"), 0o777);
    let error = places.search.program("kata-vmm").unwrap_err().to_string();
    assert!(
        error.contains("exe/kata-vmm (not trusted: exe has mode 777, others can write to it)"),
        "{error}"
    );
    assert!(places.search.guest_image(&Config::default()).unwrap_err().to_string().contains("not trusted"));
}

#[test]
fn a_directory_of_another_user_is_not_trusted() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: giving a directory away needs root");
        return;
    }
    let places = places();
    places.program("exe/kata-vmm");
    std::os::unix::fs::chown(places.dir.path().join("exe"), Some(12345), None).unwrap();
    let error = places.search.program("kata-vmm").unwrap_err().to_string();
    assert!(error.contains("belongs to user 12345"), "{error}");
}

#[test]
fn a_configured_program_has_no_fallback() {
    let places = places();
    places.program(&format!("path/{}", qemu_name()));
    let mut config = Config::default();
    config.hypervisor.qemu.path = Some("/nonexistent/qemu".into());
    let error = places.search.qemu(&config).unwrap_err().to_string();
    assert!(
        error.ends_with("looked at /nonexistent/qemu (not there; named by hypervisor.qemu.path)"),
        "{error}"
    );
}

#[test]
fn what_is_not_needed_is_not_looked_for() {
    let places = places();
    places.program(&format!("path/{}", qemu_name()));
    places.program("exe/kata-vmm");
    let mut config = Config::default();
    config.hypervisor.qemu.shared_fs = SharedFs::None;
    config.hypervisor.qemu.kernel = Some("/k".into());
    config.hypervisor.qemu.initrd = Some("/i".into());
    let found = places.search.artefacts(&config, config.runtime.hypervisor_name).unwrap();
    assert_eq!((found.virtiofsd, found.guest_image), (None, None));
}

#[test]
fn the_chosen_drivers_program_comes_from_its_section_or_the_search_path_and_never_from_qemus() {
    let places = places();
    let own = places.program("exe/kata-vmm");
    let found = places.program("path/cloud-hypervisor");
    let mut config = Config::default();
    config.hypervisor.qemu.path = Some("/opt/qemu".into());
    config.runtime.hypervisor_name = HypervisorChoice::Builtin;
    assert_eq!(places.search.vmm(&config, config.runtime.hypervisor_name).unwrap(), own);
    config.runtime.hypervisor_name = HypervisorChoice::Clh;
    assert_eq!(places.search.vmm(&config, config.runtime.hypervisor_name).unwrap(), found);
    config.hypervisor.cloud_hypervisor.path = Some("/opt/clh".into());
    let error = places.search.vmm(&config, config.runtime.hypervisor_name).unwrap_err().to_string();
    assert!(error.ends_with("/opt/clh (not there; named by hypervisor.cloud-hypervisor.path)"), "{error}");
    config.runtime.hypervisor_name = HypervisorChoice::Firecracker;
    let error = places.search.vmm(&config, config.runtime.hypervisor_name).unwrap_err().to_string();
    assert!(error.starts_with("firecracker not found"), "{error}");
}

#[test]
fn a_directory_that_the_configuration_names_as_the_image_is_the_guest_image() {
    let places = places();
    let dir = places.dir.path().join("services");
    std::fs::create_dir(&dir).unwrap();
    let mut config = Config::default();
    config.hypervisor.qemu.kernel = Some("/k".into());
    config.hypervisor.qemu.image = Some(dir.clone());
    let error = places.search.guest_image(&config).unwrap_err().to_string();
    assert!(error.contains("no manifest.json in it; named by hypervisor.qemu.image"), "{error}");
    std::fs::write(dir.join("manifest.json"), "{}").unwrap();
    assert_eq!(places.search.guest_image(&config).unwrap(), Some(dir));
}
