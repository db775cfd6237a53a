//! Which validators we work for and where they are. Several may be configured; everything remote is keyed
//! by the validator's hotkey.

use std::fmt;
use std::net::IpAddr;

use protocol::hotkey::{Hotkey, InvalidKey};
use reqwest::Url;
use serde::{Deserialize, Serialize};

/// The most validators that one miner is configured with.
pub const VALIDATORS_MAX: usize = 16;

/// One validator as written in the configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidatorSettings {
    /// SS58 address.
    pub hotkey: String,
    /// REST address, such as `https://api.chutes.ai`.
    pub api: String,
    /// Websocket address, such as `wss://ws.chutes.ai`.
    pub socket: String,
    /// Registry, host and perhaps port, such as `registry.chutes.ai`.
    pub registry: String,
}

/// Why the configuration of a validator is not usable. Names the key and the value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidValidator {
    /// Not an address.
    #[error("validators[{index}].hotkey: {error}")]
    Hotkey {
        /// Position in the list.
        index: usize,
        /// What is wrong with it.
        error: InvalidKey,
    },
    /// Not a URL of the right kind.
    #[error("validators[{index}].{key} = {value:?}: {problem}")]
    Url {
        /// Position in the list.
        index: usize,
        /// `api`, `socket` or `registry`.
        key: &'static str,
        /// As written.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Two entries with one hotkey, or whose hotkeys differ in case alone: image names carry the hotkey in
    /// lower case and could not tell them apart.
    #[error("validators[{index}].hotkey: another entry has the same hotkey (in lower case)")]
    Twice {
        /// Position in the list.
        index: usize,
    },
    /// None, or too many.
    #[error("validators: {0} are configured, 1 to {VALIDATORS_MAX} are possible")]
    Count(usize),
}

/// One validator as checked.
#[derive(Clone, PartialEq, Eq)]
pub struct ValidatorConfig {
    /// Who it is.
    pub hotkey: Hotkey,
    /// Base of its REST routes; ends in `/`.
    pub api: Url,
    /// Its websocket; scheme `ws` or `wss`.
    pub socket: Url,
    /// Base of its registry; scheme `http` or `https`, path `/`.
    pub registry: Url,
}

impl fmt::Debug for ValidatorConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            hotkey,
            api,
            socket,
            registry,
        } = self;
        write!(f, "ValidatorConfig({hotkey}, {api}, {socket}, {registry})")
    }
}

impl ValidatorConfig {
    /// Checks what was written; `index` is the position in the list, for messages.
    ///
    /// # Errors
    /// [`InvalidValidator`].
    pub fn check(index: usize, settings: &ValidatorSettings) -> Result<Self, InvalidValidator> {
        let hotkey = Hotkey::parse(settings.hotkey.trim())
            .map_err(|error| InvalidValidator::Hotkey { index, error })?;
        let url = |key, value: &str, plain: &str, tls: &str| {
            check_url(value, plain, tls).map_err(|problem| InvalidValidator::Url {
                index,
                key,
                value: value.to_owned(),
                problem,
            })
        };
        let registry = match settings.registry.contains("://") {
            true => settings.registry.clone(),
            // A registry is usually written without a scheme. On loopback there is no TLS.
            false if host_of(&settings.registry).is_some_and(|host| is_loopback(&host)) => {
                format!("http://{}", settings.registry)
            }
            false => format!("https://{}", settings.registry),
        };
        Ok(Self {
            hotkey,
            api: url("api", &settings.api, "http", "https")?,
            socket: url("socket", &settings.socket, "ws", "wss")?,
            registry: url("registry", &registry, "http", "https")?,
        })
    }

    /// True if every address is on this machine: then it is a stand-in.
    #[must_use]
    pub fn is_loopback(&self) -> bool {
        [&self.api, &self.socket, &self.registry]
            .into_iter()
            .all(|url| url.host_str().is_some_and(is_loopback))
    }
}

/// All configured validators, in the order of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directory(Vec<ValidatorConfig>);

impl Directory {
    /// Checks the whole list.
    ///
    /// # Errors
    /// [`InvalidValidator`].
    pub fn check(settings: &[ValidatorSettings]) -> Result<Self, InvalidValidator> {
        if settings.is_empty() || settings.len() > VALIDATORS_MAX {
            return Err(InvalidValidator::Count(settings.len()));
        }
        let mut checked: Vec<ValidatorConfig> = Vec::new();
        for (index, written) in settings.iter().enumerate() {
            let validator = ValidatorConfig::check(index, written)?;
            if checked
                .iter()
                .any(|other| other.hotkey.lower() == validator.hotkey.lower())
            {
                return Err(InvalidValidator::Twice { index });
            }
            checked.push(validator);
        }
        Ok(Self(checked))
    }

