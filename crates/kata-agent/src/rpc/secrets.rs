//! Opens what is sealed for a container, before it is made.

use std::path::{Path, PathBuf};

use kata_api::agent::Storage;
use kata_api::guest::{CONTAINER_DIR, SHARE_DIR};
use oci_spec::runtime::Spec;

use super::agent::Agent;
use super::error::RpcError;
use crate::services::sealed::Secrets;

/// Opens the variables and files of `spec` that `secrets` says. Files come to a tmpfs of the container, which is added to `mounts`.
///
/// # Errors
/// What cannot be opened. `mounts` has what was made by then.
pub async fn open(
    agent: &Agent,
    id: &str,
    spec: &mut Spec,
    secrets: &Secrets,
    mounts: &mut Vec<PathBuf>,
) -> Result<(), RpcError> {
    if let Some(env) = spec.process_mut().as_mut().and_then(|process| process.env_mut().as_mut()) {
        secrets.open_env(env).await?;
    }
    let own = Path::new(CONTAINER_DIR).join(id);
    let found = secrets.find(spec, &[SHARE_DIR.into(), own.clone()]).await?;
    if found.is_empty() {
        return Ok(());
    }
    let dir = own.join("secrets");
    let storage = Storage {
        driver: "ephemeral".to_owned(),
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: ["nosuid", "nodev", "noexec", "mode=700", "size=64m"].map(str::to_owned).to_vec(),
        mount_point: dir.display().to_string(),
        ..Default::default()
    };
    mounts.extend(agent.storages.add(vec![storage]).await?);
    Ok(secrets.open_files(found, &dir, spec).await?)
}
