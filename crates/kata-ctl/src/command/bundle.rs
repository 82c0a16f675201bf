//! `bundle`: what a bug report needs, in one archive, without secrets.
//!
//! ```text
//!   env, check, versions, configuration ─┐
//!   host facts ──────────────────────────┼─▶ Archive ─▶ Redaction ─▶ tar ─▶ gzip     nothing gets in but through it
//!   pods: inspect, state, log, record,   │
//!         events, specifications ────────┘
//! ```
//!
//! The output of containers is not in it: it is their users', not the operator's.

mod redact;

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use flate2::write::GzEncoder;
use kata_config::{Config, Sources};
use serde::Serialize;
use serde_json::{Value, json};

use super::{Outcome, absolute, check, env, inspect, version};
use crate::cli::{BundleArgs, CheckArgs};
use crate::failure::{Failure, chain};
use crate::pod::{Client, PodDir};
use crate::table::timestamp;
use redact::Redaction;

/// Most of a file that is taken: of a longer one, its end.
const FILE_MAX: usize = 8 << 20;
/// Files of this host that tell what it is.
const HOST: [&str; 8] = [
    "/etc/os-release",
    "/proc/version",
    "/proc/cpuinfo",
    "/proc/meminfo",
    "/proc/modules",
    "/proc/filesystems",
    "/proc/cgroups",
    "/proc/self/mountinfo",
];

const README: &str = "What kata-ctl found on this host, for a bug report.\n\n\
    env.json, check.json    the host, and what kata-ctl check says of it\n\
    config/                 the configuration in use, and the files that it was read from\n\
    host/                   files of /proc and /etc that tell what this host is\n\
    pods/NAME/              state, log, leak record, events and container specifications of a pod\n\n\
    Left out: what containers have written. Replaced by [redacted]: values of variables, and what looks like a\n\
    password, token, key or credential. Look through it before you hand it on.\n";

/// Writes the archive.
pub async fn run(args: &BundleArgs) -> Outcome {
    let pods = match &args.pod {
        Some(name) => vec![PodDir::existing(name)?],
        None => PodDir::all()?,
    };
    let to_stdout = args.output.as_os_str() == "-";
    let out: Box<dyn Write> =
        if to_stdout { Box::new(io::stdout().lock()) } else { Box::new(create(&args.output)?) };
    let mut redaction = Redaction::default();
    for pod in &pods {
        redaction.learn(pod).await;
    }
    let mut archive = Archive::new(out, redaction)?;
    archive.text("README.txt", README)?;
    host(&mut archive, args)?;
    for pod in &pods {
        describe(&mut archive, pod).await?;
    }
    archive.finish()?;
    if !to_stdout {
        crate::output::print(&format!("{}\n", args.output.display()))?;
    }
    Ok(0)
}

/// For its owner's eyes alone, whatever the redaction has missed: a file that is there already may be somebody else's.
fn create(path: &Path) -> Result<std::fs::File, Failure> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    opened.map_err(|error| Failure::text(format!("cannot write {}: {error}", path.display())))
}

fn host(archive: &mut Archive, args: &BundleArgs) -> Result<(), Failure> {
    archive.json("env.json", &env::describe(args.config.as_deref()))?;
    let check = CheckArgs { config: args.config.clone(), ..CheckArgs::default() };
    archive.json("check.json", &check::Report::make(&check))?;
    let sources = Sources { file: args.config.as_deref().map(absolute), ..Sources::default() };
    match Config::load(&sources) {
        Ok(config) => {
            let text = toml::to_string(&config).unwrap_or_else(|error| format!("# {error}\n"));
            archive.text("config/effective.toml", &text)?;
            archive.json("versions.json", &version::parts(&config))?;
        }
        Err(errors) => archive.text("config/errors.txt", &errors.to_string())?,
    }
    for file in sources.base().into_iter().chain(env::drop_ins(&sources)) {
        archive.file(&format!("config/files{}", file.display()), &file)?;
    }
    for file in HOST {
        archive.file(&format!("host{file}"), Path::new(file))?;
    }
    Ok(())
}

