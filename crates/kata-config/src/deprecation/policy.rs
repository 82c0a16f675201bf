//! The one place that decides what becomes of a use.

use thiserror::Error;

use super::{Deprecation, Stage, Surface};
use crate::text::keywords;

keywords! {
    /// `runtime.deprecated`: what becomes of a use of something deprecated. What is removed is refused whatever this says.
    Policy { Warn = "warn", Reject = "reject", Off = "off" }
}

/// What becomes of a use, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// Nobody need know.
    Pass,
    /// It works, and is told of.
    Warn,
    /// It is refused until its id is opted in.
    OffByDefault,
    /// It is refused.
    Refuse,
}

/// A use that is refused. One line with all that helps: id, reason, replacement, last release.
#[derive(Debug, Error)]
pub enum Refused {
    /// It is gone.
    #[error(
        "removed [{id} {title}]: {reason}. Instead, {replacement}. Last release with it: {last}. \
         More: kata-ctl deprecations show {id}",
        id = .0.id, title = .0.title, reason = .0.reason, replacement = .0.replacement, last = .0.last_release
    )]
    Removed(&'static Deprecation),
    /// It is there, and needs an opt-in by name.
    #[error(
        "off by default [{id} {title}]: {reason}. Instead, {replacement}. Until {release} it can be had with \
         runtime.deprecated_opt_in = [\"{id}\"]. More: kata-ctl deprecations show {id}",
        id = .0.id, title = .0.title, reason = .0.reason, replacement = .0.replacement,
        release = .0.remove_in.release
    )]
    OffByDefault(&'static Deprecation),
    /// It works, and the user wants to be as strict as the future.
    #[error(
        "deprecated, and the policy is to reject that [{id} {title}]: {reason}. Instead, {replacement}. It goes in \
         {release} ({date}). More: kata-ctl deprecations show {id}",
        id = .0.id, title = .0.title, reason = .0.reason, replacement = .0.replacement,
        release = .0.remove_in.release, date = .0.remove_in.date
    )]
    Rejected(&'static Deprecation),
}

impl Refused {
    /// What was refused.
    pub fn deprecation(&self) -> &'static Deprecation {
        match self {
            Self::Removed(item) | Self::OffByDefault(item) | Self::Rejected(item) => item,
        }
    }
}

/// The environment asks for a policy that there is not.
#[derive(Debug, Error)]
#[error("{variable}: {0}", variable = Policy::VARIABLE)]
pub struct BadPolicy(String);

impl Policy {
    /// The variable that wins over what configuration files say.
    pub const VARIABLE: &'static str = "KATA_DEPRECATED";

    /// What [`Policy::VARIABLE`] says, if it is set.
    ///
    /// # Errors
    /// It says something else than one of the words.
    pub fn of_environment() -> Result<Option<Self>, BadPolicy> {
        let text = std::env::var_os(Self::VARIABLE);
        text.map(|text| text.to_string_lossy().parse().map_err(BadPolicy)).transpose()
    }

    /// What becomes of a use. `opted_in` holds the ids that are wanted although they are off by default.
    pub fn verdict(self, item: &Deprecation, opted_in: &[String]) -> Verdict {
        let wanted = opted_in.iter().any(|id| *id == item.id);
        match (item.stage, self) {
            (Stage::Proposed | Stage::Cancelled, _) => Verdict::Pass,
            (Stage::Removed | Stage::Archived, _) => Verdict::Refuse,
            (Stage::Deprecated | Stage::OffByDefault, Self::Reject) => Verdict::Refuse,
            (Stage::OffByDefault, _) if !wanted => Verdict::OffByDefault,
            (Stage::Deprecated | Stage::OffByDefault, Self::Warn) => Verdict::Warn,
            (Stage::Deprecated | Stage::OffByDefault, Self::Off) => Verdict::Pass,
        }
    }

    /// Counts a use of `what`, and lets it pass or refuses it.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn admit(
        self,
        item: &'static Deprecation,
        surface: Surface,
        what: &str,
        opted_in: &[String],
    ) -> Result<(), Refused> {
        let verdict = self.verdict(item, opted_in);
        if verdict == Verdict::Warn {
            item.warn(surface, what);
            return Ok(());
        }
        item.count(surface);
        match (verdict, item.stage) {
            (Verdict::Pass | Verdict::Warn, _) => Ok(()),
            (Verdict::OffByDefault, _) => Err(Refused::OffByDefault(item)),
            (Verdict::Refuse, Stage::Deprecated | Stage::OffByDefault) => Err(Refused::Rejected(item)),
            (Verdict::Refuse, _) => Err(Refused::Removed(item)),
        }
    }
}
