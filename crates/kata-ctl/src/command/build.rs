//! `image build`

use std::path::PathBuf;

use kata_config::{Artefacts, paths};
use kata_image::build::ImageBuilder;

use super::Outcome;
use crate::cli::BuildArgs;
use crate::failure::Failure;

/// Builds the guest image.
pub fn run(args: BuildArgs) -> Outcome {
    let agent = match args.agent {
        Some(agent) => agent,
        None => Artefacts::program("kata-agent")?,
    };
    let output = match args.output {
        Some(output) => output,
        None => beside_this_program()?.join("guest-image"),
    };
    let cache = args.cache.unwrap_or_else(|| paths::state_dir().join("guest-kernels"));
    let builder = ImageBuilder { agent, kernel: args.kernel, cache, output };
    builder.build(&mut |line| println!("{line}"))?;
    Ok(0)
}

fn beside_this_program() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe()?.canonicalize()?;
    let dir =
        program.parent().ok_or_else(|| Failure::text("this program is in no directory; give --output"))?;
    Ok(dir.to_owned())
}