async fn describe(archive: &mut Archive, pod: &PodDir) -> Result<(), Failure> {
    let place = |name: &str| format!("pods/{}/{name}", pod.name);
    match inspect::describe(pod).await {
        Ok(document) => archive.json(&place("inspect.json"), &document)?,
        Err(failure) => {
            let why = failure.error.map(|error| chain(&*error)).unwrap_or_default();
            archive.text(&place("inspect-error.txt"), &why)?;
        }
    }
    archive.file(&place("state.json"), &pod.run_dir.join("state.json"))?;
    archive.file(&place("owner.log"), &pod.owner_log())?;
    archive.file(&place("resources.jsonl"), &pod.leak_record())?;
    for (container, bundle) in bundles(pod).await {
        archive.file(&place(&format!("containers/{container}/config.json")), &bundle.join("config.json"))?;
    }
    if let Ok(client) = Client::connect(pod).await
        && let Ok(told) = client.events(0, Duration::ZERO).await
    {
        let event = |event: &kata_api::control::Event| {
            json!({ "at_ms": event.at_ms, "kind": event.kind, "container": event.container, "exec": event.exec,
                    "exit_code": event.exit_code, "fault": event.fault })
        };
        archive.json(&place("events.json"), &told.events.iter().map(event).collect::<Vec<Value>>())?;
    }
    Ok(())
}

/// The containers of a pod, with their bundles; of a pod without an owner, the one that this program has made.
async fn bundles(pod: &PodDir) -> Vec<(String, std::path::PathBuf)> {
    let mut found = Vec::new();
    if let Ok(client) = Client::connect(pod).await
        && let Ok(seen) = client.inspect().await
    {
        for container in seen.containers {
            if let Ok(bundle) = client.bundle(&container.id).await {
                found.push((container.id, bundle));
            }
        }
    }
    if found.is_empty() && pod.bundle().exists() {
        found.push((pod.name.clone(), pod.bundle()));
    }
    found
}

/// The archive; whatever gets in is redacted.
struct Archive {
    tar: tar::Builder<GzEncoder<Box<dyn Write>>>,
    redaction: Redaction,
    root: String,
    now: u64,
}

impl Archive {
    fn new(out: Box<dyn Write>, redaction: Redaction) -> Result<Self, Failure> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let root =
            format!("kata-bundle-{}", timestamp(now * 1000).replace([':', '-'], "").replace(".000", ""));
        let tar = tar::Builder::new(GzEncoder::new(out, flate2::Compression::default()));
        Ok(Self { tar, redaction, root, now })
    }

    fn json(&mut self, name: &str, document: &impl Serialize) -> Result<(), Failure> {
        let document = self.redaction.json(serde_json::to_value(document)?);
        self.bytes(name, format!("{document:#}\n").as_bytes())
    }

    fn text(&mut self, name: &str, text: &str) -> Result<(), Failure> {
        let text = self.redaction.text(text);
        self.bytes(name, text.as_bytes())
    }

    /// A file of this host, by what it is. One that is not there is left out; one that cannot be read says so.
    fn file(&mut self, name: &str, path: &Path) -> Result<(), Failure> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                return self.text(&format!("{name}.unreadable"), &format!("{}: {error}\n", path.display()));
            }
        };
        if path.extension().is_some_and(|extension| extension == "json")
            && let Ok(document) = serde_json::from_slice::<Value>(&bytes)
        {
            return self.json(name, &document);
        }
        let end = bytes.get(bytes.len().saturating_sub(FILE_MAX)..).unwrap_or_default();
        self.text(name, &String::from_utf8_lossy(end))
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.now);
        Ok(self.tar.append_data(&mut header, format!("{}/{name}", self.root), bytes)?)
    }

    fn finish(self) -> Result<(), Failure> {
        Ok(self.tar.into_inner()?.finish()?.flush()?)
    }
}
