//! `[backup]`, as checked.

use coordinator::backup::{BucketSettings, Place, Settings};
use protocol::snapshot_file::Recipient;
use reqwest::Url;

use super::{Checker, Written, written};

/// Settings of the schedule, if there is one; `None` only with a problem noted.
#[expect(clippy::option_option, reason = "wanted or not, possible or not")]
pub(super) fn check(written: &Written, checker: &mut Checker<'_>) -> Option<Option<Settings>> {
    let settings = &written.backup;
    let place = match (&settings.directory, &settings.bucket) {
        (None, None) => return Some(None),
        (Some(_), Some(_)) => {
            let text = "backup.directory and backup.bucket are both set: snapshots go to one place";
            checker.complain("backup.bucket", text);
            return None;
        }
        (Some(directory), None) => Some(Place::Directory(directory.clone())),
        (None, Some(name)) => bucket(name, settings, checker).map(Place::Bucket),
    };
    let why = "the public half of the key that opens the snapshots; `chutes-miner snapshot keygen` makes it";
    let recipient = checker.require("backup.recipient", settings.recipient.as_ref(), why);
    let recipient = recipient.and_then(|text| checker.take("backup.recipient", text.parse::<Recipient>()));
    for (key, zero) in [
        ("backup.every", settings.every.0.is_zero()),
        ("backup.keep", settings.keep == 0),
    ] {
        if zero {
            checker.complain(key, format!("{key} must be more than zero"));
        }
    }
    Some(Some(Settings {
        every: settings.every.0,
        keep: settings.keep,
        recipient: recipient?,
        place: place?,
        spool: written.data.join("coordinator/backup.part"),
    }))
}

fn bucket(name: &str, settings: &written::Backup, checker: &mut Checker<'_>) -> Option<BucketSettings> {
    let why = "the base URL of the store";
    let endpoint = checker.require("backup.endpoint", settings.endpoint.as_ref(), why);
    let endpoint = endpoint.and_then(|text| checker.take("backup.endpoint", base_url(text)));
    if settings.key_file.is_none() {
        let text = "backup.key_file is missing: the file with the keys of the bucket";
        checker.complain("backup.key_file", text);
    }
    Some(BucketSettings {
        endpoint: endpoint?,
        region: settings.region.clone(),
        bucket: name.to_owned(),
        prefix: settings.prefix.clone(),
        key_file: settings.key_file.clone()?,
    })
}

fn base_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|error| format!("{text:?}: {error}"))?;
    let plain = url.query().is_none() && url.fragment().is_none() && url.username().is_empty();
    match url.scheme() {
        "https" | "http" if plain && url.password().is_none() => Ok(url),
        _ => Err(format!(
            "{text:?}: write https:// and the store's name, without keys in it"
        )),
    }
}
