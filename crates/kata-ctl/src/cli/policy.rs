//! The command line of verbs about what guests that do not trust their host are given: policies, initdata.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

/// `policy`
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Write a first policy for a pod
    Generate(PolicyGenerateArgs),
    /// Tell whether a policy allows requests
    Test(PolicyTestArgs),
    /// Tell which requests a policy serves, or why it denies one
    Explain(PolicyExplainArgs),
    /// Give the agent a policy
    Set(PolicySetArgs),
}

/// `policy generate`
#[derive(Debug, Args)]
#[command(
    override_usage = "kata-ctl policy generate [OPTIONS] FILE\n       kata-ctl policy generate [OPTIONS] --bundle DIR\n       \
        kata-ctl policy generate [OPTIONS] --run -- RUN-ARGUMENTS...",
    after_help = "FILE is a Kubernetes manifest with one pod, or one object that makes pods; - is the standard input.\n\
        Read what comes out: it allows what the pod asks for, and that may be more than you want."
)]
pub struct PolicyGenerateArgs {
    /// For the container of this OCI bundle
    #[arg(long, value_name = "DIR", conflicts_with = "words")]
    pub bundle: Option<PathBuf>,
    /// For what `kata-ctl run` would run with these arguments
    #[arg(long, conflicts_with = "bundle")]
    pub run: bool,
    /// Allow every command to be run in the containers, as with kubectl exec; otherwise only the pod's own probes and hooks
    #[arg(long)]
    pub allow_exec: bool,
    /// Do not let the host read what the containers write
    #[arg(long)]
    pub deny_logs: bool,
    /// Allow ways to the loopback of the guest, as kubectl port-forward needs them
    #[arg(long)]
    pub allow_forward: bool,
    /// Let root file systems come from the host instead of images that the guest pulls: then what runs is the host's word. So with
    /// --run, and with --bundle unless it names an image
    #[arg(long)]
    pub host_rootfs: bool,
    /// The manifest, or with --run the arguments
    #[arg(value_name = "FILE", required_unless_present = "bundle")]
    pub words: Vec<String>,
}

/// `policy test`
#[derive(Debug, Args)]
#[command(
    after_help = "A request is JSON: {\"request\": \"ExecProcessRequest\", \"input\": {…}, \"allowed\": false}. \
        Without \"allowed\"\nit shall be allowed. Those of a directory are asked in the order of their names, and the policy \
        remembers\nwhat it wants to. Exit code: 1 where an answer is another one."
)]
pub struct PolicyTestArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// File with the policy
    pub policy: PathBuf,
    /// Files with requests, or directories of them
    #[arg(required = true, value_name = "FILE|DIR")]
    pub requests: Vec<PathBuf>,
}

/// `policy explain`
#[derive(Debug, Args)]
pub struct PolicyExplainArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// File with the policy
    pub policy: PathBuf,
    /// File with a request, as of `policy test`
    pub request: Option<PathBuf>,
}

/// `policy set`
#[derive(Debug, Args)]
pub struct PolicySetArgs {
    /// Name of the pod
    pub name: String,
    /// File with the policy; - is the standard input
    pub file: PathBuf,
}

/// `initdata`
#[derive(Debug, Subcommand)]
pub enum InitdataCommand {
    /// Make the value of the annotation from files
    Create(InitdataCreateArgs),
    /// Tell what is in the value of an annotation
    Show(InitdataShowArgs),
}

/// `initdata create`
#[derive(Debug, Args)]
pub struct InitdataCreateArgs {
    /// Take this file in; the name before it is the guest's, else the file's own (repeatable)
    #[arg(short, long, required = true, value_name = "[NAME=]FILE")]
    pub file: Vec<String>,
    /// What the digest is made with: sha256, sha384 or sha512
    #[arg(long, value_name = "NAME", default_value = "sha384", value_parser = ["sha256", "sha384", "sha512"], hide_possible_values = true)]
    pub algorithm: String,
    /// Print the document instead
    #[arg(long, conflicts_with = "json")]
    pub toml: bool,
    /// Print JSON: the annotation, the digest, and what hardware is given of it
    #[arg(long)]
    pub json: bool,
}

/// `initdata show`
#[derive(Debug, Args)]
pub struct InitdataShowArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// Print what is in this file of it
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    pub file: Option<String>,
    /// File with the annotation's value or with the document; - is the standard input
    pub source: PathBuf,
}

/// What measures a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Measurer {
    /// AMD's SEV-SNP.
    Snp,
    /// Intel's TDX.
    Tdx,
}

/// `measure`
#[derive(Debug, Args)]
#[command(
    after_help = "The launch digest of SEV-SNP or MRTD of TDX, for a verifier to compare with. What is not given is the \
        configuration's, as pods get it.\nMRTD is of the firmware alone. What that boots it measures itself, into RTMRs, and its event \
        log says how."
)]
pub struct MeasureArgs {
    /// Print JSON, with what was measured
    #[arg(long)]
    pub json: bool,
    /// What measures: snp or tdx [default: the configuration's, else snp]
    #[arg(long, value_name = "NAME", hide_possible_values = true)]
    pub tee: Option<Measurer>,
    /// Firmware: OVMF that is built for it
    #[arg(long, value_name = "FILE")]
    pub firmware: Option<PathBuf>,
    /// Guest kernel, a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's whole command line
    #[arg(long, value_name = "TEXT")]
    pub append: Option<String>,
    /// Processors [default: those of a pod without a limit]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=512))]
    pub vcpus: Option<u32>,
    /// Their model, as QEMU calls it [default: the one that guests get]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `evidence`
#[derive(Debug, Args)]
#[command(
    after_help = "Shows what the report says; nothing of it is verified here. Whoever verifies it gives the nonce, and takes the report \
        from --output\nor --json. Certificates that came with it are written to FILE.certs."
)]
pub struct EvidenceArgs {
    /// Name of the pod
    pub pod: String,
    /// What is to be in the report, at most 64 bytes in hexadecimal [default: made up]
    #[arg(long, value_name = "HEX", conflicts_with = "nonce_file")]
    pub nonce: Option<String>,
    /// The same as the bytes of a file; - is the standard input
    #[arg(long, value_name = "FILE")]
    pub nonce_file: Option<PathBuf>,
    /// Print JSON, with the whole report
    #[arg(long, conflicts_with = "output")]
    pub json: bool,
    /// Write the report to this file, as the hardware signed it
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}
