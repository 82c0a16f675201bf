//! Where spans are sent.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;
use toml::de::DeValue;

use crate::error::Fault;
use crate::keys::{Kind, Value, parsed};

/// Path of OTLP's traces, where an endpoint names none.
const TRACES: &str = "/v1/traces";
/// Port of OTLP over HTTP.
const PORT: u16 = 4318;

/// A collector that takes OTLP over HTTP: `http://HOST[:PORT][/PATH]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpEndpoint {
    host: String,
    port: u16,
    path: String,
}

impl OtlpEndpoint {
    /// `HOST:PORT`.
    #[must_use]
    pub fn authority(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The path of the request.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }
}

impl Default for OtlpEndpoint {
    /// A collector on this host.
    fn default() -> Self {
        Self { host: "127.0.0.1".to_owned(), port: PORT, path: TRACES.to_owned() }
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}{}", self.host, self.port, self.path)
    }
}

impl Serialize for OtlpEndpoint {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Value for OtlpEndpoint {
    const KIND: Kind = Kind::Text;

    fn read(value: &DeValue<'_>) -> Result<Self, Fault> {
        parsed(value)
    }
}

impl FromStr for OtlpEndpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("{text:?} is not http://HOST[:PORT][/PATH]: {why}");
        if text.starts_with("https://") {
            return Err(wrong(
                "spans are sent without TLS; run a collector on this host, which sends them on",
            ));
        }
        let rest = text.strip_prefix("http://").ok_or_else(|| wrong("it has no http://"))?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let (host, port) = match authority.rsplit_once(':') {
            // The colons of an IPv6 address are within brackets.
            Some((host, port)) if !port.ends_with(']') => {
                (host, port.parse().map_err(|_| wrong("its port is no number"))?)
            }
            _ => (authority, PORT),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-[]:".contains(c);
        if host.is_empty() || port == 0 || !host.chars().all(plain) {
            return Err(wrong("it has no host"));
        }
        if !path.chars().all(|c| c.is_ascii_graphic()) {
            return Err(wrong("its path has characters that must be escaped"));
        }
        let path = if matches!(path, "" | "/") { TRACES } else { path };
        Ok(Self { host: host.to_owned(), port, path: path.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_has_the_port_and_path_of_otlp_unless_it_says_otherwise() {
        let told = |text: &str| text.parse::<OtlpEndpoint>().map(|endpoint| endpoint.to_string());
        for (text, expected) in [
            ("http://127.0.0.1", "http://127.0.0.1:4318/v1/traces"),
            ("http://collector:80/", "http://collector:80/v1/traces"),
            ("http://[::1]:9/otlp/v1/traces", "http://[::1]:9/otlp/v1/traces"),
            ("http://[::1]", "http://[::1]:4318/v1/traces"),
        ] {
            assert_eq!(told(text).unwrap(), expected);
        }
        assert_eq!(told("http://127.0.0.1").unwrap(), OtlpEndpoint::default().to_string());
    }

    #[test]
    fn what_cannot_be_reached_that_way_is_refused_with_the_reason() {
        for (text, reason) in [
            ("https://a", "TLS"),
            ("a:1", "http://"),
            ("http://:1", "host"),
            ("http://a:x", "port"),
            ("http://a:0", "host"),
            ("http://a b", "host"),
            ("http://a/ b", "path"),
        ] {
            let error = text.parse::<OtlpEndpoint>().unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
