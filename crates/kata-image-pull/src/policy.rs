//! Which images may be pulled: rules by name, the most specific one decides.

use std::path::{Path, PathBuf};

use kata_oci::registry::{Reference, Registry, Resolved};
use kata_oci::{Digest, ImageError};
use serde::Deserialize;

use crate::config::ConfigError;
use crate::cosign::{self, KeyError, PublicKey, SignatureError};

/// Why an image may not be pulled, or why rules cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// The rules say so.
    #[error("images of {scope} are not to be pulled, by the rules for signatures")]
    Rejected {
        /// What the rule is for.
        scope: String,
    },
    /// Nobody signed it, as far as the registry tells.
    #[error("{image} has no signature at {}", tags.join(" or "))]
    Unsigned {
        /// The image's name.
        image: String,
        /// Where one was looked for.
        tags: Vec<String>,
    },
    /// There are signatures, and none counts.
    #[error("no signature of {image} counts")]
    Signature {
        /// The image's name.
        image: String,
        /// What is wrong with the last one.
        #[source]
        source: SignatureError,
    },
    /// Signatures cannot be had.
    #[error("cannot look for signatures")]
    Fetch(#[source] Box<ImageError>),
    /// A rule that says too much or too little.
    #[error("the rule for {scope:?} {what}")]
    Rule {
        /// What the rule is for.
        scope: String,
        /// What is wrong.
        what: &'static str,
    },
    /// A key cannot be read.
    #[error(transparent)]
    KeyFile(#[from] ConfigError),
    /// A file is not a key.
    #[error("{} is not a key of this kind", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: KeyError,
    },
}

/// `[signatures]`, as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignatureSection {
    default: Default,
    #[serde(default)]
    rule: Vec<RuleSection>,
}

/// What is done with images that no rule names. Has to be said: both are wrong for somebody.
#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Default {
    Accept,
    Reject,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleSection {
    scope: String,
    policy: Kind,
    #[serde(default)]
    keys: Vec<PathBuf>,
    #[serde(default)]
    any_repository: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Accept,
    Reject,
    Cosign,
}

/// The rules.
#[derive(Debug)]
pub struct Policy {
    default: Demand,
    /// Longest scope first.
    rules: Vec<(String, Demand)>,
}

/// What an image has to be.
#[derive(Debug)]
enum Demand {
    Nothing,
    Impossible,
    Signed { keys: Vec<PublicKey>, any_repository: bool },
}

impl Policy {
    /// The rules of `section`; `read` reads a file.
    ///
    /// # Errors
    /// Rules that contradict themselves, keys that cannot be read.
    pub fn new(
        section: SignatureSection,
        read: impl Fn(&Path) -> Result<Vec<u8>, ConfigError>,
    ) -> Result<Self, PolicyError> {
        let default = match section.default {
            Default::Accept => Demand::Nothing,
            Default::Reject => Demand::Impossible,
        };
        let mut rules = Vec::new();
        for rule in section.rule {
            let scope = rule.scope.trim_end_matches('/').to_owned();
            if scope.is_empty() || rules.iter().any(|(other, _)| *other == scope) {
                return Err(PolicyError::Rule { scope, what: "needs a scope of its own" });
            }
            rules.push((scope, demand(rule, &read)?));
        }
        rules.sort_by_key(|(scope, _)| std::cmp::Reverse(scope.len()));
        Ok(Self { default, rules })
    }

    /// Whether the image that `registry` is for may be pulled, now that it is known what it is.
    ///
    /// # Errors
    /// [`PolicyError`]: it may not.
    pub async fn check(&self, registry: &Registry, resolved: &Resolved) -> Result<(), PolicyError> {
        let name = repository(registry.reference());
        let (scope, demand) = self.demand(&name);
        match demand {
            Demand::Nothing => Ok(()),
            Demand::Impossible => Err(PolicyError::Rejected { scope: scope.to_owned() }),
            Demand::Signed { keys, any_repository } => {
                let name = (!any_repository).then_some(name.as_str());
                let digests: Vec<&Digest> = resolved.index.iter().chain([&resolved.digest]).collect();
                cosign::check(registry, &digests, keys, name).await
            }
        }
    }

    /// The rule for a repository: the longest one whose scope is it, or a path that leads to it.
    fn demand<'a>(&'a self, repository: &'a str) -> (&'a str, &'a Demand) {
        let covers = |scope: &str| {
            repository.strip_prefix(scope).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let found = self.rules.iter().find(|(scope, _)| covers(scope));
        found.map_or((repository, &self.default), |(scope, demand)| (scope.as_str(), demand))
    }
}

fn demand(
    rule: RuleSection,
    read: impl Fn(&Path) -> Result<Vec<u8>, ConfigError>,
) -> Result<Demand, PolicyError> {
    let RuleSection { scope, policy, keys, any_repository } = rule;
    let signed = policy == Kind::Cosign;
    if signed == keys.is_empty() || (any_repository && !signed) {
        let what = match signed {
            true => "demands a signature and names no key",
            false => "demands no signature and says whose it would be",
        };
        return Err(PolicyError::Rule { scope, what });
    }
    let key = |path: &PathBuf| {
        let bytes = read(path)?;
        PublicKey::from_pem(&bytes).map_err(|source| PolicyError::Key { path: path.clone(), source })
    };
    Ok(match policy {
        Kind::Accept => Demand::Nothing,
        Kind::Reject => Demand::Impossible,
        Kind::Cosign => {
            Demand::Signed { keys: keys.iter().map(key).collect::<Result<_, _>>()?, any_repository }
        }
    })
}

/// `registry/repository`, of the image and not of a mirror.
fn repository(reference: &Reference) -> String {
    format!("{}/{}", reference.registry(), reference.repository())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Result<Policy, PolicyError> {
        Policy::new(toml::from_str(text).unwrap(), |_| Ok(Vec::new()))
    }

    #[test]
    fn the_most_specific_rule_decides_at_whole_names_only() {
        let policy = policy(
            "default = 'reject'\n\
             rule = [{scope = 'r.test/', policy = 'accept'}, {scope = 'r.test/team/bad', policy = 'reject'}]",
        )
        .unwrap();
        for (repository, accepted) in [
            ("r.test/x", true),
            ("r.test/team/good", true),
            ("r.test/team/bad", false),
            ("r.test/team/bad/worse", false),
            ("r.test/team/badger", true),
            ("r.test.evil.test/x", false),
            ("r.test:5000/x", false),
        ] {
            let (_, demand) = policy.demand(repository);
            assert_eq!(matches!(demand, Demand::Nothing), accepted, "{repository}");
        }
    }

    #[test]
    fn rules_that_contradict_themselves_are_refused() {
        for rule in [
            "{scope = 'r', policy = 'cosign'}",
            "{scope = 'r', policy = 'accept', keys = ['/k']}",
            "{scope = 'r', policy = 'reject', any_repository = true}",
            "{scope = '', policy = 'accept'}",
            "{scope = 'r', policy = 'accept'}, {scope = 'r/', policy = 'reject'}",
        ] {
            let refused = policy(&format!("default = 'accept'\nrule = [{rule}]"));
            assert!(matches!(refused, Err(PolicyError::Rule { .. })), "{rule}");
        }
    }

    #[test]
    fn a_file_that_is_no_key_is_named() {
        let refused = policy("default = 'accept'\nrule = [{scope = 'r', policy = 'cosign', keys = ['/k']}]");
        assert!(matches!(refused, Err(PolicyError::Key { path, .. }) if path == Path::new("/k")));
    }
}
