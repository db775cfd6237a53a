//! `restore`: a snapshot file becomes the store of this machine, which is then the only member of its cluster.
//!
//! The agent must not run. What is written: the store in `coordinator/raft`, and this host's key and certificate,
//! made by the authority that the snapshot holds, sealed with the miner's seed.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use agent::config::checked::{certificates_folder, server_id};
use agent::config::{self, Sources, Written};
use agent::processes::{Lock, private_folder};
use agent::signer::read_seed;
use anyhow::{Context as _, bail, ensure};
use coordinator::backup::restore::Restoring;
use coordinator::clock::{Clock, WallClock};
use coordinator::identity::{CA_CERTIFICATE, COORDINATOR_NAME, HOST_CERTIFICATE, HOST_KEY};
use coordinator::signer::{Key, SealedKind};
use coordinator_core::state_machine::host::{Cluster, NewHost};
use protocol::id::ServerId;
use protocol::snapshot_file::SnapshotKey;
use protocol::time::UnixMillis;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, date_time_ymd,
};
use sha2::{Digest, Sha256};

/// What is restored, and from what.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// The snapshot
    file: PathBuf,
    /// Key file that opens it
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Name of the cluster, typed by hand: it must be the one in the snapshot
    #[arg(long)]
    cluster: String,
    /// `host:port` under which other hosts reach this one (UDP); host.address with the port of
    /// coordinator.hosts_listen when absent
    #[arg(long, value_name = "HOST:PORT")]
    address: Option<String>,
    /// Site of this host: its provider or place
    #[arg(long, default_value = "")]
    site: String,
}

/// Restores a snapshot into this machine's empty data folder.
///
/// # Errors
/// With a chain of reasons; a store that was there is left as it is.
pub(crate) fn restore(sources: &Sources, arguments: &Arguments) -> anyhow::Result<()> {
    let (written, _) = config::read(sources)?;
    ensure!(
        written.coordinator.enabled,
        "coordinator.enabled is false: only a member of the coordinator can be restored"
    );
    ensure!(
        written.coordinator.cluster == arguments.cluster,
        "coordinator.cluster is {:?} here, not {:?}: they must be the same",
        written.coordinator.cluster,
        arguments.cluster
    );
    let seed_file = written.miner.seed_file.as_ref();
    let seed_file =
        seed_file.context("miner.seed_file is missing: the cluster's authority is sealed with the seed")?;
    let key_file = arguments.key.display();
    let text = fs::read_to_string(&arguments.key).with_context(|| format!("read the key file {key_file}"))?;
    let key = SnapshotKey::parse(&text).with_context(|| format!("read the key file {key_file}"))?;

    private_folder(&written.data)?;
    let _lock = Lock::take(&written.data)?;
    let folder = written.data.join("coordinator");
    let store = folder.join("raft");
    if store.exists() {
        bail!(
            "{} exists: a snapshot is restored on a machine without a store; move the folder away first",
            store.display()
        );
    }
    private_folder(&folder)?;
    let restoring = Restoring::open(&arguments.file, &key, &arguments.cluster, &folder)?;
    let seed = Key::new(&read_seed(seed_file)?);
    let authority = Authority::open(restoring.cluster()?, &seed)?;

    let host_key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let host = host(&written, arguments, &host_key)?;
    let now = WallClock.now();
    let certificate = authority.certificate(&host.server, restoring.member()?, &host_key, now)?;
    let (head, rows) = (
        restoring.head().clone(),
        restoring.summary().rows.values().sum::<u64>(),
    );
    let (server, name) = (host.server.clone(), host.name.clone());

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("start the async runtime")?;
    let member = runtime.block_on(restoring.into_store(host, store, now))?;
    let certificates = certificates_folder(&written.data);
    private_folder(&certificates)?;
    write_secret(&certificates.join(HOST_KEY), &host_key.serialize_pem())?;
    write_secret(&certificates.join(HOST_CERTIFICATE), &certificate)?;
    write_secret(&certificates.join(CA_CERTIFICATE), &authority.certificate_pem)?;

    let mut out = std::io::stdout();
    writeln!(
        out,
        "cluster {:?} restored as of {}: {rows} rows, log index {}",
        head.cluster, head.created_at, head.last_index
    )?;
    writeln!(out, "host {name} ({server}) is member {member}, the only one")?;
    writeln!(
        out,
        "what happened after {} is lost. Before you start the agent: no member of before may ever start again on its \
         old data",
        head.created_at
    )?;
    writeln!(
        out,
        "next: chutes-agent run; then invite the other members anew with chutes-miner host invite --eligible"
    )?;
    Ok(())
}

fn host(written: &Written, arguments: &Arguments, key: &KeyPair) -> anyhow::Result<NewHost> {
    let id = written.host.id.as_deref().context("host.id is missing")?;
    let server = server_id(id).map_err(anyhow::Error::msg)?;
    let name = written.host.name.clone().context("host.name is missing")?;
    let port = written.coordinator.hosts_listen.port();
    let of_host = || {
        written
            .host
            .address
            .as_ref()
            .map(|address| format!("{address}:{port}"))
    };
    let address = arguments.address.clone().or_else(of_host);
    let address = address.context("--address is missing: where do other hosts reach this one?")?;
    Ok(NewHost {
        server,
        name,
        site: arguments.site.clone(),
        address,
        key_hash: Sha256::digest(key.subject_public_key_info()).into(),
    })
}

/// The cluster's authority, out of the snapshot.
struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn open(cluster: &Cluster, seed: &Key) -> anyhow::Result<Self> {
        let opened = seed.unseal(SealedKind::ClusterCaKey, &cluster.sealed_key);
        let opened = opened.context("open the cluster's authority: is miner.seed_file this miner's seed?")?;
        let pem = String::from_utf8(opened).context("the key of the cluster's authority is no PEM")?;
        let key = KeyPair::from_pem(&pem).context("the key of the cluster's authority")?;
        let issuer = Issuer::from_ca_cert_pem(&cluster.authority_pem, key);
        Ok(Self {
            certificate_pem: cluster.authority_pem.clone(),
            issuer: issuer.context("the certificate of the cluster's authority")?,
        })
    }

    fn certificate(
        &self,
        server: &ServerId,
        member: u64,
        key: &KeyPair,
        now: UnixMillis,
    ) -> anyhow::Result<String> {
        let names = vec![
            server.to_string(),
            replica::quic::server_name(member),
            COORDINATOR_NAME.to_owned(),
        ];
        let mut parameters = CertificateParams::new(names)?;
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, server.as_str());
        parameters.distinguished_name = name;
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let day = std::time::Duration::from_secs(24 * 60 * 60);
        let now = date_time_ymd(1970, 1, 1) + std::time::Duration::from_millis(now.0);
        parameters.not_before = now - day;
        parameters.not_after = now + 90 * day;
        Ok(parameters.signed_by(key, &self.issuer)?.pem())
    }
}

/// Writes a file of mode 0600.
fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = fs::File::options();
    let file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path);
    let mut file = file.with_context(|| format!("write {}", path.display()))?;
    file.write_all(text.as_bytes())?;
    Ok(file.sync_all()?)
}
