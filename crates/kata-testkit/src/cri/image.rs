//! Images for tests: the one with busybox under other names, with another configuration.

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Writes an OCI layout to `to` that has the image of the layout `from`, changed by `change`, which gets what the
/// image's configuration has under `config`.
pub(super) fn derive(from: &Path, to: &Path, change: impl FnOnce(&mut Value)) {
    let blobs = to.join("blobs/sha256");
    std::fs::create_dir_all(&blobs).unwrap();
    let blob = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap().trim_start_matches("sha256:");
        from.join("blobs/sha256").join(digest)
    };
    let add = |content: &Value| {
        let bytes = serde_json::to_vec(content).unwrap();
        std::fs::write(blobs.join(digest(&bytes)), &bytes).unwrap();
        (format!("sha256:{}", digest(&bytes)), bytes.len())
    };
    let mut index = read(&from.join("index.json"));
    let mut manifest = read(&blob(&index["manifests"][0]));
    let mut config = read(&blob(&manifest["config"]));
    change(&mut config["config"]);
    for layer in manifest["layers"].as_array().unwrap() {
        let path = blob(layer);
        std::fs::copy(&path, blobs.join(path.file_name().unwrap())).unwrap();
    }
    let (digest, size) = add(&config);
    manifest["config"]["digest"] = json!(digest);
    manifest["config"]["size"] = json!(size);
    let (digest, size) = add(&manifest);
    index["manifests"][0]["digest"] = json!(digest);
    index["manifests"][0]["size"] = json!(size);
    std::fs::write(to.join("index.json"), index.to_string()).unwrap();
    std::fs::copy(from.join("oci-layout"), to.join("oci-layout")).unwrap();
}
