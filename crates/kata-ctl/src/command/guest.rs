//! `iptables`, `policy set`, `volume`: what the pod's management socket carries to its guest.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use kata_config::direct_volume::{Entry, MountInfo};
use serde::{Deserialize, Serialize};

use super::{Outcome, named};
use crate::cli::{IptablesCommand, VolumeCommand};
use crate::failure::Failure;
use crate::pod::management::ask;
use crate::table;

/// A little more than the owner gives the agent.
const BOUND: Duration = Duration::from_secs(25);

/// `iptables`
pub async fn iptables(command: &IptablesCommand) -> Outcome {
    let path = |v6: bool| if v6 { "/ip6tables" } else { "/iptables" };
    let answer = match command {
        IptablesCommand::Get(args) => call(&args.name, ("GET", path(args.v6)), Vec::new()).await?,
        IptablesCommand::Set(args) => call(&args.name, ("PUT", path(args.v6)), content(&args.file)?).await?,
    };
    std::io::stdout().write_all(&answer)?;
    Ok(0)
}

/// `policy set`
pub async fn set_policy(name: &str, file: &Path) -> Outcome {
    call(name, ("PUT", "/policy"), content(file)?).await?;
    Ok(0)
}

/// `volume`
pub async fn volume(command: &VolumeCommand) -> Outcome {
    match command {
        VolumeCommand::Add(args) => {
            let info: MountInfo = serde_json::from_str(&args.info)
                .map_err(|error| Failure::text(format!("what is to be plugged in is not told: {error}")))?;
            let written = entry(&args.path)?.write(&info);
            written.map_err(|error| Failure::text(format!("cannot add {}: {error}", args.path.display())))?;
        }
        VolumeCommand::Remove(args) => {
            let removed = entry(&args.path)?.remove();
            removed
                .map_err(|error| Failure::text(format!("cannot remove {}: {error}", args.path.display())))?;
        }
        VolumeCommand::Stats(args) => {
            let query =
                form_urlencoded::Serializer::new(String::new()).append_pair("path", &args.path).finish();
            let target = format!("/direct-volume/stats?{query}");
            let answer = call(&args.name, ("POST", &target), Vec::new()).await?;
            let stats: Stats = serde_json::from_slice(&answer)?;
            if args.json {
                println!("{:#}", serde_json::to_value(&stats.usage)?);
            } else {
                print!("{}", as_table(&stats.usage));
            }
        }
        VolumeCommand::Resize(args) => {
            let request = serde_json::json!({ "volume_guest_path": args.path, "size": args.size });
            call(&args.name, ("POST", "/direct-volume/resize"), request.to_string().into_bytes()).await?;
        }
    }
    Ok(0)
}

/// Paths are compared as pods are given them: absolute, and otherwise as they are.
fn entry(path: &Path) -> Result<Entry, Failure> {
    if !path.is_absolute() {
        return Err(Failure::text(format!("{} is not an absolute path", path.display())));
    }
    Entry::of(path).map_err(|error| Failure::text(format!("{}: {error}", path.display())))
}

async fn call(name: &str, request: (&str, &str), body: Vec<u8>) -> Result<Vec<u8>, Failure> {
    let pod = named(name)?;
    Ok(ask(&pod.run_dir, request, body, BOUND).await?.into())
}

/// What is in a file, or comes from standard input for `-`.
pub(super) fn content(file: &Path) -> Result<Vec<u8>, Failure> {
    let mut text = Vec::new();
    let read = if file == Path::new("-") {
        std::io::stdin().read_to_end(&mut text).map(drop)
    } else {
        std::fs::read(file).map(|read| text = read)
    };
    read.map(|()| text).map_err(|error| Failure::text(format!("cannot read {}: {error}", file.display())))
}

#[derive(Debug, Deserialize)]
struct Stats {
    usage: Vec<Usage>,
}

/// Space or files of a volume. `unit` is 1 for bytes and 2 for inodes, as in CSI.
#[derive(Debug, Serialize, Deserialize)]
struct Usage {
    unit: i32,
    total: u64,
    used: u64,
    available: u64,
}

fn as_table(usage: &[Usage]) -> String {
    let header = ["", "TOTAL", "USED", "AVAILABLE"].map(str::to_owned);
    let line = |usage: &Usage| {
        let unit = match usage.unit {
            1 => "bytes",
            2 => "inodes",
            _ => "unknown",
        };
        let numbers = [usage.total, usage.used, usage.available].map(|number| number.to_string());
        let [total, used, available] = numbers;
        [unit.to_owned(), total, used, available]
    };
    let lines: Vec<[String; 4]> = std::iter::once(header).chain(usage.iter().map(line)).collect();
    table::columns(&lines)
}
