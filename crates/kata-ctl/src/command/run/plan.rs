//! What the command line of `run` amounts to. Everything that can be wrong with it is found before anything is started.

use std::path::PathBuf;
#[cfg(feature = "registry")]
use std::sync::Arc;

use kata_config::deprecation::Policy;
use kata_config::paths;
use kata_oci::{Credentials, Hints, ImageSource, Interrupt, PlainHttp, RegistryOptions, Store};

use super::root::Root;
use crate::bundle::{Request, Volume, absolute, extend_env};
use crate::cli::RunArgs;
use crate::command;
use crate::failure::Failure;
use crate::pod::{OwnerOptions, PodDir, is_terminal, random_name, terminal_size};
#[cfg(feature = "registry")]
use crate::progress::Bars;

/// What to do about a registry that refuses.
const HINTS: Hints = Hints {
    unauthorized: " (log in first, e.g. with `skopeo login`, or check the name: registries answer the same for images that are not there)",
    no_tls: " (a registry without TLS needs --insecure)",
};

/// What is to be run, and how.
pub struct Plan {
    pub pod: PodDir,
    pub owner: OwnerOptions,
    pub request: Request,
    pub interactive: bool,
    pub detach: bool,
    pub timing: bool,
    from: From,
    insecure: bool,
    #[cfg(feature = "registry")]
    progress: bool,
}

/// Where the root file system comes from.
enum From {
    Image(ImageSource),
    Dir(PathBuf),
}

impl Plan {
    pub fn make(args: RunArgs) -> Result<Self, Failure> {
        if args.interactive && args.tty && !is_terminal() {
            return Err(Failure::text("-i with -t needs a terminal at the standard input"));
        }
        let name = args.name.clone().map_or_else(random_name, Ok)?;
        let pod = PodDir::of(&name)?;
        let owner = owner_options(&args);
        let (from, command) = split(&args)?;
        // Checked here, used when the bundle is written.
        extend_env(&mut Vec::new(), &args.env)?;
        if let Some(workdir) = &args.workdir {
            absolute(workdir)?;
        }
        let volumes = args.volume.iter().map(|text| Volume::parse(text)).collect::<Result<_, _>>()?;
        Ok(Self {
            pod,
            owner,
            request: Request {
                name,
                command,
                env: args.env,
                workdir: args.workdir,
                user: args.user,
                read_only: args.read_only,
                terminal: args.tty,
                size: if args.tty { terminal_size() } else { None },
                volumes,
            },
            interactive: args.interactive,
            detach: args.detach,
            timing: args.timing || std::env::var_os("KATA_TIMING").is_some_and(|value| value == "1"),
            from,
            insecure: args.insecure,
            #[cfg(feature = "registry")]
            progress: rustix::termios::isatty(rustix::stdio::stderr()),
        })
    }

    /// The root file system, once it is there.
    pub async fn root(&self, interrupt: &Interrupt) -> Result<Root, Failure> {
        match &self.from {
            From::Dir(dir) => Ok(Root::Dir(dir.clone())),
            From::Image(source) => {
                let store = Store::open(&paths::state_dir(), interrupt.clone())?;
                let image = kata_oci::fetch(source.clone(), store, self.registry()).await?;
                Ok(Root::image(image))
            }
        }
    }

    fn registry(&self) -> RegistryOptions {
        RegistryOptions {
            plain: if self.insecure { PlainHttp::Always } else { PlainHttp::Loopback },
            credentials: Credentials::OfTheUser,
            remember: true,
            hints: HINTS,
            #[cfg(feature = "registry")]
            progress: Some(Arc::new(Bars::new(self.progress))),
            ..RegistryOptions::new(concat!("kata-ctl/", env!("CARGO_PKG_VERSION")))
        }
    }
}

fn split(args: &RunArgs) -> Result<(From, Vec<String>), Failure> {
    if let Some(dir) = &args.rootfs {
        let dir = dir
            .canonicalize()
            .map_err(|error| Failure::text(format!("--rootfs {}: {error}", dir.display())))?;
        if !dir.is_dir() {
            return Err(Failure::text(format!("--rootfs {}: not a directory", dir.display())));
        }
        if args.words.is_empty() {
            return Err(Failure::text("a directory names no command: give one after the options"));
        }
        return Ok((From::Dir(dir), args.words.clone()));
    }
    match args.words.split_first() {
        Some((image, command)) => Ok((From::Image(image.parse()?), command.to_vec())),
        None => Err(Failure::text("give an image, or --rootfs and a command; see `kata-ctl run --help`")),
    }
}

/// Flags become overrides. The user's own come last, and so win.
fn owner_options(args: &RunArgs) -> OwnerOptions {
    let memory = args.memory.map(|memory| format!("hypervisor.qemu.default_memory={}", memory.0));
    let cpus = args.cpus.map(|cpus| format!("hypervisor.qemu.default_vcpus={}", cpus.0));
    let hypervisor = args.hypervisor.as_ref().map(|name| format!("runtime.hypervisor_name={name}"));
    let deprecated = args.deprecated.map(Policy::assignment);
    let flags = [memory, cpus, hypervisor, deprecated].into_iter().flatten();
    OwnerOptions {
        config: args.config.as_deref().map(command::absolute),
        overrides: flags.chain(args.set.iter().cloned()).collect(),
        rm: args.rm,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn plan(line: &str) -> Result<Plan, String> {
        let words = ["kata-ctl", "run"].into_iter().chain(line.split_whitespace());
        let Command::Run(args) = Cli::try_parse_from(words).unwrap().command else { panic!("not run") };
        Plan::make(args).map_err(|failure| crate::failure::chain(&*failure.error.unwrap()))
    }

    #[test]
    fn flags_about_the_machine_become_overrides_of_the_configuration() {
        let plan = plan("-m 1G --cpus 2 --hypervisor qemu --set a.b=c oci:x").unwrap();
        let expected = [
            "hypervisor.qemu.default_memory=1024",
            "hypervisor.qemu.default_vcpus=2",
            "runtime.hypervisor_name=qemu",
            "a.b=c",
        ];
        assert_eq!(plan.owner.overrides, expected);
    }

    #[test]
    fn a_configuration_file_is_found_from_another_directory_too() {
        assert!(plan("--config c.toml oci:x").unwrap().owner.config.unwrap().is_absolute());
    }

    #[test]
    fn mistakes_are_found_before_anything_is_started() {
        for (line, what) in [
            ("--name a/b oci:x", "not a pod's name"),
            ("", "give an image"),
            ("--rootfs /tmp", "names no command"),
            ("--rootfs /nonexistent true", "/nonexistent"),
            ("--rootfs /proc/version true", "not a directory"),
            ("-e =x oci:x", "NAME=VALUE"),
            ("-w tmp oci:x", "absolute"),
            ("-v /tmp oci:x", "SRC:DST"),
            ("dir:/x", "not supported"),
            ("-it oci:x", "terminal"),
        ] {
            let Err(error) = plan(line) else { panic!("{line} was taken") };
            assert!(error.contains(what), "{line}: {error}");
        }
    }
}