    /// The validator with this hotkey.
    #[must_use]
    pub fn get(&self, hotkey: &Hotkey) -> Option<&ValidatorConfig> {
        self.0.iter().find(|validator| &validator.hotkey == hotkey)
    }

    /// The validator whose hotkey is this in lower case, as image names carry it.
    #[must_use]
    pub fn get_lower(&self, hotkey: &str) -> Option<&ValidatorConfig> {
        self.0.iter().find(|validator| validator.hotkey.lower() == hotkey)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &ValidatorConfig> {
        self.0.iter()
    }
}

fn check_url(value: &str, plain: &str, tls: &str) -> Result<Url, String> {
    let mut url = Url::parse(value.trim()).map_err(|e| e.to_string())?;
    let host = url.host_str().ok_or("it has no host")?.to_owned();
    if url.scheme() != plain && url.scheme() != tls {
        return Err(format!("the scheme must be {tls} (or {plain} on loopback)"));
    }
    if url.scheme() == plain && !is_loopback(&host) {
        return Err(format!("{plain} is only for loopback addresses, use {tls}"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it must not carry credentials".to_owned());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("it must not have a query or a fragment".to_owned());
    }
    if !url.path().ends_with('/') {
        let path = format!("{}/", url.path());
        url.set_path(&path);
    }
    Ok(url)
}

fn host_of(authority: &str) -> Option<String> {
    let url = Url::parse(&format!("https://{authority}")).ok()?;
    url.host_str().map(ToOwned::to_owned)
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    const V: &str = "5Dt7HZ7Zpw4DppPxFM7Ke3Cm7sDAWhsZXmM5ZAmE7dSVJbcQ";
    const OTHER: &str = "5CfCr47V5Dte6bwxNBE8K9oNnQd9fiay6aDEEkgYtFv7w4Fq";

    fn settings(hotkey: &str, api: &str, socket: &str, registry: &str) -> ValidatorSettings {
        ValidatorSettings {
            hotkey: hotkey.to_owned(),
            api: api.to_owned(),
            socket: socket.to_owned(),
            registry: registry.to_owned(),
        }
    }

    #[test]
    fn the_real_validator_and_a_stand_in_are_accepted() {
        let real = settings(
            V,
            "https://api.chutes.ai",
            "wss://ws.chutes.ai",
            "registry.chutes.ai",
        );
        let stand_in = settings(
            OTHER,
            "http://127.0.0.1:8000",
            "ws://[::1]:8001",
            "127.0.0.1:5000",
        );
        let directory = Directory::check(&[real, stand_in]).expect("both are good");
        let urls: Vec<String> = directory
            .iter()
            .flat_map(|v| [&v.api, &v.socket, &v.registry])
            .map(Url::to_string)
            .collect();
        assert_eq!(
            urls,
            [
                "https://api.chutes.ai/",
                "wss://ws.chutes.ai/",
                "https://registry.chutes.ai/",
                "http://127.0.0.1:8000/",
                "ws://[::1]:8001/",
                "http://127.0.0.1:5000/",
            ]
        );
        let real = directory.get_lower(&V.to_lowercase()).expect("configured");
        assert!(!real.is_loopback() && real.hotkey.as_str() == V);
        let stand_in = directory
            .get(&Hotkey::parse(OTHER).expect("good"))
            .expect("configured");
        assert!(stand_in.is_loopback());
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let (api, socket, registry) = ("https://a.example", "wss://s.example", "r.example");
        let rows = [
            (settings("x", api, socket, registry), "validators[0].hotkey"),
            (settings(V, "a.example", socket, registry), "validators[0].api"),
            (
                settings(V, "http://a.example", socket, registry),
                "only for loopback",
            ),
            (
                settings(V, "https://u:p@a.example", socket, registry),
                "credentials",
            ),
            (settings(V, "https://a.example/?q=1", socket, registry), "query"),
            (
                settings(V, api, "https://s.example", registry),
                "validators[0].socket",
            ),
            (settings(V, api, "ws://10.0.0.1", registry), "only for loopback"),
            (settings(V, api, socket, ""), "validators[0].registry"),
            (settings(V, api, socket, "http://r.example"), "only for loopback"),
        ];
        for (written, expected) in rows {
            let error = Directory::check(std::slice::from_ref(&written)).expect_err("not usable");
            assert!(error.to_string().contains(expected), "{written:?}: {error}");
        }
        let good = settings(V, api, socket, registry);
        assert_eq!(Directory::check(&[]), Err(InvalidValidator::Count(0)));
        assert_eq!(
            Directory::check(&[good.clone(), good]),
            Err(InvalidValidator::Twice { index: 1 })
        );
    }
}
