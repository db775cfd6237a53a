//! File, environment and flags, laid over each other key by key. Every key is checked where it is written,
//! so that an error names the file, the variable or the flag that must be changed.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Deserialize as _;
use toml::{Table, Value};

use super::written::Written;
use super::{Error, Problem, keys};

/// What the names of our environment variables begin with.
pub const VARIABLE_PREFIX: &str = "CHUTES_AGENT__";

/// Where a key was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere.
    Default,
    /// In a file.
    File(PathBuf),
    /// In an environment variable.
    Variable(String),
    /// In a flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("configuration"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Variable(name) => write!(f, "environment variable {name}"),
            Self::Flag(flag) => write!(f, "flag {flag}"),
        }
    }
}

/// Who wrote which key last.
#[derive(Debug, Clone, Default)]
pub struct Origins(BTreeMap<String, Origin>);

impl Origins {
    /// Who wrote `key`; for a section, who wrote its first key.
    #[must_use]
    pub fn of(&self, key: &str) -> Origin {
        let inside = format!("{key}.");
        let exact = self.0.get(key);
        let of_section = || self.0.iter().find(|(other, _)| other.starts_with(&inside));
        let origin = exact.or_else(|| of_section().map(|(_, origin)| origin));
        origin.cloned().unwrap_or(Origin::Default)
    }
}

/// The layers so far.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    table: Table,
    origins: Origins,
    problems: Vec<Problem>,
}

impl Layers {
    /// Lays a file over what is there.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::Syntax`]; wrong keys are reported by [`Layers::finish`].
    pub fn file(&mut self, path: &Path) -> Result<(), Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Read {
            path: path.to_owned(),
            source,
        })?;
        let table: Table = text.parse().map_err(|error: toml::de::Error| Error::Syntax {
            path: path.to_owned(),
            reason: error.to_string().trim_end().to_owned(),
        })?;
        let origin = Origin::File(path.to_owned());
        for (key, value) in table {
            self.put(&origin, &key, value);
        }
        Ok(())
    }

    /// Lays an environment variable over what is there; others than ours are passed over.
    pub fn variable(&mut self, name: &str, value: &str) {
        if let Some(rest) = name.strip_prefix(VARIABLE_PREFIX) {
            let key = rest.to_ascii_lowercase().replace("__", ".");
            self.put_text(&Origin::Variable(name.to_owned()), &key, value);
        }
    }

    /// Lays the assignment of a flag, `section.key=value`, over what is there.
    pub fn assignment(&mut self, text: &str) {
        let flag = |key: &str| Origin::Flag(format!("--set {key}"));
        match text.split_once('=') {
            Some((key, value)) => self.put_text(&flag(key.trim()), key.trim(), value.trim()),
            None => self.complain(&flag(text), "write section.key=value".to_owned()),
        }
    }

    /// A value in TOML's syntax, or a plain text where a text is wanted.
    fn put_text(&mut self, origin: &Origin, key: &str, text: &str) {
        let plain = Value::String(text.to_owned());
        let parsed = format!("value = {text}").parse::<Table>().ok();
        let value = match parsed.and_then(|mut table| table.remove("value")) {
            // `2026` reads as a number, but some keys take it as a text.
            Some(value) if type_problem(key, &value).is_none() || type_problem(key, &plain).is_some() => {
                value
            }
            _ => plain,
        };
        self.put(origin, key, value);
    }

    /// Lays one key over what is there: a key of the top, a whole section, or `section.key`.
    pub fn put(&mut self, origin: &Origin, key: &str, value: Value) {
        match key.split_once('.') {
            None => self.put_top(origin, key, value),
            Some((section, name)) => {
                let fields = keys::of_section(section).filter(|_| !keys::is_list(section));
                if !fields.is_some_and(|fields| fields.contains(&name)) {
                    self.complain_unknown(origin, key);
                } else if let Some(problem) = type_problem(key, &value) {
                    self.complain(origin, problem);
                } else {
                    let slot = self.table.entry(section).or_insert_with(|| Table::new().into());
                    if let Some(table) = slot.as_table_mut() {
                        table.insert(name.to_owned(), value);
                    }
                    self.origins.0.insert(key.to_owned(), origin.clone());
                }
            }
        }
    }

    fn put_top(&mut self, origin: &Origin, key: &str, value: Value) {
        let known = keys::of_section("").unwrap_or_default();
        match (keys::of_section(key), value) {
            _ if !known.contains(&key) => self.complain_unknown(origin, key),
            (Some(fields), value) if keys::is_list(key) => {
                let tables = value.as_array().into_iter().flatten().filter_map(Value::as_table);
                let strangers: Vec<String> = tables
                    .flat_map(Table::keys)
                    .filter(|name| !fields.contains(&name.as_str()))
                    .map(|name| format!("{key}[].{name}"))
                    .collect();
                for stranger in &strangers {
                    self.complain_unknown(origin, stranger);
                }
                if strangers.is_empty() {
                    self.put_checked(origin, key, value);
                }
            }
            (Some(_), Value::Table(section)) => {
                for (name, value) in section {
                    self.put(origin, &format!("{key}.{name}"), value);
                }
            }
            (Some(_), _) => self.complain(origin, format!("{key} is a section, write [{key}]")),
            (None, value) => self.put_checked(origin, key, value),
        }
    }

    fn put_checked(&mut self, origin: &Origin, key: &str, value: Value) {
        match type_problem(key, &value) {
            Some(problem) => self.complain(origin, problem),
            None => {
                self.table.insert(key.to_owned(), value);
                self.origins.0.insert(key.to_owned(), origin.clone());
            }
        }
    }

    fn complain_unknown(&mut self, origin: &Origin, key: &str) {
        let hint = keys::nearest(key).map_or(String::new(), |near| format!("; did you mean {near}?"));
        self.complain(origin, format!("{key}: unknown key{hint}"));
    }

    fn complain(&mut self, origin: &Origin, text: String) {
        self.problems.push(Problem {
            origin: origin.clone(),
            text,
        });
    }

    /// All layers as one, and who wrote what.
    ///
    /// # Errors
    /// [`Error::Invalid`] with every unknown key and wrong type.
    pub fn finish(self) -> Result<(Written, Origins), Error> {
        if !self.problems.is_empty() {
            return Err(Error::Invalid(self.problems));
        }
        match Written::deserialize(self.table) {
            Ok(written) => Ok((written, self.origins)),
            // Each key was read alone before; together they can hardly be worse.
            Err(error) => Err(Error::Invalid(vec![Problem {
                origin: Origin::Default,
                text: error.to_string().trim_end().to_owned(),
            }])),
        }
    }
}

/// Reads one key alone: what is wrong with the type of its value, if anything.
fn type_problem(key: &str, value: &Value) -> Option<String> {
    let mut alone = Table::new();
    match key.split_once('.') {
        None => alone.insert(key.to_owned(), value.clone()),
        Some((section, name)) => {
            let inner = Table::from_iter([(name.to_owned(), value.clone())]);
            alone.insert(section.to_owned(), Value::Table(inner))
        }
    };
    let error = Written::deserialize(alone).err()?;
    Some(format!("{key}: {}", error.message()))
}
