//! Errors as text that may leave the service: to the caller and into the log.

use std::error::Error;

/// Longest text: a registry's answer can be part of an error.
const LIMIT: usize = 2048;

/// An error and its causes on one line, joined with `: `. Queries and user names of URLs are left out, as signed links and
/// proxies have secrets there; so are control characters.
pub fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        // Some errors of other crates repeat their cause in their own text.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    let text = without_secrets(&text);
    let clean = text.chars().map(|c| if c.is_control() { ' ' } else { c });
    clean.take(LIMIT).collect()
}

/// `https://user:password@host/path?token=x` becomes `https://host/path`.
fn without_secrets(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("://") {
        clean.push_str(before);
        clean.push_str("://");
        let ends = |c: char| c.is_whitespace() || matches!(c, ')' | '"' | '\'' | ',' | '>');
        let (url, tail) = after.split_at(after.find(ends).unwrap_or(after.len()));
        let url = url.split(['?', '#']).next().unwrap_or_default();
        let (authority, path) = url.split_at(url.find('/').unwrap_or(url.len()));
        clean.push_str(authority.rsplit('@').next().unwrap_or_default());
        clean.push_str(path);
        rest = tail;
    }
    clean.push_str(rest);
    clean
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Words(String, #[source] Option<Box<Words>>);

    fn said(text: &str) -> String {
        sentence(&Words(text.to_owned(), None))
    }

    #[test]
    fn causes_follow_and_are_said_once() {
        let cause = Words("no route".to_owned(), None);
        assert_eq!(
            sentence(&Words("cannot pull".to_owned(), Some(Box::new(cause)))),
            "cannot pull: no route"
        );
        let repeated = Words("no route".to_owned(), None);
        assert_eq!(
            sentence(&Words("failed: no route".to_owned(), Some(Box::new(repeated)))),
            "failed: no route"
        );
    }

    #[test]
    fn urls_keep_no_secrets() {
        for (url, clean) in [
            ("(https://cdn.test/b?X-Signature=abc) failed", "(https://cdn.test/b) failed"),
            ("http://user:pa@ss@proxy.test:3128: refused", "http://proxy.test:3128: refused"),
            ("a http://u@h/p@q?x#y, b https://k?z", "a http://h/p@q, b https://k"),
            ("no url, user@host?", "no url, user@host?"),
        ] {
            assert_eq!(said(url), clean);
        }
    }

    #[test]
    fn a_registry_cannot_write_lines_into_the_log() {
        assert_eq!(said("a\nb\u{1b}[31m"), "a b [31m");
        assert_eq!(said(&"x".repeat(LIMIT * 2)).len(), LIMIT);
    }
}
