//! Which keys there are: taken from the types themselves, so that no list can be forgotten.

use serde::de::value::Error as Unread;
use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use serde::forward_to_deserialize_any;

use coordinator::validator::directory::ValidatorSettings;

use super::written::{Backup, Coordinator, Host, Log, Miner, Nodes, Proof, Raft, Runtime, Written};
use crate::{cache, egress, packet_filter, registry};

/// Notes the names of a struct's fields instead of reading one.
#[derive(Default)]
struct Notice(&'static [&'static str]);

impl<'de> Deserializer<'de> for &mut Notice {
    type Error = Unread;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Unread> {
        Err(Unread::custom("only the names are wanted"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Unread> {
        self.0 = fields;
        Err(Unread::custom("only the names are wanted"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

fn fields<'de, T: Deserialize<'de>>() -> &'static [&'static str] {
    let mut notice = Notice::default();
    let _ = T::deserialize(&mut notice);
    notice.0
}

/// The keys of a section, or of the top when the name is empty; `None` when there is no such section.
#[must_use]
pub fn of_section(section: &str) -> Option<&'static [&'static str]> {
    Some(match section {
        "" => fields::<Written>(),
        "miner" => fields::<Miner>(),
        "validators" => fields::<ValidatorSettings>(),
        "host" => fields::<Host>(),
        "coordinator" => fields::<Coordinator>(),
        "nodes" => fields::<Nodes>(),
        "backup" => fields::<Backup>(),
        "proof" => fields::<Proof>(),
        "registry" => fields::<registry::RawConfig>(),
        "egress" => fields::<egress::RawConfig>(),
        "cache" => fields::<cache::RawConfig>(),
        "runtime" => fields::<Runtime>(),
        "packet_filter" => fields::<packet_filter::RawConfig>(),
        "raft" => fields::<Raft>(),
        "log" => fields::<Log>(),
        _ => return None,
    })
}

/// True for the list of tables `[[validators]]`, which is one value for environment and flags.
#[must_use]
pub fn is_list(section: &str) -> bool {
    section == "validators"
}

/// All keys as `section.key`, in the order of the documentation; those of lists as `section[].key`.
#[must_use]
pub fn all() -> Vec<String> {
    let mut keys = Vec::new();
    for top in fields::<Written>() {
        match of_section(top) {
            None => keys.push((*top).to_owned()),
            Some(fields) => {
                let dot = if is_list(top) { "[]." } else { "." };
                keys.extend(fields.iter().map(|key| format!("{top}{dot}{key}")));
            }
        }
    }
    keys
}

/// The known key that someone who wrote `unknown` probably meant.
#[must_use]
pub fn nearest(unknown: &str) -> Option<String> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let near = |key: &String| {
        let whole = distance(unknown, key);
        // The right key in another section counts as a small slip, however long the names of the sections are.
        let moved = if last(unknown) == last(key) { 2 } else { usize::MAX };
        whole.min(moved)
    };
    let limit = 2.max(1 + last(unknown).chars().count() / 3);
    let candidates = all().into_iter().map(|key| (near(&key), key));
    let (distance, key) = candidates.min_by_key(|(distance, _)| *distance)?;
    (distance <= limit).then_some(key)
}

/// Letters to insert, remove or replace (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_section_has_keys_and_every_key_a_section() {
        let keys = all();
        for expected in [
            "data",
            "miner.seed_file",
            "validators[].api",
            "registry.listen",
            "log.level",
        ] {
            assert!(
                keys.iter().any(|key| key == expected),
                "{expected} is not in {keys:?}"
            );
        }
        let tops: Vec<&&str> = fields::<Written>()
            .iter()
            .filter(|top| of_section(top).is_none())
            .collect();
        assert_eq!(tops, [&"data"], "a section is not listed in of_section");
        assert!(keys.len() > 40, "{keys:?}");
    }

    #[test]
    fn slips_are_understood() {
        for (slip, meant) in [
            ("miner.hotky", Some("miner.hotkey")),
            ("miner.seedfile", Some("miner.seed_file")),
            ("mine.hotkey", Some("miner.hotkey")),
            ("seed_file", Some("miner.seed_file")),
            ("host.seed_file", Some("miner.seed_file")),
            ("miner.colour", None),
        ] {
            assert_eq!(nearest(slip).as_deref(), meant, "{slip}");
        }
    }
}
