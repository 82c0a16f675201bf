//! Guests with services beside the agent: the image that they boot, and extensions that bring them more.

use std::fs;
use std::path::{Path, PathBuf};

use crate::host::{Host, stderr, stdout};

/// Where the fake services listen in the guest; names that the agent knows lead there.
const FAKE_SOCKET: &str = "/run/fake-guest-services/services.socket";

/// The directory of an image with systemd, from `KATA_TEST_SERVICES`; `None` (said and counted) where none was built.
pub fn image() -> Option<PathBuf> {
    let image = std::env::var_os("KATA_TEST_SERVICES").map(PathBuf::from);
    if image.is_none() {
        crate::skip("KATA_TEST_SERVICES is not set: no services image was built");
    }
    image
}

/// An extension image called `tools`.
pub struct Extension {
    /// The image.
    pub file: PathBuf,
    /// What its blocks are verified against.
    pub verity: String,
}

impl Extension {
    /// With a static program in `bin`, and a manifest.
    #[track_caller]
    pub fn new(host: &Host, program: &Path, components: &str) -> Self {
        let (tree, file) = (host.scratch("extension"), host.scratch("extension.img"));
        let manifest = tree.join("etc/kata-extensions/components.toml");
        let copy = tree.join("bin").join(program.file_name().unwrap());
        for path in [&manifest, &copy] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
        }
        fs::copy(program, copy).unwrap();
        fs::write(manifest, components).unwrap();
        let [tree, output] = [&tree, &file].map(|path| path.to_str().unwrap());
        let made = host.output(["image", "extension", "--name", "tools", "--tree", tree, "--output", output]);
        assert!(made.status.success(), "{}", stderr(&made));
        Self { verity: stdout(&made).trim().to_owned(), file }
    }

    /// With services that open secrets and mount volumes without an authority, from `KATA_TEST_FAKE_SERVICES`: see the program.
    /// `None` (said and counted) where it was not built.
    #[track_caller]
    pub fn of_fakes(host: &Host) -> Option<Self> {
        let Some(program) = std::env::var_os("KATA_TEST_FAKE_SERVICES").map(PathBuf::from) else {
            crate::skip("KATA_TEST_FAKE_SERVICES is not set: no services for guests of tests were built");
            return None;
        };
        let components = format!(
            "schema_version = 1\n\
             [[process]]\n\
             id = \"fake\"\n\
             level = 1\n\
             path = \"bin/fake-guest-services\"\n\
             args = [\"{FAKE_SOCKET}\"]\n\
             wait_socket = \"{FAKE_SOCKET}\"\n\
             guest_services = [\"sealed-secrets\", \"secure-mount\"]\n"
        );
        Some(Self::new(host, &program, &components))
    }

    /// The table of a configuration that attaches it.
    pub fn table(&self) -> String {
        format!(
            "[[hypervisor.qemu.guest_extension_images]]\nname = \"tools\"\npath = \"{}\"\nverity_params = \"{}\"\n",
            self.file.display(),
            self.verity
        )
    }
}
