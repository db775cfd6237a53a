//! `snapshot`: the state as a file that only the operator's key opens.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use futures_util::StreamExt;
use protocol::snapshot_file::{Opened, Recipient, Sealed, SnapshotKey};
use reqwest::{Method, Response};
use ring::rand::{SecureRandom, SystemRandom};
use serde_json::{Value, json};

use crate::args::{self, SnapshotCommand};
use crate::miner::Miner;
use crate::output::{Printer, warn};
use crate::request;

/// For a whole snapshot.
const TRANSFER_MAX: Duration = Duration::from_secs(60 * 60);

pub(crate) async fn snapshot(printer: &Printer, command: SnapshotCommand) -> Result<()> {
    match command {
        SnapshotCommand::Keygen { file } => keygen(printer, &file),
        SnapshotCommand::Save {
            miner,
            to,
            recipient,
            key,
        } => save(printer, &miner, to, recipient, key.as_deref()).await,
        SnapshotCommand::Inspect { file, key } => printer.readable(&inspected(&file, key.as_deref())?),
        SnapshotCommand::Restore { file, key, cluster } => restore(printer, &file, &key, &cluster),
    }
}

/// Options for a file that only its owner may read.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    options
}

fn keygen(printer: &Printer, file: &Path) -> Result<()> {
    let shown = file.display();
    let mut random = [0; 32];
    let filled = SystemRandom::new().fill(&mut random);
    ensure!(filled.is_ok(), "this machine has no random numbers");
    let key = SnapshotKey::new(random);
    // A key that is there may be the only one that opens older snapshots.
    let made = private().create_new(true).open(file);
    let mut made = made.with_context(|| format!("make {shown}"))?;
    made.write_all(key.file_text().as_bytes())
        .and_then(|()| made.sync_all())
        .with_context(|| format!("write {shown}"))?;
    let recipient = key.recipient();
    if !printer.wants_tables() {
        return printer.value(&json!({ "recipient": recipient.to_string(), "id": recipient.id() }));
    }
    warn(&format!(
        "{shown} opens the snapshots: keep it off the hosts, and keep a copy of it. The word below is no secret; set \
         backup.recipient to it on every member, or give it to snapshot save."
    ));
    printer.line(&recipient.to_string())
}

fn read_key(file: &Path) -> Result<SnapshotKey> {
    let shown = file.display();
    let text = fs::read_to_string(file).with_context(|| format!("read the key file {shown}"))?;
    SnapshotKey::parse(&text).with_context(|| format!("read the key file {shown}"))
}

async fn save(
    printer: &Printer,
    arguments: &args::Miner,
    to: Option<PathBuf>,
    recipient: Option<String>,
    key: Option<&Path>,
) -> Result<()> {
    let key = key.map(read_key).transpose()?;
    let named = recipient.map(|text| text.parse::<Recipient>()).transpose()?;
    let recipient = named.or_else(|| key.as_ref().map(SnapshotKey::recipient));
    let body = recipient.map_or_else(
        || json!({}),
        |recipient| json!({ "recipient": recipient.to_string() }),
    );
    let miner = Miner::new(arguments)?;
    let opened = miner.open(Method::POST, "/v1/snapshots", Some(&body), Some(TRANSFER_MAX));
    let response = opened.await?;
    let status = response.status();
    if !status.is_success() {
        let body = request::body(response).await?;
        return Err(request::refused(status, &body).into());
    }
    let to = match to {
        Some(to) => to,
        None => named_by(&response).context("the answer names no file: --to names one")?,
    };
    let mut part = to.clone().into_os_string();
    part.push(".part");
    let part = PathBuf::from(part);
    if let Err(error) = received(response, &part).await {
        // It says nothing new if this fails too.
        let _ = fs::remove_file(&part);
        return Err(error);
    }
    fs::rename(&part, &to).with_context(|| format!("write {}", to.display()))?;
    // With the key at hand it is shown that the file opens.
    let mut shown = match &key {
        Some(key) if recipient == Some(key.recipient()) => with_key(&to, key)?,
        _ => head_of(&to)?,
    };
    shown["file"] = json!(to.display().to_string());
    printer.readable(&shown)
}

