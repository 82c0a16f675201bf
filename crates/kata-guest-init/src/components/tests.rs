use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::manifest::PATH;
use crate::plan::tests::COCO;

/// An extension on a disk of the test's.
struct Extension(tempfile::TempDir);

impl Extension {
    fn new(manifest: &str) -> Self {
        let extension = Self(tempfile::tempdir().unwrap());
        extension.file(PATH, manifest, 0o644);
        extension
    }

    fn coco() -> Self {
        let extension = Self::new(COCO);
        for program in ["attestation-agent", "confidential-data-hub", "api-server-rest"] {
            extension.file(&format!("usr/local/bin/{program}"), "", 0o755);
        }
        extension
    }

    fn simple() -> Self {
        Self::new("schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\npath = \"bin/a\"")
    }

    fn path(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    fn file(&self, name: &str, text: &str, mode: u32) {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn services(&self, name: &str) -> Result<Services, ComponentsError> {
        let directory = Directory {
            owner: format!("extension-{name}"),
            here: self.0.path().into(),
            root: format!("/run/kata-extensions/{name}"),
            manifest: PATH,
        };
        directory.services(&Table::built_in().unwrap(), &[name.to_owned()])
    }
}

#[test]
fn an_extension_becomes_units_that_are_started_and_sockets_that_are_found() {
    let services = Extension::coco().services("coco").unwrap();
    let run = tempfile::tempdir().unwrap();
    let table = Table::built_in().unwrap();
    assert_eq!(install(run.path(), &[services], table.links()).unwrap(), 3);
    // Those that are told of no other place look for their initdata here.
    let link = std::fs::read_link(run.path().join("confidential-containers/initdata")).unwrap();
    assert_eq!(link, Path::new("/run/measured-cfg"));
    let unit = "extension-coco.confidential-data-hub.service";
    let wants = run.path().join("systemd/system/guest-services.target.wants").join(unit);
    let text = std::fs::read_to_string(wants).unwrap();
    assert!(text.contains("/run/kata-extensions/coco/usr/local/bin/confidential-data-hub"), "{text}");
    let link = std::fs::read_link(run.path().join("guest-services/image-pull.socket")).unwrap();
    assert_eq!(link, Path::new("/run/confidential-containers/cdh.sock"));
    // The agent asks for the state of what serves it by the same name.
    let link = std::fs::read_link(run.path().join("systemd/system/image-pull.service")).unwrap();
    assert_eq!(link, Path::new(unit));
}

#[test]
fn symbolic_links_out_of_the_extension_are_refused() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("sh"), "").unwrap();
    let sh = outside.path().join("sh");
    for target in [sh.to_str().unwrap(), "/bin/sh", "../../../../../../../bin/sh", "/proc/self/exe"] {
        let extension = Extension::simple();
        symlink(target, extension.path("bin/a")).unwrap();
        let error = extension.services("x").unwrap_err();
        assert!(matches!(&error, ComponentsError::Open { file, .. } if file == "bin/a"), "{target}: {error}");
    }
    let extension = Extension::simple();
    extension.file("real/a", "", 0o755);
    symlink("../real/a", extension.path("bin/a")).unwrap();
    extension.services("x").unwrap();
}

#[test]
fn a_manifest_out_of_the_extension_is_refused() {
    let outside = Extension::simple();
    let extension = Extension(tempfile::tempdir().unwrap());
    symlink(outside.path(PATH), extension.path(PATH)).unwrap();
    let error = extension.services("x").unwrap_err();
    assert!(matches!(error, ComponentsError::Open { .. }), "{error}");
}

#[test]
fn an_extension_without_a_manifest_is_broken() {
    let extension = Extension(tempfile::tempdir().unwrap());
    let error = extension.services("x").unwrap_err();
    assert!(matches!(error, ComponentsError::NoManifest { .. }), "{error}");
}

#[test]
fn a_program_that_is_absent_or_no_program_is_told_by_its_name() {
    let error = Extension::simple().services("x").unwrap_err();
    assert!(matches!(&error, ComponentsError::Open { file, .. } if file == "bin/a"), "{error}");
    let extension = Extension::simple();
    extension.file("bin/a", "", 0o644);
    assert!(matches!(extension.services("x").unwrap_err(), ComponentsError::NoProgram { mode: 0o644, .. }));
    let extension = Extension::simple();
    std::fs::create_dir_all(extension.path("bin/a")).unwrap();
    assert!(matches!(extension.services("x").unwrap_err(), ComponentsError::NoFile { .. }));
    let extension = Extension::simple();
    rustix::fs::mknodat(rustix::fs::CWD, extension.path("bin/a"), FileType::Fifo, 0o755.into(), 0).unwrap();
    assert!(matches!(extension.services("x").unwrap_err(), ComponentsError::NoFile { .. }));
}

#[test]
fn a_huge_manifest_is_read_no_further_than_its_bound() {
    let extension = Extension::simple();
    let manifest = File::create(extension.path(PATH)).unwrap();
    manifest.set_len(1 << 40).unwrap();
    let error = extension.services("x").unwrap_err();
    let ComponentsError::Manifest { source, .. } = error else { panic!("{error}") };
    assert!(matches!(*source, ManifestError::Long), "{source}");
}

#[test]
fn two_extensions_that_do_the_same_for_the_agent_are_refused_and_nothing_is_written() {
    let other = "schema_version = 1\n[[process]]\nid = \"a\"\nlevel = 1\npath = \"a\"\nwait_socket = \"/run/a.sock\"\n\
                 guest_services = [\"image-pull\"]";
    let other = Extension::new(other);
    other.file("a", "", 0o755);
    let all = [Extension::coco().services("coco").unwrap(), other.services("mine").unwrap()];
    let run = tempfile::tempdir().unwrap();
    let error = install(run.path(), &all, &BTreeMap::new()).unwrap_err();
    assert!(matches!(&error, ComponentsError::Twice { service, .. } if service == "image-pull"), "{error}");
    assert_eq!(std::fs::read_dir(run.path()).unwrap().count(), 0);
}

#[test]
fn a_unit_that_is_there_already_is_not_written_over() {
    let extension = Extension::simple();
    extension.file("bin/a", "", 0o755);
    let run = tempfile::tempdir().unwrap();
    let all = [extension.services("x").unwrap()];
    install(run.path(), &all, &BTreeMap::new()).unwrap();
    assert!(matches!(install(run.path(), &all, &BTreeMap::new()), Err(ComponentsError::Write { .. })));
}
