use super::*;

const RECORD: &str = "Package: linux-image-cloud-amd64\nSource: linux-signed-amd64 (6.1.192+2)\nVersion: 6.1.192-2\n\
                      Depends: linux-base (>= 4), linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\nDescription-en: x\n Version: no\n";

#[test]
fn concrete_package_is_found_behind_the_meta_package() {
    let depends = field(RECORD, "Depends").unwrap();
    assert_eq!(image_dependency(depends).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
    assert_eq!(image_dependency("linux-base, libc6 (>= 2)"), None);
}

#[test]
fn field_is_taken_from_the_beginning_of_a_line() {
    assert_eq!(field(RECORD, "Version"), Some("6.1.192-2"));
    assert_eq!(field(RECORD, "Vers"), None);
}

#[test]
fn package_names_its_version() {
    let package = Package { name: "linux".into(), version: "1:6-1~deb12u1".into() };
    assert_eq!(package.to_string(), "linux_1:6-1~deb12u1");
}

#[test]
fn package_that_apt_does_not_know_is_told_with_what_to_do() {
    match Package::candidate("no-such-package-in-any-archive", UPDATE_HINT) {
        Err(KernelError::NoPackage { hint, .. }) => assert_eq!(hint, UPDATE_HINT),
        Err(KernelError::Tool(ToolError::Start { .. })) => println!("skipped: this machine has no apt"),
        other => panic!("{other:?}"),
    }
}
