use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

struct Guest(tempfile::TempDir);

impl Guest {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, inside: &str) -> std::path::PathBuf {
        self.0.path().join(inside)
    }

    fn request(&self, inside: &str, data: &[u8]) -> CopyFileRequest {
        CopyFileRequest {
            path: self.path(inside).to_str().unwrap().into(),
            file_size: i64::try_from(data.len()).unwrap(),
            file_mode: 0o100_640,
            dir_mode: 0o750,
            uid: -1,
            gid: -1,
            data: data.to_vec(),
            ..Default::default()
        }
    }

    fn copy(&self, request: &CopyFileRequest) -> Result<(), RpcError> {
        copy(self.0.path(), request)
    }
}

#[test]
fn chunks_make_a_whole_file_with_its_modes() {
    let guest = Guest::new();
    let mut request = guest.request("a/b/file", b"first ");
    request.file_size = 12;
    guest.copy(&request).unwrap();
    assert!(!guest.path("a/b/file").exists(), "half a file is not seen");
    request.offset = 6;
    request.data = b"second".to_vec();
    guest.copy(&request).unwrap();
    assert_eq!(std::fs::read(guest.path("a/b/file")).unwrap(), b"first second");
    let mode = |path: &str| std::fs::metadata(guest.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode("a/b/file"), mode("a/b")), (0o640, 0o750));
    assert_eq!(std::fs::read_dir(guest.path("a/b")).unwrap().count(), 1, "nothing is left beside it");
}

#[test]
fn an_empty_file_a_directory_and_a_link_are_made_and_made_anew() {
    let guest = Guest::new();
    for _ in 0..2 {
        guest.copy(&guest.request("empty", b"")).unwrap();
        let mut request = guest.request("dir", b"");
        request.file_mode = 0o040_711;
        guest.copy(&request).unwrap();
        let mut request = guest.request("link", b"/etc/anything");
        request.file_mode = 0o120_777;
        guest.copy(&request).unwrap();
    }
    assert_eq!(std::fs::metadata(guest.path("empty")).unwrap().len(), 0);
    assert_eq!(std::fs::metadata(guest.path("dir")).unwrap().permissions().mode() & 0o7777, 0o711);
    assert_eq!(std::fs::read_link(guest.path("link")).unwrap(), Path::new("/etc/anything"));
}

#[test]
fn a_path_that_leaves_the_base_is_refused() {
    let guest = Guest::new();
    for path in ["/etc/passwd", "../x", "a/../../x", ""] {
        let mut request = guest.request("x", b"x");
        request.path =
            if path.starts_with('/') { path.into() } else { guest.path(path).to_str().unwrap().into() };
        assert!(matches!(guest.copy(&request), Err(RpcError::Invalid(_))), "{path}");
    }
}

#[test]
fn a_symbolic_link_on_the_way_is_not_followed() {
    let (guest, elsewhere) = (Guest::new(), Guest::new());
    symlink(elsewhere.0.path(), guest.path("trap")).unwrap();
    assert!(guest.copy(&guest.request("trap/file", b"x")).is_err());
    symlink(elsewhere.path("victim"), guest.path("file.partial")).unwrap();
    assert!(guest.copy(&guest.request("file", b"x")).is_err());
    assert_eq!(std::fs::read_dir(elsewhere.0.path()).unwrap().count(), 0, "nothing was written elsewhere");
}

#[test]
fn a_chunk_beyond_the_files_size_and_a_device_are_refused() {
    let guest = Guest::new();
    for (offset, size) in [(4, 4), (-1, 4), (i64::MAX, 4), (0, -1)] {
        let mut request = guest.request("x", b"xx");
        (request.offset, request.file_size) = (offset, size);
        assert!(matches!(guest.copy(&request), Err(RpcError::Invalid(_))), "{offset} {size}");
    }
    let mut request = guest.request("x", b"");
    request.file_mode = 0o020_600;
    assert!(matches!(guest.copy(&request), Err(RpcError::Invalid(_))));
}

#[test]
fn a_pipe_that_lies_in_the_way_neither_stops_the_agent_nor_gets_the_data() {
    for reader in [false, true] {
        let guest = Guest::new();
        let pipe = guest.path("file.partial");
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let _reader = reader.then(|| rustix::fs::open(&pipe, flags, Mode::empty()).unwrap());
        assert!(guest.copy(&guest.request("file", b"x")).is_err());
        assert!(!guest.path("file").exists());
    }
}

#[test]
fn a_link_is_changed_in_one_step_and_a_file_gives_way_to_it() {
    let guest = Guest::new();
    let link = |target: &str| CopyFileRequest {
        file_mode: 0o120_777,
        ..guest.request("v/..data", target.as_bytes())
    };
    guest.copy(&link("..first")).unwrap();
    guest.copy(&link("..second")).unwrap();
    assert_eq!(std::fs::read_link(guest.path("v/..data")).unwrap(), Path::new("..second"));
    guest.copy(&guest.request("v/name", b"file")).unwrap();
    guest
        .copy(&CopyFileRequest { path: guest.path("v/name").to_str().unwrap().into(), ..link("..data/name") })
        .unwrap();
    assert_eq!(std::fs::read_link(guest.path("v/name")).unwrap(), Path::new("..data/name"));
    assert_eq!(std::fs::read_dir(guest.path("v")).unwrap().count(), 2, "nothing is left beside them");
}

#[test]
fn what_is_removed_goes_with_all_in_it_and_links_are_not_followed() {
    let guest = Guest::new();
    guest.copy(&guest.request("c/old/a/file", b"x")).unwrap();
    guest.copy(&guest.request("kept/file", b"x")).unwrap();
    symlink(guest.path("kept"), guest.path("c/old/link")).unwrap();
    symlink(guest.path("kept"), guest.path("c/way")).unwrap();
    remove(guest.0.path(), &guest.path("c/old")).unwrap();
    assert!(!guest.path("c/old").exists());
    remove(guest.0.path(), &guest.path("c/old")).unwrap();
    remove(guest.0.path(), &guest.path("none/at/all")).unwrap();
    // Neither through a link nor to the outside.
    remove(guest.0.path(), &guest.path("c/way/file")).unwrap_err();
    remove(guest.0.path(), Path::new("/etc/passwd")).unwrap_err();
    remove(guest.0.path(), &guest.0.path().join("c/../kept")).unwrap_err();
    remove(guest.0.path(), guest.0.path()).unwrap_err();
    // A link goes itself.
    remove(guest.0.path(), &guest.path("c/way")).unwrap();
    assert!(guest.path("kept/file").exists() && !guest.path("c/way").exists());
}
