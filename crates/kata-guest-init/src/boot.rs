//! The whole boot, step by step.

use std::convert::Infallible;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use kata_evidence::{Hardware, HardwareError};
use rustix::mount::MountFlags;

use crate::cmdline::{Cmdline, CmdlineError, Name, NameError};
use crate::components::{self, ComponentsError, Directory};
use crate::disks::{self, DiskError, Image, Images};
use crate::dm::{DeviceMapper, DmError};
use crate::fault::{self, Level, say};
use crate::modules::{self, ModuleError};
use crate::root::{self, RootError, SYSROOT};
use crate::timeline::{self, Timeline};
use crate::units::LAUNCHER;
use crate::variables::Table;
use crate::verity::VerityError;
use crate::{launch, manifest};

/// Where extensions are mounted.
pub const EXTENSIONS: &str = "/run/kata-extensions";
const SERVICES: &str = "usr/lib/guest-services";
const SYSTEMD: &str = "/usr/lib/systemd/systemd";
const UNIT: &str = "kata-containers.target";
/// Disks are there from the start; their drivers may take their time on an emulated machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why the guest is not started.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Mounting, or leaving the initramfs.
    #[error(transparent)]
    Root(#[from] RootError),
    /// Nobody knows which hardware there is.
    #[error(transparent)]
    Hardware(#[from] HardwareError),
    /// The initramfs's modules.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// What the command line says of images.
    #[error("the kernel command line")]
    Cmdline(#[from] CmdlineError),
    /// The disks of the images.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The kernel's device-mapper.
    #[error(transparent)]
    DeviceMapper(#[from] DmError),
    /// A file that every guest has.
    #[error("reading {path:?}")]
    Read {
        /// The file.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// An image that is not the one that it should be.
    #[error("the image {serial:?} on disk {disk} is not the one that the command line vouches for")]
    Image {
        /// Its serial number.
        serial: String,
        /// The disk.
        disk: String,
        #[source]
        /// Why.
        source: VerityError,
    },
    /// An extension, or a service of the root's.
    #[error("services of {owner}")]
    Components {
        /// Whose.
        owner: String,
        #[source]
        /// Why.
        source: ComponentsError,
    },
    /// Writing the units.
    #[error("writing the units of services")]
    Install(#[source] ComponentsError),
    /// A directory of the root's services that cannot be called so.
    #[error("/{SERVICES}")]
    Name(#[from] NameError),
    /// The table of variables that this program was built with.
    #[error("the table of variables that this program was built with")]
    Table(#[from] toml::de::Error),
    /// systemd cannot be executed.
    #[error("executing {SYSTEMD}: does the image have it?")]
    Execute(#[source] io::Error),
}

/// The program. As PID 1 it does not return: systemd is PID 1 then, or the machine has ended.
#[must_use]
pub fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        return launch::main(std::env::args_os().skip(1));
    }
    std::panic::set_hook(Box::new(|panic| {
        say(Level::Critical, &panic.to_string());
        fault::end_machine();
    }));
    match boot() {
        Err(error) => fault::end(&error),
    }
}

fn boot() -> Result<Infallible, BootError> {
    let mut timeline = Timeline::default();
    // Its line is for the kernel's log, which is there when it is done.
    timeline.step("mounts", root::mount_kernel)?;
    // The descriptors of before belong to a console that the image may not even have had.
    root::reopen_console();
    let path = Path::new("/proc/cmdline");
    let text =
        std::fs::read_to_string(path).map_err(|source| BootError::Read { path: path.into(), source })?;
    let cmdline = Cmdline::parse(&text)?;
    // This needs /proc and /sys, and no module: what it looks for is the kernel's own.
    let hardware = Hardware::of(Path::new("/"))?;
    timeline.step("modules", || modules::load_all(Path::new(modules::LIST), hardware))?;
    root::mount_configfs()?;
    let images = timeline.step("disks", || disks::wait(Path::new(disks::SYS_BLOCK), &cmdline, PATIENCE))?;
    let mapper = DeviceMapper::open()?;
    timeline
        .step("root", || mount_verified(&mapper, &images.root, Path::new(SYSROOT), MountFlags::empty()))?;
    timeline.step("extensions", || mount_extensions(&mapper, &images))?;
    timeline.step("services", || make_services(&images))?;
    timeline.step("writable layers", || make_writable(Path::new(SYSROOT)))?;
    timeline.step("switch root", || root::switch(Path::new(SYSROOT)))?;
    if let Err(error) = timeline.write(Path::new(timeline::FILE)) {
        say(Level::Info, &format!("writing {}: {error}", timeline::FILE));
    }
    let mut systemd = Command::new(SYSTEMD);
    if !cmdline.names_unit {
        systemd.arg(format!("--unit={UNIT}"));
    }
    // What the kernel could not read of its command line is in the environment, and not for services.
    Err(BootError::Execute(systemd.env_clear().exec()))
}

fn make_writable(root: &Path) -> Result<(), RootError> {
    ["etc", "var"].iter().try_for_each(|name| root::make_writable(root, name))?;
    root::mount_tmp(root)
}

/// Mounts an image that the kernel verifies as it is read. Nothing of it was used before.
fn mount_verified(
    mapper: &DeviceMapper,
    Image { disk, params }: &Image,
    point: &Path,
    flags: MountFlags,
) -> Result<(), BootError> {
    let path = Path::new("/dev").join(&disk.name);
    let file = File::open(&path).map_err(|source| BootError::Read { path, source })?;
    params.check(&file, disk.bytes).map_err(|source| BootError::Image {
        serial: disk.serial.clone(),
        disk: disk.name.clone(),
        source,
    })?;
    let name = format!("kata-{}", disk.serial);
    let device = mapper.create(&name, params.sectors(), "verity", &params.table(&disk.number))?;
    let (serial, node) = (&disk.serial, device.path());
    say(
        Level::Info,
        &format!("image {serial} on {} is {}: {}", disk.name, node.display(), params.root_hash()),
    );
    Ok(root::mount_image(&node, point, flags)?)
}

fn mount_extensions(mapper: &DeviceMapper, images: &Images) -> Result<(), BootError> {
    for (name, image) in &images.extensions {
        let point = Path::new(EXTENSIONS).join(name.to_string());
        mount_verified(mapper, image, &point, MountFlags::NOSUID)?;
    }
    Ok(())
}

/// Units for all that the root and its extensions bring. All are understood before the first is written.
fn make_services(images: &Images) -> Result<(), BootError> {
    let table = Table::built_in()?;
    let attached: Vec<String> = images.extensions.iter().map(|(name, _)| name.to_string()).collect();
    let mut directories = Vec::new();
    let services = Path::new(SYSROOT).join(SERVICES);
    for name in root::directories(&services)? {
        let name: Name = name.parse()?;
        directories.push(Directory {
            owner: format!("image-{name}"),
            here: services.join(name.to_string()),
            root: format!("/{SERVICES}/{name}"),
            manifest: "components.toml",
        });
    }
    directories.extend(attached.iter().map(|name| Directory {
        owner: format!("extension-{name}"),
        here: Path::new(EXTENSIONS).join(name),
        root: format!("{EXTENSIONS}/{name}"),
        manifest: manifest::PATH,
    }));
    let services = directories.iter().map(|directory| {
        let owner = directory.owner.clone();
        directory.services(&table, &attached).map_err(|source| BootError::Components { owner, source })
    });
    let services = services.collect::<Result<Vec<_>, _>>()?;
    let units =
        components::install(Path::new("/run"), &services, table.links()).map_err(BootError::Install)?;
    if units > 0 {
        root::keep_program(Path::new(LAUNCHER))?;
    }
    Ok(())
}
