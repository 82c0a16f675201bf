//! `measure`: what hardware will report of a confidential machine.

use std::path::{Path, PathBuf};

use kata_image::manifest::hex;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Outcome;
use super::check::ask_owner;
use crate::cli::MeasureArgs;
use crate::measure::{Firmware, Hashes, MODELS, Machine, Model, is_bz_image, launch_digest};
use crate::output;

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
enum MeasureVerbError {
    #[error(
        "the configuration asks for TDX, and its measurements (MRTD, RTMRs) are not computed by this version; compute them with the \
         tools that come with the firmware"
    )]
    Tdx,
    #[error("there is no firmware: give --firmware, or set hypervisor.qemu.firmware")]
    NoFirmware,
    #[error("pods get all processors of their host (hypervisor.qemu.default_vcpus): give --vcpus")]
    NoNumber,
    #[error("there is no processor {name:?} with SEV-SNP; there are {all}")]
    Cpu { name: String, all: String },
    #[error("cannot read {}", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is no bzImage, and firmware boots and measures nothing else", .0.display())]
    Kernel(PathBuf),
}

/// What the owner's program says of the configuration.
#[derive(Debug, Default, Deserialize)]
struct Configured {
    tee: Option<String>,
    firmware: Option<PathBuf>,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
    vcpus: Option<u32>,
    cpu: Option<String>,
}

/// What is measured.
#[derive(Debug)]
struct Wanted {
    firmware: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
    vcpus: u32,
    cpu: Model,
}

/// Tells the launch digest.
pub fn run(args: &MeasureArgs) -> Outcome {
    let wanted = wanted(args)?;
    let kernel = read(&wanted.kernel)?;
    if !is_bz_image(&kernel) {
        return Err(MeasureVerbError::Kernel(wanted.kernel).into());
    }
    let initrd = wanted.initrd.as_deref().map(read).transpose()?.unwrap_or_default();
    let machine = Machine {
        firmware: Firmware::load(&wanted.firmware)?,
        hashes: Hashes::of(&kernel, &initrd, &wanted.command_line),
        vcpus: wanted.vcpus,
        signature: wanted.cpu.signature(),
    };
    let digest = hex(&launch_digest(&machine)?);
    if !args.json {
        output::print(&format!("{digest}\n"))?;
        return Ok(0);
    }
    let file = |path: &Path, bytes: &[u8]| json!({ "path": path, "sha256": hex(&Sha256::digest(bytes)) });
    output::document(&json!({
        "tee": "SEV-SNP",
        "launch_digest": digest,
        "firmware": file(&wanted.firmware, &read(&wanted.firmware)?),
        "kernel": file(&wanted.kernel, &kernel),
        "initrd": wanted.initrd.as_deref().map(|path| file(path, &initrd)),
        "command_line": wanted.command_line,
        "vcpus": wanted.vcpus,
        "cpu": wanted.cpu.name,
    }))?;
    Ok(0)
}

/// What is given, else what the configuration has. With all of it given, the configuration is not asked.
fn wanted(args: &MeasureArgs) -> Result<Wanted, crate::failure::Failure> {
    let given = args.firmware.is_some() && args.kernel.is_some() && args.append.is_some();
    let configured: Configured = match given {
        true => Configured { vcpus: Some(1), ..Configured::default() },
        false => serde_json::from_value(ask_owner(&["measured"], args.config.as_deref(), &args.set)?)?,
    };
    if configured.tee.as_deref() == Some("TDX") {
        return Err(MeasureVerbError::Tdx.into());
    }
    // Whoever names another kernel has to name its initrd as well, if it has one.
    let initrd = if args.kernel.is_some() { None } else { configured.initrd };
    let name = args.cpu.clone().or(configured.cpu);
    let cpu = match &name {
        None => MODELS.first().copied(),
        Some(name) => Model::named(name),
    };
    Ok(Wanted {
        firmware: args.firmware.clone().or(configured.firmware).ok_or(MeasureVerbError::NoFirmware)?,
        kernel: args.kernel.clone().unwrap_or(configured.kernel),
        initrd: args.initrd.clone().or(initrd),
        command_line: args.append.clone().unwrap_or(configured.command_line),
        vcpus: args.vcpus.or(configured.vcpus).ok_or(MeasureVerbError::NoNumber)?,
        cpu: cpu.ok_or_else(|| MeasureVerbError::Cpu {
            name: name.unwrap_or_default(),
            all: MODELS.map(|model| model.name).join(", "),
        })?,
    })
}

fn read(path: &Path) -> Result<Vec<u8>, MeasureVerbError> {
    std::fs::read(path).map_err(|source| MeasureVerbError::Read { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::chain;

    fn args() -> MeasureArgs {
        MeasureArgs {
            json: false,
            firmware: Some("/none/firmware".into()),
            kernel: Some("/none/kernel".into()),
            initrd: None,
            append: Some("quiet".to_owned()),
            vcpus: None,
            cpu: None,
            config: None,
            set: Vec::new(),
        }
    }

    #[test]
    fn what_is_given_is_measured_without_a_configuration() {
        let found = wanted(&MeasureArgs { vcpus: Some(4), initrd: Some("/i".into()), ..args() }).unwrap();
        assert_eq!((found.vcpus, found.cpu.name, found.command_line.as_str()), (4, "EPYC-v4", "quiet"));
        assert_eq!(found.initrd, Some("/i".into()));
        assert_eq!(wanted(&args()).unwrap().vcpus, 1);
    }

    #[test]
    fn processor_without_snp_and_kernel_that_is_no_bz_image_are_refused_by_name() {
        let error = wanted(&MeasureArgs { cpu: Some("host".to_owned()), ..args() }).unwrap_err();
        assert!(
            chain(&*error.error.unwrap())
                .starts_with("there is no processor \"host\" with SEV-SNP; there are EPYC-v4,")
        );
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        std::fs::write(&kernel, "\x7fELF").unwrap();
        let error = run(&MeasureArgs { kernel: Some(kernel), ..args() }).unwrap_err();
        assert!(
            chain(&*error.error.unwrap())
                .ends_with("vmlinux is no bzImage, and firmware boots and measures nothing else")
        );
    }
}
