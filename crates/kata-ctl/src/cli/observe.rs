//! The command line of verbs about metrics, starts, and what a pod's management socket does.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `metrics`
#[derive(Debug, Args)]
pub struct MetricsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the pod
    pub name: String,
}

/// `monitor`
#[derive(Debug, Args)]
#[command(
    after_help = "Paths: / (status page), /metrics[?filter_family=PREFIX], /sandboxes, /agent-url?sandbox=NAME, \
        /api/sandboxes (JSON).\nRoot alone can read what pods tell: run it as root."
)]
pub struct MonitorArgs {
    /// Where to listen
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8090")]
    pub listen: SocketAddr,
}

/// `analyze`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(
    override_usage = "kata-ctl analyze [OPTIONS] <POD|FILE|--last>\n       kata-ctl analyze compare [--json] A B"
)]
pub struct AnalyzeArgs {
    /// Compare two starts
    #[command(subcommand)]
    pub command: Option<AnalyzeCommand>,
    /// Print JSON, which can be saved and analysed later
    #[arg(long)]
    pub json: bool,
    /// Draw the start into this file; - is the standard output
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// The last start of this host, of whichever pod
    #[arg(long, conflicts_with = "pod")]
    pub last: bool,
    /// Name of a pod, running or not, or a file with a saved start
    #[arg(value_name = "POD|FILE", required_unless_present = "last")]
    pub pod: Option<String>,
}

/// `analyze …`
#[derive(Debug, Subcommand)]
pub enum AnalyzeCommand {
    /// Tell how two starts differ, stage by stage
    Compare(CompareArgs),
}

/// `analyze compare`
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The first: a pod, or a file with a saved start
    pub a: String,
    /// The second
    pub b: String,
}

/// `iptables`
#[derive(Debug, Subcommand)]
pub enum IptablesCommand {
    /// Print the rules, as iptables-save does
    Get(IptablesGetArgs),
    /// Replace the rules, as iptables-restore does
    Set(IptablesSetArgs),
}

/// `iptables get`
#[derive(Debug, Args)]
pub struct IptablesGetArgs {
    /// Those for IPv6
    #[arg(long)]
    pub v6: bool,
    /// Name of the pod
    pub name: String,
}

/// `iptables set`
#[derive(Debug, Args)]
pub struct IptablesSetArgs {
    /// Those for IPv6
    #[arg(long)]
    pub v6: bool,
    /// Name of the pod
    pub name: String,
    /// File with the rules; - is the standard input
    pub file: PathBuf,
}

/// `volume`
#[derive(Debug, Subcommand)]
pub enum VolumeCommand {
    /// Have pods plug in a device where they are given the path of a volume
    Add(VolumeAddArgs),
    /// Forget what was added
    Remove(VolumeRemoveArgs),
    /// Tell how full a volume is
    Stats(VolumeStatsArgs),
    /// Have the guest take note of a volume's new size
    Resize(VolumeResizeArgs),
}

/// `volume add`
#[derive(Debug, Args)]
#[command(after_help = "INFO is JSON, as CSI drivers write it:\n  \
        {\"volume-type\": \"directvol\", \"device\": \"/dev/sdf\", \"fstype\": \"ext4\", \
        \"options\": [\"noatime\"], \"metadata\": {\"fsGroup\": \"1000\"}}")]
pub struct VolumeAddArgs {
    /// The path that a pod is given
    pub path: PathBuf,
    /// What to plug in, and how to mount it
    pub info: String,
}

/// `volume remove`
#[derive(Debug, Args)]
pub struct VolumeRemoveArgs {
    /// The path that was added
    pub path: PathBuf,
}

/// `volume stats`
#[derive(Debug, Args)]
pub struct VolumeStatsArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Name of the pod
    pub name: String,
    /// Where the volume is in the guest, or the path that was added
    pub path: String,
}

/// `volume resize`
#[derive(Debug, Args)]
pub struct VolumeResizeArgs {
    /// Name of the pod
    pub name: String,
    /// Where the volume is in the guest, or the path that was added
    pub path: String,
    /// Its size
    #[arg(value_name = "BYTES")]
    pub size: u64,
}
