//! The command line of `config`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// `config`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Show settings and where they come from
    Show(ConfigShowArgs),
    /// Tell everything that is wrong with a configuration
    Validate(ConfigValidateArgs),
    /// Tell all about a setting or an annotation
    Explain(ConfigExplainArgs),
    /// Tell where two configurations differ in effect
    Diff(ConfigDiffArgs),
    /// Make a file for this version from one of upstream's
    Migrate(ConfigMigrateArgs),
}

/// Which configuration is meant.
#[derive(Clone, Debug, Args)]
pub struct ConfigSources {
    /// Configuration file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Change one setting of the configuration (repeatable)
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
}

/// `config show`
#[derive(Debug, Args)]
pub struct ConfigShowArgs {
    /// Show the settings that are nowhere written, too, and only what is acted on
    #[arg(long)]
    pub effective: bool,
    /// Show where each value comes from
    #[arg(long)]
    pub origin: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The configuration.
    #[command(flatten)]
    pub sources: ConfigSources,
}

/// `config validate`
#[derive(Debug, Args)]
#[command(after_help = "Exit code: 0 if a pod can be made with it, 1 if not.")]
pub struct ConfigValidateArgs {
    /// Name every setting that makes no difference, too
    #[arg(long)]
    pub notes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// The file [default: the one that pods are made with]
    pub file: Option<PathBuf>,
}

/// `config explain`
#[derive(Debug, Args)]
pub struct ConfigExplainArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// A key's path, its last part, or an annotation
    #[arg(value_name = "KEY|ANNOTATION")]
    pub name: String,
}

/// `config diff`
#[derive(Debug, Args)]
pub struct ConfigDiffArgs {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// A file to compare with the defaults, or with B [default: the one that pods are made with]
    #[arg(value_name = "A")]
    pub first: Option<PathBuf>,
    /// A file to compare A with
    #[arg(value_name = "B")]
    pub second: Option<PathBuf>,
}

/// `config migrate`
#[derive(Debug, Args)]
#[command(after_help = "What is not in the new file is told on standard error.\n\
    Exit code: 0 if pods are as before, 1 if the file asks for what this version does not do.")]
pub struct ConfigMigrateArgs {
    /// Where to write the new file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Print the account as JSON
    #[arg(long, requires = "output")]
    pub json: bool,
    /// Upstream's file
    #[arg(value_name = "UPSTREAM.toml")]
    pub file: PathBuf,
}
