//! Credentials for registries, from the files that `skopeo login`, `podman login` and `docker login` write
//! (containers-auth.json(5)).

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde::Deserialize;
use serde_json::error::Category;

use crate::Credentials;

/// A file of credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The file cannot be read.
    #[error("cannot read credentials from {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is not of the right shape. What is wrong with it is not kept: the parser quotes it, and it may be a password.
    #[error("{} is not a file of credentials: line {line}, column {column}: {kind}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where it is wrong.
        line: usize,
        /// Where in the line.
        column: usize,
        /// What kind of fault it is.
        kind: &'static str,
    },
    /// An entry is not `user:password` in base64.
    #[error("{}: the entry {entry:?} is not user:password in base64", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// Its key.
        entry: String,
    },
    /// The credentials are elsewhere.
    #[error("{}: the credentials for {entry} are kept by the helper {helper:?}, and helpers are not supported", path.display())]
    Helper {
        /// The file.
        path: PathBuf,
        /// The registry.
        entry: String,
        /// Name of the helper.
        helper: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AuthFile {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Entry {
    auth: Option<String>,
}

/// User name and password for `repository` of `registry`.
///
/// # Errors
/// A file that is there and cannot be used, or was named and is not there. That a registry is in no file is no error.
pub fn lookup(
    from: &Credentials,
    registry: &str,
    repository: &str,
) -> Result<Option<(String, String)>, AuthError> {
    match from {
        Credentials::Nowhere => Ok(None),
        Credentials::OfTheUser => of_the_user(registry, repository),
        Credentials::File(path) => match path.try_exists() {
            Ok(true) => in_file(path, registry, repository),
            Ok(false) => Err(AuthError::Read { path: path.clone(), source: io::ErrorKind::NotFound.into() }),
            Err(source) => Err(AuthError::Read { path: path.clone(), source }),
        },
    }
}

/// From the first file that has them.
fn of_the_user(registry: &str, repository: &str) -> Result<Option<(String, String)>, AuthError> {
    let env = |name: &str| std::env::var_os(name).map(PathBuf::from);
    if let Some(file) = env("REGISTRY_AUTH_FILE") {
        return in_file(&file, registry, repository);
    }
    let home = env("HOME");
    let files = [
        env("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        home.as_ref().map(|dir| dir.join(".config/containers/auth.json")),
        home.as_ref().map(|dir| dir.join(".docker/config.json")),
    ];
    for file in files.into_iter().flatten() {
        if let Some(found) = in_file(&file, registry, repository)? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

fn in_file(path: &Path, registry: &str, repository: &str) -> Result<Option<(String, String)>, AuthError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(AuthError::Read { path: path.to_owned(), source }),
    };
    let file: AuthFile = serde_json::from_slice(&text).map_err(|error| {
        let kind = match error.classify() {
            Category::Io | Category::Eof => "the text ends too early",
            Category::Syntax => "this is not JSON",
            Category::Data => "unexpected content",
        };
        AuthError::Parse { path: path.to_owned(), line: error.line(), column: error.column(), kind }
    })?;
    let whole = format!("{registry}/{repository}");
    // The most specific entry wins: host/a/b, host/a, host.
    for key in
        std::iter::successors(Some(whole.as_str()), |key| key.rsplit_once('/').map(|(shorter, _)| shorter))
    {
        let entry = file.auths.iter().find(|(name, entry)| normal(name) == key && entry.auth.is_some());
        if let Some((name, auth)) = entry.and_then(|(name, entry)| Some((name, entry.auth.as_ref()?))) {
            let fault = || AuthError::Entry { path: path.to_owned(), entry: name.clone() };
            return decode(auth).map(Some).ok_or_else(fault);
        }
    }
    match file.cred_helpers.iter().find(|(name, _)| normal(name) == registry) {
        Some((entry, helper)) => {
            let (entry, helper) = (entry.clone(), helper.clone());
            Err(AuthError::Helper { path: path.to_owned(), entry, helper })
        }
        None => Ok(None),
    }
}

/// Docker writes its own registry as a URL of old.
fn normal(name: &str) -> &str {
    let name = name.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
    match name {
        "index.docker.io/v1" | "index.docker.io" | "registry-1.docker.io" => "docker.io",
        name => name,
    }
}

fn decode(auth: &str) -> Option<(String, String)> {
    let bytes = base64::engine::general_purpose::STANDARD.decode(auth.trim()).ok()?;
    let text = String::from_utf8(bytes).ok()?;
    let (user, password) = text.split_once(':')?;
    Some((user.to_owned(), password.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn the_most_specific_entry_wins() {
        // "host:one" and "team:two".
        let file = file(
            r#"{"auths": {"r.test:5000": {"auth": "aG9zdDpvbmU="}, "r.test:5000/team": {"auth": "dGVhbTp0d28="}}}"#,
        );
        let found = |repository| in_file(file.path(), "r.test:5000", repository).unwrap().unwrap();
        assert_eq!(found("team/app"), ("team".to_owned(), "two".to_owned()));
        assert_eq!(found("other/app"), ("host".to_owned(), "one".to_owned()));
        assert_eq!(found("teammate/app"), ("host".to_owned(), "one".to_owned()));
        assert_eq!(in_file(file.path(), "other.test", "team/app").unwrap(), None);
    }

    #[test]
    fn a_file_that_is_none_is_told_by_the_place_without_what_is_there() {
        let file = file("{\"auths\":\n {\"r\": \"dTpwYXNz\"}}");
        let error = in_file(file.path(), "r", "app").unwrap_err();
        let told = format!("{error} {:?} {:?}", error.source(), error);
        assert!(!told.contains("dTpwYXNz"), "{told}");
        assert!(
            error.to_string().ends_with("not a file of credentials: line 2, column 17: unexpected content"),
            "{error}"
        );
    }

    #[test]
    fn dockers_own_registry_is_found_under_its_old_url() {
        let file = file(r#"{"auths": {"https://index.docker.io/v1/": {"auth": "aG9zdDpvbmU="}}}"#);
        assert!(in_file(file.path(), "docker.io", "library/busybox").unwrap().is_some());
    }

    #[test]
    fn a_password_may_contain_colons() {
        // "u:a:b".
        assert_eq!(decode("dTphOmI="), Some(("u".to_owned(), "a:b".to_owned())));
    }

    #[test]
    fn a_broken_entry_is_an_error_that_names_file_and_entry() {
        let file = file(r#"{"auths": {"r.test": {"auth": "not base64!"}}}"#);
        let error = in_file(file.path(), "r.test", "x").unwrap_err().to_string();
        assert!(error.contains("r.test") && error.contains(&file.path().display().to_string()), "{error}");
        assert!(!error.contains("not base64!"), "a credential must not be printed: {error}");
    }

    #[test]
    fn a_credential_helper_is_named_rather_than_ignored() {
        let file = file(r#"{"credHelpers": {"r.test": "vault"}}"#);
        assert!(
            matches!(in_file(file.path(), "r.test", "x"), Err(AuthError::Helper { helper, .. }) if helper == "vault")
        );
    }

    #[test]
    fn a_missing_file_is_no_error() {
        assert_eq!(in_file(Path::new("/nonexistent/auth.json"), "r.test", "x").unwrap(), None);
    }
}
