//! `measure`: what hardware will report of a confidential machine.

use std::path::{Path, PathBuf};

use kata_image::manifest::hex;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Outcome;
use super::check::ask_owner;
use crate::cli::{MeasureArgs, Measurer};
use crate::failure::Failure;
use crate::measure::{
    Firmware, FirmwareError, Hashes, MODELS, Machine, Model, is_bz_image, launch_digest, mrtd,
};
use crate::output;

/// Why it cannot be told.
#[derive(Debug, thiserror::Error)]
enum MeasureVerbError {
    #[error("there is no firmware: give --firmware, or set hypervisor.qemu.firmware")]
    NoFirmware,
    #[error("pods get all processors of their host (hypervisor.qemu.default_vcpus): give --vcpus")]
    NoNumber,
    #[error("there is no processor {name:?} with SEV-SNP; there are {all}")]
    Cpu { name: String, all: String },
    #[error("MRTD of TDX is of the firmware alone: {0} is not in it")]
    NotInMrtd(&'static str),
    #[error("the firmware {} cannot be measured", .path.display())]
    Firmware {
        path: PathBuf,
        #[source]
        source: FirmwareError,
    },
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

impl Configured {
    fn measurer(&self) -> Measurer {
        if self.tee.as_deref() == Some("TDX") { Measurer::Tdx } else { Measurer::Snp }
    }
}

/// What SEV-SNP measures.
#[derive(Debug)]
struct Wanted {
    firmware: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    command_line: String,
    vcpus: u32,
    cpu: Model,
}

/// Tells the digest, or all that went into it.
pub fn run(args: &MeasureArgs) -> Outcome {
    let configured = configured(args)?;
    let (digest, about) = match args.tee.unwrap_or_else(|| configured.measurer()) {
        Measurer::Snp => of_snp(&wanted(args, configured)?)?,
        Measurer::Tdx => of_tdx(&firmware_alone(args, configured)?)?,
    };
    match args.json {
        true => output::document(&about)?,
        false => output::print(&format!("{digest}\n"))?,
    }
    Ok(0)
}

/// With all of it given, the configuration is not asked, unless it is to say what measures.
fn configured(args: &MeasureArgs) -> Result<Configured, Failure> {
    let rest = args.tee == Some(Measurer::Tdx) || args.kernel.is_some() && args.append.is_some();
    let tee = args.tee.is_some() || args.config.is_none();
    match args.firmware.is_some() && rest && tee {
        true => Ok(Configured { vcpus: Some(1), ..Configured::default() }),
        false => Ok(serde_json::from_value(ask_owner(&["measured"], args.config.as_deref(), &args.set)?)?),
    }
}

/// The launch digest, and a document with what was measured.
fn of_snp(wanted: &Wanted) -> Result<(String, Value), Failure> {
    let kernel = read(&wanted.kernel)?;
    if !is_bz_image(&kernel) {
        return Err(MeasureVerbError::Kernel(wanted.kernel.clone()).into());
    }
    let initrd = wanted.initrd.as_deref().map(read).transpose()?.unwrap_or_default();
    let firmware = read(&wanted.firmware)?;
    let about_firmware = file(&wanted.firmware, &firmware);
    let machine = Machine {
        firmware: Firmware::parse(firmware).map_err(unmeasured(&wanted.firmware))?,
        hashes: Hashes::of(&kernel, &initrd, &wanted.command_line),
        vcpus: wanted.vcpus,
        signature: wanted.cpu.signature(),
    };
    let digest = hex(&launch_digest(&machine)?);
    let about = json!({
        "tee": "SEV-SNP",
        "launch_digest": digest,
        "firmware": about_firmware,
        "kernel": file(&wanted.kernel, &kernel),
        "initrd": wanted.initrd.as_deref().map(|path| file(path, &initrd)),
        "command_line": wanted.command_line,
        "vcpus": wanted.vcpus,
        "cpu": wanted.cpu.name,
    });
    Ok((digest, about))
}

/// MRTD, and a document with what was measured.
fn of_tdx(firmware: &Path) -> Result<(String, Value), Failure> {
    let bytes = read(firmware)?;
    let digest = hex(&mrtd(&bytes).map_err(unmeasured(firmware))?);
    let about = json!({ "tee": "TDX", "mrtd": digest, "firmware": file(firmware, &bytes) });
    Ok((digest, about))
}

fn unmeasured(path: &Path) -> impl FnOnce(FirmwareError) -> MeasureVerbError {
    let path = path.to_owned();
    |source| MeasureVerbError::Firmware { path, source }
}

fn file(path: &Path, bytes: &[u8]) -> Value {
    json!({ "path": path, "sha256": hex(&Sha256::digest(bytes)) })
}

/// What is given, else what the configuration has.
fn wanted(args: &MeasureArgs, configured: Configured) -> Result<Wanted, MeasureVerbError> {
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

/// The firmware, if nothing else is asked for that a verifier would take to be vouched for.
fn firmware_alone(args: &MeasureArgs, configured: Configured) -> Result<PathBuf, MeasureVerbError> {
    let given = [
        ("--kernel", args.kernel.is_some()),
        ("--initrd", args.initrd.is_some()),
        ("--append", args.append.is_some()),
        ("--vcpus", args.vcpus.is_some()),
        ("--cpu", args.cpu.is_some()),
    ];
    match given.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) => Err(MeasureVerbError::NotInMrtd(flag)),
        None => args.firmware.clone().or(configured.firmware).ok_or(MeasureVerbError::NoFirmware),
    }
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
            tee: None,
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

    fn found(args: &MeasureArgs) -> Result<Wanted, MeasureVerbError> {
        wanted(args, configured(args).map_err(|_| "the configuration was asked").unwrap())
    }

    #[test]
    fn what_is_given_is_measured_without_a_configuration() {
        let four = found(&MeasureArgs { vcpus: Some(4), initrd: Some("/i".into()), ..args() }).unwrap();
        assert_eq!((four.vcpus, four.cpu.name, four.command_line.as_str()), (4, "EPYC-v4", "quiet"));
        assert_eq!(four.initrd, Some("/i".into()));
        assert_eq!(found(&args()).unwrap().vcpus, 1);
    }

    #[test]
    fn processor_without_snp_and_kernel_that_is_no_bz_image_are_refused_by_name() {
        let error = found(&MeasureArgs { cpu: Some("host".to_owned()), ..args() }).unwrap_err();
        assert!(chain(&error).starts_with("there is no processor \"host\" with SEV-SNP; there are EPYC-v4,"));
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("vmlinux");
        std::fs::write(&kernel, "\x7fELF").unwrap();
        let error = run(&MeasureArgs { kernel: Some(kernel), ..args() }).unwrap_err();
        assert!(
            chain(&*error.error.unwrap())
                .ends_with("vmlinux is no bzImage, and firmware boots and measures nothing else")
        );
    }

    #[test]
    fn of_tdx_the_firmware_is_measured_alone() {
        let tdx = || MeasureArgs { tee: Some(Measurer::Tdx), kernel: None, append: None, ..args() };
        let firmware = |args: &MeasureArgs| firmware_alone(args, Configured::default());
        assert_eq!(firmware(&tdx()).unwrap(), Path::new("/none/firmware"));
        assert!(configured(&tdx()).is_ok(), "the configuration is not asked");
        let error = firmware(&MeasureArgs { append: Some("quiet".to_owned()), ..tdx() }).unwrap_err();
        assert_eq!(error.to_string(), "MRTD of TDX is of the firmware alone: --append is not in it");
        let error = firmware(&MeasureArgs { firmware: None, ..tdx() }).unwrap_err();
        assert!(error.to_string().starts_with("there is no firmware"));
        let dir = tempfile::tempdir().unwrap();
        let empty = dir.path().join("firmware");
        std::fs::write(&empty, "").unwrap();
        let error = run(&MeasureArgs { firmware: Some(empty), ..tdx() }).unwrap_err();
        let text = chain(&*error.error.unwrap());
        assert!(text.contains("/firmware cannot be measured") && text.contains("are no firmware"), "{text}");
        let of_configuration = Configured { tee: Some("TDX".to_owned()), ..Configured::default() };
        assert_eq!(of_configuration.measurer(), Measurer::Tdx);
    }
}
