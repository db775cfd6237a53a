//! What is done once for a machine: an example configuration, folders, certificates.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use agent::config::checked::{certificates_folder, identity_folder, run_folder, server_id};
use agent::config::{self, DEFAULT_FILE, Sources, example};
use agent::processes::private_folder;
use anyhow::Context as _;
use coordinator::identity::{Authority, CA_KEY, HOST_CERTIFICATE};

fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}

/// Writes an example configuration, makes the data folder, and founds the cluster's identity on a member,
/// with a certificate for its own host. What exists is left as it is.
///
/// # Errors
/// With a chain of reasons.
pub(crate) fn init(mut sources: Sources) -> anyhow::Result<()> {
    let file = sources
        .file
        .clone()
        .unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
    if file.exists() {
        say(&format!("{} exists and is left as it is", file.display()))?;
    } else {
        let data = sources
            .data
            .clone()
            .unwrap_or_else(|| config::Written::default().data);
        write_new(&file, &example::text(&std::path::absolute(data)?))?;
        say(&format!("{} written: fill in what is empty", file.display()))?;
    }
    sources.file = Some(file.clone());
    let (written, _) = config::read(&sources)?;
    private_folder(&written.data)?;
    private_folder(&run_folder(&written.data))?;
    if !written.coordinator.enabled {
        say("this machine is no member of the coordinator: its certificate comes from one, see host-cert")?;
        return Ok(());
    }
    let identity = identity_folder(&written.data);
    let founded = !identity.join(CA_KEY).exists();
    private_folder(&identity)?;
    let authority = Authority::open_or_found(&identity)?;
    let verb = if founded {
        "founded"
    } else {
        "exists and is left as it is"
    };
    say(&format!("identity of the cluster {verb}: {}", identity.display()))?;
    if written.host.enabled {
        let id = written.host.id.context("host.id is missing")?;
        let folder = certificates_folder(&written.data);
        if folder.join(HOST_CERTIFICATE).exists() {
            say(&format!(
                "certificate of this host exists and is left as it is: {}",
                folder.display()
            ))?;
        } else {
            issue(&authority, &id, &folder)?;
        }
    }
    say(&format!(
        "next: edit {0}, then chutes-agent --config {0} config check",
        file.display()
    ))
}

/// Makes the certificate of another host, on a member.
///
/// # Errors
/// With a chain of reasons.
pub(crate) fn host_certificate(sources: &Sources, server: &str, out: &Path) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    let identity = identity_folder(&written.data);
    anyhow::ensure!(
        identity.join(CA_KEY).exists(),
        "there is no identity of a cluster in {}: run this on a member of the coordinator, after init",
        identity.display()
    );
    issue(&Authority::open_or_found(&identity)?, server, out)
}

fn issue(authority: &Authority, server: &str, folder: &Path) -> anyhow::Result<()> {
    let server = server_id(server).map_err(anyhow::Error::msg)?;
    // Private when it is ours to make; an existing one belongs to whoever made it.
    let mut builder = fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(folder);
    made.with_context(|| format!("create {}", folder.display()))?;
    authority.issue_host(&server, folder)?;
    say(&format!(
        "certificate of host {server} written: {}",
        folder.display()
    ))
}

fn write_new(path: &Path, text: &str) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let mut options = fs::File::options();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("write {}", path.display()))?;
    Ok(file.write_all(text.as_bytes())?)
}
