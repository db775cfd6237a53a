//! Which validator a request is for, from its `Host`. Pure.
//!
//! Image references carry `{hotkey in lower case}.localregistry.chutes.ai:30500`. Lower case cannot be
//! turned back into an SS58 address, so there is a table, built from the configuration.

use std::collections::BTreeMap;
use std::net::IpAddr;

use protocol::hotkey::Hotkey;

/// Characters of an SS58 address with prefix 42, give or take: such a first label means a validator.
const HOTKEY_LABEL_LENGTHS: std::ops::RangeInclusive<usize> = 46..=49;
/// The domain of image references: a first label under it always means a validator.
const IMAGE_DOMAIN: &str = "localregistry.chutes.ai";

/// Index of an upstream in the configuration, by validator.
#[derive(Debug, Clone)]
pub struct Table {
    by_label: BTreeMap<String, usize>,
}

/// A validator that is not configured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no validator with the hotkey {0} (in lower case) is configured on this host")]
pub struct UnknownValidator(pub String);

impl Table {
    /// From the configured validators, the first being the default.
    #[must_use]
    pub fn new<'a>(validators: impl IntoIterator<Item = &'a Hotkey>) -> Self {
        let labels = validators
            .into_iter()
            .enumerate()
            .map(|(index, hotkey)| (hotkey.lower(), index));
        Self {
            by_label: labels.collect(),
        }
    }

    /// The upstream for a `Host` header (or none). Port and the rest of the domain are ignored; a host that
    /// names no validator (loopback, `localhost`, any other name) means the first one.
    ///
    /// # Errors
    /// [`UnknownValidator`] when the host names a validator that is not in the table.
    pub fn lookup(&self, host: Option<&str>) -> Result<usize, UnknownValidator> {
        let host = host.unwrap_or_default();
        let (label, rest) = host.split_once('.').unwrap_or((host, ""));
        let label = label.split(':').next().unwrap_or_default().to_ascii_lowercase();
        if let Some(index) = self.by_label.get(&label) {
            return Ok(*index);
        }
        let domain = rest.split(':').next().unwrap_or_default().trim_end_matches('.');
        let is_address = host.starts_with('[')
            || host
                .split(':')
                .next()
                .is_some_and(|name| name.parse::<IpAddr>().is_ok());
        let looks_like_hotkey =
            HOTKEY_LABEL_LENGTHS.contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric());
        if !is_address && (looks_like_hotkey || domain.eq_ignore_ascii_case(IMAGE_DOMAIN)) {
            return Err(UnknownValidator(
                label.chars().take(64).filter(char::is_ascii_graphic).collect(),
            ));
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_label_names_the_validator() {
        let keys: Vec<Hotkey> = [[1; 32], [2; 32]].iter().map(Hotkey::from_public_key).collect();
        let table = Table::new(&keys);
        let (first, second) = (keys[0].lower(), keys[1].lower());
        let stranger = Hotkey::from_public_key(&[3; 32]).lower();
        for (host, expected) in [
            (format!("{first}.localregistry.chutes.ai:30500"), Ok(0)),
            (format!("{second}.localregistry.chutes.ai:30500"), Ok(1)),
            (
                format!("{}.LocalRegistry.chutes.ai", second.to_uppercase()),
                Ok(1),
            ),
            (format!("{second}.registry.chutes.svc.cluster.local"), Ok(1)),
            (format!("{second}:30500"), Ok(1)),
            (second.clone(), Ok(1)),
            ("127.0.0.1:30500".to_owned(), Ok(0)),
            ("[::1]:30500".to_owned(), Ok(0)),
            ("localhost:30500".to_owned(), Ok(0)),
            (String::new(), Ok(0)),
            (
                format!("{stranger}.localregistry.chutes.ai:30500"),
                Err(UnknownValidator(stranger.clone())),
            ),
            (
                format!("{stranger}.elsewhere.example"),
                Err(UnknownValidator(stranger.clone())),
            ),
            (
                "nobody.localregistry.chutes.ai:30500".to_owned(),
                Err(UnknownValidator("nobody".to_owned())),
            ),
        ] {
            assert_eq!(table.lookup(Some(&host)), expected, "{host}");
        }
        assert_eq!(table.lookup(None), Ok(0));
    }
}
