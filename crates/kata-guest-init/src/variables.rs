//! Values of `${name}` in a manifest. The names are data: `compat.toml`.

use std::collections::BTreeMap;

use serde::Deserialize;

const TABLE: &str = include_str!("compat.toml");

/// A text with a variable that has no value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VariableError {
    /// Nobody knows the name.
    #[error("{text:?} uses the variable {name:?}, which has no value here")]
    Unknown {
        /// The variable.
        name: String,
        /// Where it stands.
        text: String,
    },
    /// `${` without `}`.
    #[error("{0:?} has a ${{ without }}")]
    Unterminated(String),
}

/// All that is known of variables before a manifest was read.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Table {
    text: BTreeMap<String, String>,
    file: BTreeMap<String, String>,
    path: BTreeMap<String, String>,
    extension: BTreeMap<String, BTreeMap<String, String>>,
    guest_services: BTreeMap<String, Vec<String>>,
    link: BTreeMap<String, String>,
}

impl Table {
    /// The table that this program was built with.
    ///
    /// # Errors
    /// It was built with a broken one.
    pub fn built_in() -> Result<Self, toml::de::Error> {
        toml::from_str(TABLE)
    }

    /// Variables of the manifest with `paths`, whose directory will be at `root`, in a guest with the extensions `attached`.
    #[must_use]
    pub fn variables(&self, root: &str, paths: &BTreeMap<String, String>, attached: &[String]) -> Variables {
        let value = |text: &String, file| Value { text: text.clone(), file };
        let mut values: BTreeMap<String, Value> = BTreeMap::new();
        values.extend(self.text.iter().map(|(name, text)| (name.clone(), value(text, false))));
        values.extend(self.file.iter().map(|(name, text)| (name.clone(), value(text, true))));
        for special in attached.iter().filter_map(|name| self.extension.get(name)) {
            values.extend(special.iter().map(|(name, text)| (name.clone(), value(text, false))));
        }
        for (name, key) in &self.path {
            if let Some(path) = paths.get(key) {
                values.insert(name.clone(), Value { text: format!("{root}/{path}"), file: false });
            }
        }
        values.insert("extension_root".to_owned(), Value { text: root.to_owned(), file: false });
        Variables(values)
    }

    /// Symbolic links that services may look for, and where they lead.
    #[must_use]
    pub fn links(&self) -> &BTreeMap<String, String> {
        &self.link
    }

    /// What the agent knows a service on `socket` by.
    #[must_use]
    pub fn guest_services(&self, socket: &str) -> &[String] {
        self.guest_services.get(socket).map_or(&[], Vec::as_slice)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Value {
    text: String,
    file: bool,
}

/// When something optional is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// Known at boot.
    Known(bool),
    /// As soon as this file is.
    FileExists(String),
}

/// Variables of one manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variables(BTreeMap<String, Value>);

impl Variables {
    /// `text` with values for variables. Values are not looked through again.
    ///
    /// # Errors
    /// [`VariableError`]: what has no value is never an empty text.
    pub fn substitute(&self, text: &str) -> Result<String, VariableError> {
        let mut result = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            let unterminated = || VariableError::Unterminated(text.to_owned());
            let (name, after) = after.split_once('}').ok_or_else(unterminated)?;
            result.push_str(before);
            result.push_str(&self.value(name, text)?.text);
            rest = after;
        }
        Ok(result + rest)
    }

    /// When what depends on the variable `name` is there: the file exists, or the text is not empty.
    ///
    /// # Errors
    /// [`VariableError::Unknown`].
    pub fn when(&self, name: &str) -> Result<When, VariableError> {
        let value = self.value(name, name)?;
        Ok(match value.file {
            true => When::FileExists(value.text.clone()),
            false => When::Known(!value.text.is_empty()),
        })
    }

    fn value(&self, name: &str, text: &str) -> Result<&Value, VariableError> {
        let unknown = || VariableError::Unknown { name: name.to_owned(), text: text.to_owned() };
        self.0.get(name).ok_or_else(unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn variables(attached: &[&str]) -> Variables {
        let paths = [("ocicrypt-config".to_owned(), "etc/ocicrypt.json".to_owned())].into();
        let attached: Vec<String> = attached.iter().map(|name| (*name).to_owned()).collect();
        Table::built_in().unwrap().variables("/run/kata-extensions/coco", &paths, &attached)
    }

    #[test]
    fn variables_get_their_values_and_the_rest_stays() {
        let variables = variables(&["coco"]);
        let text = variables.substitute("${extension_root}/bin:$PATH ${ocicrypt_config_path}$").unwrap();
        assert_eq!(text, "/run/kata-extensions/coco/bin:$PATH /run/kata-extensions/coco/etc/ocicrypt.json$");
        assert_eq!(variables.substitute("").unwrap(), "");
        assert_eq!(variables.substitute("${attester_variant}").unwrap(), "default");
    }

    #[test]
    fn another_extension_changes_a_value() {
        assert_eq!(variables(&["coco", "gpu"]).substitute("${attester_variant}").unwrap(), "nvidia");
    }

    #[test]
    fn what_has_no_value_is_an_error_and_never_an_empty_text() {
        let none = Table::built_in().unwrap().variables("/x", &BTreeMap::new(), &[]);
        for text in ["${ocicrypt_config_path}", "${}", "${ extension_root}", "a${nobody}b", "${${a}}"] {
            assert!(matches!(none.substitute(text), Err(VariableError::Unknown { .. })), "{text}");
        }
        assert_eq!(none.substitute("a${b"), Err(VariableError::Unterminated("a${b".to_owned())));
        assert!(none.when("nobody").is_err());
    }

    #[test]
    fn files_are_looked_for_later_and_texts_now() {
        let variables = variables(&[]);
        let file = When::FileExists("/run/measured-cfg/initdata.toml".to_owned());
        assert_eq!(variables.when("initdata_toml_path").unwrap(), file);
        assert_eq!(variables.when("rest_api_features").unwrap(), When::Known(true));
    }
}
