//! The command line of `deprecations`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use kata_config::deprecation::Stage;

/// `deprecations`
#[derive(Debug, Subcommand)]
pub enum DeprecationsCommand {
    /// List what is deprecated or removed
    List {
        /// Only what is in this stage, e.g. deprecated or removed
        #[arg(long, value_parser = stage)]
        stage: Option<Stage>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show everything about one of them
    Show {
        /// Its id, e.g. D0004
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Find uses in files and commands
    #[command(
        subcommand,
        after_help = "Exit code: 0 for none, 10 for uses that warn, 11 for uses that are off by default, 12 for uses that are \
            removed or, with --deprecated=reject, deprecated; the highest counts. 1 if it cannot be told."
    )]
    Check(UseIn),
}

/// `deprecations check`
#[derive(Debug, Subcommand)]
pub enum UseIn {
    /// In a configuration file and the config.d beside it
    Config(UseInFile),
    /// In values of the Helm chart (YAML)
    Values(UseInFile),
    /// In Kubernetes manifests (YAML): annotations, runtime classes, commands, kustomizations
    Manifest(UseInFile),
    /// In a command and its arguments
    CommandLine {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// The command
        #[arg(value_name = "WORD", trailing_var_arg = true, allow_hyphen_values = true, required = true)]
        words: Vec<String>,
    },
}

/// `deprecations check config`, `values`, `manifest`
#[derive(Debug, Args)]
pub struct UseInFile {
    /// The file; - is the standard input, but for config
    pub file: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

fn stage(word: &str) -> Result<Stage, String> {
    let words: Vec<&str> = Stage::ALL.iter().map(|stage| stage.as_str()).collect();
    let found = Stage::ALL.iter().find(|stage| stage.as_str() == word);
    found.copied().ok_or_else(|| format!("not one of {}", words.join(", ")))
}
