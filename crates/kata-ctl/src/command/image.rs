//! `image`: the guest image that pods boot: made, described, compared with its manifest.

use std::path::{Path, PathBuf};

use kata_config::{Artefacts, Config, Sources, paths};
use kata_image::build::{self, ImageBuilder, Services};
use kata_image::manifest::{Init, Manifest, ManifestError, Part};
use serde_json::{Value, json};

use super::Outcome;
use crate::cli::{BuildArgs, ExtensionArgs, Flavour, ImageArgs, ImageCommand, ServicesArgs};
use crate::failure::{Failure, chain};
use crate::{output, table};

/// Does what was asked.
pub fn run(command: ImageCommand) -> Outcome {
    match command {
        ImageCommand::Build(args) => build(args),
        ImageCommand::Extension(args) => extension(&args),
        ImageCommand::Inspect(args) => inspect(&args),
        ImageCommand::Verify(args) => verify(&args),
    }
}

fn build(args: BuildArgs) -> Outcome {
    let agent = match args.agent {
        Some(agent) => agent,
        None => Artefacts::program("kata-agent")?,
    };
    let output = match args.output {
        Some(output) => output,
        None => beside_this_program()?.join("guest-image"),
    };
    let cache = args.cache.unwrap_or_else(|| paths::state_dir().join("guest-kernels"));
    let services = match args.flavour {
        Flavour::Lean => None,
        Flavour::Services => Some(services(args.services)?),
    };
    let builder = ImageBuilder { agent, kernel: args.kernel, cache, output, services };
    builder.build(&mut |line| println!("{line}"))?;
    Ok(0)
}

fn services(args: ServicesArgs) -> Result<Services, Failure> {
    let program = |given: Option<PathBuf>, name| given.map_or_else(|| Artefacts::program(name), Ok);
    Ok(Services {
        guest_init: program(args.guest_init, "kata-guest-init")?,
        initdata: program(args.initdata, "kata-initdata")?,
        image_pull: args.image_pull.or_else(|| Artefacts::program("kata-image-pull").ok()),
        units: args.units.map_or_else(|| beside_this_program().map(|dir| dir.join("guest-services")), Ok)?,
        suite: args.suite,
        mirror: args.mirror,
    })
}

/// The parameters go to the standard output alone, for scripts.
fn extension(args: &ExtensionArgs) -> Outcome {
    let verity = build::extension(&args.name, &args.tree, &args.output)?;
    output::print(&format!("{verity}\n"))?;
    Ok(0)
}

fn inspect(args: &ImageArgs) -> Outcome {
    let manifest = Manifest::load(&directory(args)?)?;
    if args.json {
        let mut document = serde_json::to_value(&manifest)?;
        if let Value::Object(document) = &mut document {
            document.insert("directory".to_owned(), json!(manifest.dir()));
        }
        output::document(&document)?;
    } else {
        output::print(&as_text(&manifest))?;
    }
    Ok(0)
}

/// Reads every file and compares it with its digest; all that are wrong are told.
fn verify(args: &ImageArgs) -> Outcome {
    let manifest = Manifest::load(&directory(args)?)?;
    let checked: Vec<_> = manifest.parts().map(|part| (manifest.verify_part(&part), part)).collect();
    let sound = checked.iter().all(|(outcome, _)| outcome.is_ok());
    if args.json {
        let file = |(outcome, part): &(Result<(), ManifestError>, Part<'_>)| {
            let fault = outcome.as_ref().err().map(|error| chain(error));
            json!({ "part": part.name, "path": manifest.dir().join(part.path), "sha256": part.sha256, "fault": fault })
        };
        let files: Vec<Value> = checked.iter().map(file).collect();
        output::document(&json!({ "directory": manifest.dir(), "sound": sound, "files": files }))?;
    } else {
        let lines: Vec<[String; 3]> = checked
            .iter()
            .map(|(outcome, part)| {
                let verdict = outcome.as_ref().map_or_else(|error| chain(error), |()| part.sha256.to_owned());
                let word = if outcome.is_ok() { "ok" } else { "CHANGED" };
                [part.name.to_owned(), word.to_owned(), verdict]
            })
            .collect();
        output::print(&table::columns(&lines))?;
    }
    Ok(u8::from(!sound))
}

/// The image that is asked about, or the one that pods boot.
fn directory(args: &ImageArgs) -> Result<PathBuf, Failure> {
    if let Some(dir) = &args.dir {
        return Ok(dir.clone());
    }
    let config = Config::load(&Sources::default())?;
    Artefacts::guest_image(&config)?.ok_or_else(|| {
        Failure::text(
            "the configuration names a kernel and a root itself, and no image is used; give a directory",
        )
    })
}

fn as_text(manifest: &Manifest) -> String {
    let size = |path: &Path| {
        std::fs::metadata(manifest.dir().join(path))
            .map_or_else(|_| "?".to_owned(), |file| table::bytes(file.len()))
    };
    let word = |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
    let line = |name: &str, text: String| [name.to_owned(), text];
    let mut lines = vec![
        line("directory", manifest.dir().display().to_string()),
        line(
            "kernel",
            format!("{}, from {}", word(&manifest.kernel.release), word(&manifest.kernel.provider)),
        ),
        line("agent", word(&manifest.agent.version)),
        line(
            "process 1",
            match manifest.init {
                Init::Agent => "the agent",
                Init::Systemd => "systemd",
            }
            .to_owned(),
        ),
        line("announces itself", if manifest.agent.announces { "yes" } else { "no" }.to_owned()),
        line("capabilities", manifest.capabilities.iter().cloned().collect::<Vec<_>>().join(", ")),
        line("modules", manifest.modules.join(", ")),
    ];
    for Part { name, path, sha256 } in manifest.parts() {
        lines.push(line(name, format!("{} ({}), sha256 {sha256}", path.display(), size(path))));
    }
    if let Some(verity) = manifest.image.as_ref().and_then(|image| image.verity.as_ref()) {
        lines.push(line("image is verified", verity.to_string()));
    }
    table::columns(&lines)
}

fn beside_this_program() -> Result<PathBuf, Failure> {
    let program = std::env::current_exe()?.canonicalize()?;
    let dir =
        program.parent().ok_or_else(|| Failure::text("this program is in no directory; give --output"))?;
    Ok(dir.to_owned())
}
