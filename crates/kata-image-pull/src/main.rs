//! Pulls container images inside of the guest, for the agent: the image pull service of docs/guest-services.md.
//!
//! ```text
//!   PullImage(name, bundle)
//!     └▶ for each mirror, then the registry itself:
//!          manifest, configuration ─▶ signature policy ─▶ layers, verified and unpacked once for the whole pod
//!     └▶ overlay mount at <bundle>/rootfs, <bundle>/config.json ─▶ digest of the manifest
//! ```
//!
//! The registry, whatever it says, is not trusted; the caller and the configuration are.

mod bundle;
mod config;
mod cosign;
mod mounts;
mod policy;
mod pull;
mod serve;
mod words;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use config::{Config, ConfigError};
use serve::ServeError;
use words::sentence;

/// What the guest's owner has bound to it, before what its image has.
const CONFIGS: [&str; 2] = ["/run/measured-cfg/image-pull.toml", "/etc/kata-image-pull.toml"];

/// Command line of `kata-image-pull`.
#[derive(Debug, Parser)]
#[command(version, about = "Pull container images inside of the guest, for the agent")]
struct Cli {
    /// Configuration (TOML) [default: /run/measured-cfg/image-pull.toml, or /etc/kata-image-pull.toml where that is not there].
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Socket to listen on, where none is handed over by systemd [default: /run/guest-services/image-pull.socket].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Read the configuration, and end.
    #[arg(long)]
    check: bool,
}

/// Why the service does not run.
#[derive(Debug, thiserror::Error)]
enum RunError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its socket, or the like.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Also for those that have no log yet.
            eprintln!("kata-image-pull: {}", sentence(&error));
            ExitCode::FAILURE
        }
    }
}

/// The first that is there. One that cannot be looked at is there: who asks for it hears why.
fn usual_config() -> PathBuf {
    let [bound, of_image] = CONFIGS.map(PathBuf::from);
    let absent = bound.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    if absent { of_image } else { bound }
}

fn run(cli: &Cli) -> Result<(), RunError> {
    let config = Config::load(&cli.config.clone().unwrap_or_else(usual_config))?;
    if cli.check {
        return Ok(());
    }
    // What libraries say at lower levels may hold names and words of registries that are no business of the log.
    let level = config.log_level;
    let filter = EnvFilter::new(format!("error,kata_image_pull={level},kata_oci={level}"));
    tracing_subscriber::fmt()
        .json()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
    Ok(serve::run(config, cli.socket.as_deref())?)
}
