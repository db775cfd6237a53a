//! Settings: one TOML file for all services of this machine. Each service has its own `Config` in its own
//! terms; this room joins them, in two steps: as written, then as checked. After that nothing parses a
//! string again.
//!
//! Order: defaults, then the file, then environment variables (`CHUTES_AGENT__SECTION__KEY`), then flags.
//!
//! Reading order: [`written`] (every key, with its meaning and default), [`layers`] (file, environment and
//! flags, unknown keys and wrong types), [`keys`] (which keys there are), [`checked`] (what the services
//! get), [`units`] (durations and sizes as people write them), [`example`] (the file that `init` writes).

pub mod checked;
pub mod example;
pub mod keys;
pub mod layers;
pub mod units;
pub mod written;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub use checked::Config;
pub use layers::{Origin, Origins};
pub use written::Written;

use coordinator::join::Admission;
use layers::Layers;

/// Read when no other file is named; it may be missing.
pub const DEFAULT_FILE: &str = "/etc/chutes-agent/config.toml";

/// Where settings come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file; [`DEFAULT_FILE`], if it exists, when none is named.
    pub file: Option<PathBuf>,
    /// Environment variables; those without our prefix are passed over.
    pub environment: Vec<(String, String)>,
    /// Assignments `section.key=value` from flags, later ones win.
    pub assignments: Vec<String>,
    /// The data folder from its own flag; wins over everything.
    pub data: Option<PathBuf>,
}

/// One thing that is wrong, and where it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// File, variable or flag.
    pub origin: Origin,
    /// Key and what is wrong with it.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.text)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("configuration file {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not TOML. The text names line and column.
    #[error("configuration file {path} is not TOML: {reason}")]
    Syntax {
        /// Which.
        path: PathBuf,
        /// What the parser says.
        reason: String,
    },
    /// All that is wrong, one a line.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    let lines: Vec<String> = problems.iter().map(Problem::to_string).collect();
    lines.join("\n")
}

/// Settings of all sources, in effect and checked.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What is in effect, as it would be written; holds no secret, only paths to them.
    pub written: Written,
    /// What the services get.
    pub config: Config,
}

/// Reads all sources, without asking whether the whole makes sense.
///
/// # Errors
/// [`Error`]; [`Error::Invalid`] lists all unknown keys and wrong types at once.
pub fn read(sources: &Sources) -> Result<(Written, Origins), Error> {
    let mut layers = Layers::default();
    match &sources.file {
        Some(path) => layers.file(path)?,
        None if Path::new(DEFAULT_FILE).exists() => layers.file(Path::new(DEFAULT_FILE))?,
        None => {}
    }
    for (name, value) in &sources.environment {
        layers.variable(name, value);
    }
    for assignment in &sources.assignments {
        layers.assignment(assignment);
    }
    if let Some(data) = &sources.data {
        let value = toml::Value::String(data.display().to_string());
        layers.put(&Origin::Flag("--data".to_owned()), "data", value);
    }
    let (mut written, origins) = layers.finish()?;
    if written.host.id.is_none()
        && let Ok(Some(admission)) = Admission::read(&checked::certificates_folder(&written.data))
    {
        written.host.id = Some(admission.server.to_string());
    }
    written.fill_in(&written::Machine::this());
    Ok((written, origins))
}

/// Reads all sources and checks the whole.
///
/// # Errors
/// [`Error`]; [`Error::Invalid`] lists all that is wrong at once.
pub fn load(sources: &Sources) -> Result<Loaded, Error> {
    let (written, origins) = read(sources)?;
    let config = checked::check(&written, &origins).map_err(Error::Invalid)?;
    Ok(Loaded { written, config })
}
