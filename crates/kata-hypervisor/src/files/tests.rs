use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn somebody(groups: &[u32]) -> Identity {
    Identity { uid: 4711, gid: 4711, groups: groups.to_vec() }
}

fn file(mode: u32) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), "kernel").unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
    file
}

fn target_of(fd: &OwnedFd) -> String {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().to_string_lossy().into_owned()
}

#[test]
fn file_that_anybody_may_read_is_handed_over_itself() {
    let file = file(0o644);
    let fd = open_for(&somebody(&[]), file.path(), "guest kernel").unwrap();
    assert_eq!(target_of(&fd), file.path().to_str().unwrap());
}

#[test]
fn file_that_the_identity_may_not_read_is_copied_into_memory() {
    let file = file(0o600);
    let fd = open_for(&somebody(&[]), file.path(), "guest kernel").unwrap();
    assert!(target_of(&fd).starts_with("/memfd:"), "{}", target_of(&fd));
    // A disk that is not written is refused by QEMU otherwise.
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap();
    assert_eq!(flags & rustix::fs::OFlags::RWMODE, rustix::fs::OFlags::RDONLY);
    // Opened anew, as QEMU does.
    let mut text = String::new();
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "kernel");
}

#[test]
fn disk_is_opened_itself_and_only_as_it_is_to_be_used() {
    let file = file(0o600);
    for (readonly, expected) in [(true, rustix::fs::OFlags::RDONLY), (false, rustix::fs::OFlags::RDWR)] {
        let disk = DiskFile::open(file.path(), readonly).unwrap();
        let flags = rustix::fs::fcntl_getfl(&disk.fd).unwrap();
        assert_eq!(flags & rustix::fs::OFlags::RWMODE, expected);
        assert_eq!((target_of(&disk.fd).as_str(), disk.is_device), (file.path().to_str().unwrap(), false));
    }
}

#[test]
fn pipe_and_directory_are_no_disks() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for path in [pipe.as_path(), dir.path(), Path::new("/dev/null"), Path::new("/no/such/disk")] {
        let error = DiskFile::open(path, true).unwrap_err();
        assert_eq!(error.to_string(), format!("disk {path:?} cannot be used"));
    }
}

#[test]
fn missing_file_and_directory_are_named() {
    let error = open_for(&somebody(&[]), Path::new("/no/such/kernel"), "guest kernel").unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with(r#"guest kernel "/no/such/kernel" cannot be used; "#), "{text}");
    assert!(text.contains("hypervisor.qemu.kernel"), "{text}");
    assert!(open_for(&somebody(&[]), Path::new("/"), "initrd").is_err());
}

#[test]
fn kvm_group_is_joined_only_where_that_is_what_grants_access() {
    let device = file(0o666);
    assert_eq!(with_device(&somebody(&[1]), device.path()).unwrap(), somebody(&[1]));
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: giving a file to another group needs root");
        return;
    }
    let device = file(0o660);
    std::os::unix::fs::chown(device.path(), Some(0), Some(105)).unwrap();
    assert_eq!(with_device(&somebody(&[1]), device.path()).unwrap(), somebody(&[1, 105]));
    // Never the group root.
    std::os::unix::fs::chown(device.path(), Some(0), Some(0)).unwrap();
    let error = with_device(&somebody(&[]), device.path()).unwrap_err().to_string();
    assert!(
        error.contains("user 4711") && error.contains("mode 0660") && error.contains("chgrp kvm"),
        "{error}"
    );
    let root = Identity { uid: 0, gid: 0, groups: Vec::new() };
    assert_eq!(with_device(&root, device.path()).unwrap(), root);
}