/// The last part of the name that the member gives it: it must not lead elsewhere.
fn named_by(response: &Response) -> Option<PathBuf> {
    let header = response.headers().get("content-disposition")?.to_str().ok()?;
    let name = header.split_once("filename=\"")?.1.strip_suffix('"')?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    (name.chars().all(plain) && !name.starts_with('.')).then(|| PathBuf::from(name))
}

async fn received(response: Response, part: &Path) -> Result<()> {
    let writing = || format!("write {}", part.display());
    let opened = private().create(true).truncate(true).open(part);
    let mut out = opened.with_context(writing)?;
    let mut stream = response.bytes_stream();
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(reqwest::Error::without_url);
        let piece = piece.context("the snapshot was cut off: try again")?;
        out.write_all(&piece).with_context(writing)?;
    }
    out.sync_all().with_context(writing)
}

fn sealed(file: &Path) -> Result<Sealed<BufReader<File>>> {
    let shown = file.display();
    let input = File::open(file).with_context(|| format!("read {shown}"))?;
    Sealed::open(BufReader::new(input)).with_context(|| shown.to_string())
}

fn of_head(head: &protocol::snapshot_file::Head) -> Value {
    json!({
        "cluster": head.cluster,
        "created_at": head.created_at.iso8601(),
        "last_index": head.last_index,
        "format": head.format,
        "written_by": head.written_by,
        "recipient": head.recipient,
    })
}

fn head_of(file: &Path) -> Result<Value> {
    Ok(of_head(sealed(file)?.head()))
}

/// Reads the file to its end, so that all of it is known to be sound.
fn read_through(opened: &mut Opened<BufReader<File>>, file: &Path) -> Result<()> {
    let mut rest = [0; 64 * 1024];
    while opened
        .read(&mut rest)
        .map_err(plain)
        .with_context(|| file.display().to_string())?
        > 0
    {}
    Ok(())
}

/// The text alone, which names what is wrong.
fn plain(error: io::Error) -> anyhow::Error {
    anyhow::anyhow!("{error}")
}

fn with_key(file: &Path, key: &SnapshotKey) -> Result<Value> {
    let opened = sealed(file)?.unseal(key);
    let mut opened = opened.with_context(|| file.display().to_string())?;
    read_through(&mut opened, file)?;
    let mut shown = of_head(opened.head());
    let summary = opened.summary();
    shown["members"] = json!(summary.members);
    shown["rows"] = json!(summary.rows);
    shown["size_bytes"] = json!(summary.size_bytes);
    shown["sound"] = json!(true);
    Ok(shown)
}

fn inspected(file: &Path, key: Option<&Path>) -> Result<Value> {
    match key {
        Some(key) => with_key(file, &read_key(key)?),
        None => head_of(file),
    }
}

/// It is done on the new machine, where nothing of ours runs yet; here the file and the key are tried.
fn restore(printer: &Printer, file: &Path, key_file: &Path, cluster: &str) -> Result<()> {
    let shown = with_key(file, &read_key(key_file)?)?;
    if shown["cluster"] != cluster {
        bail!(
            "{}: this is a snapshot of cluster {}, not of {cluster:?}",
            file.display(),
            shown["cluster"]
        );
    }
    if !printer.wants_tables() {
        return printer.value(&shown);
    }
    warn(&format!(
        "The snapshot of {} opens with this key and is sound. All that happened since then is lost with it, and no \
         member of before may ever start again on its old data.",
        shown["created_at"]
    ));
    printer.line(
        "On the new machine, with chutes-agent installed, its configuration written and the seed in place:",
    )?;
    printer.line(&format!(
        "chutes-agent restore {} --key {} --cluster {cluster}",
        file.display(),
        key_file.display()
    ))
}
