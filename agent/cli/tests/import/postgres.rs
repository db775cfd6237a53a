//! A real PostgreSQL on loopback with the original miner's tables. Where there is none, nothing can be tested; with
//! `REQUIRE_PEERS=1`, as in CI, that is a failure.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// With characters that a URL cannot have as they are.
pub(crate) const PASSWORD: &str = "p@ss/word?1";
pub(crate) const PASSWORD_IN_URL: &str = "p%40ss%2Fword%3F1";
const USER: &str = "chutes";
const START_PATIENCE: Duration = Duration::from_secs(60);

/// As the original makes them, by its models and its migrations: `verified_at` has no time zone.
const TABLES: &str = "
CREATE TABLE servers (server_id TEXT PRIMARY KEY, validator TEXT NOT NULL, name TEXT UNIQUE NOT NULL,
    ip_address TEXT, verification_port INTEGER, status TEXT, created_at TIMESTAMPTZ DEFAULT now(), labels JSONB NOT NULL,
    seed BIGINT, gpu_count INTEGER NOT NULL, cpu_per_gpu INTEGER NOT NULL DEFAULT 1,
    memory_per_gpu INTEGER NOT NULL DEFAULT 1, hourly_cost DOUBLE PRECISION, locked BOOLEAN DEFAULT false);
CREATE TABLE chutes (chute_id TEXT PRIMARY KEY, validator TEXT NOT NULL, name TEXT NOT NULL, image TEXT NOT NULL,
    code TEXT NOT NULL, filename TEXT NOT NULL, ref_str TEXT NOT NULL, version TEXT NOT NULL, supported_gpus TEXT[] NOT NULL,
    gpu_count INTEGER NOT NULL, created_at TIMESTAMPTZ DEFAULT now(), updated_at TIMESTAMPTZ, ban_reason TEXT,
    chutes_version TEXT);
CREATE TABLE deployments (deployment_id TEXT PRIMARY KEY, instance_id TEXT UNIQUE, validator TEXT NOT NULL, host TEXT,
    port INTEGER, chute_id TEXT NOT NULL REFERENCES chutes ON DELETE CASCADE,
    server_id TEXT NOT NULL REFERENCES servers ON DELETE CASCADE, version TEXT NOT NULL, active BOOLEAN DEFAULT false,
    verified_at TIMESTAMP, stub BOOLEAN DEFAULT false, job_id TEXT, config_id TEXT, created_at TIMESTAMPTZ DEFAULT now());
CREATE TABLE gpus (gpu_id TEXT PRIMARY KEY, validator TEXT NOT NULL,
    server_id TEXT NOT NULL REFERENCES servers ON DELETE CASCADE,
    deployment_id TEXT REFERENCES deployments ON DELETE SET NULL, device_info JSONB NOT NULL,
    model_short_ref TEXT NOT NULL, verified BOOLEAN DEFAULT false);
";

/// The folder of its programs, or nothing with a word about it.
pub(crate) fn programs() -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|versions| {
            versions
                .flatten()
                .map(|version| version.path().join("bin"))
                .collect()
        })
        .unwrap_or_default();
    found.retain(|folder| folder.join("initdb").exists());
    found.sort();
    let folder = found.pop();
    if folder.is_none() {
        let why = "no PostgreSQL: .ci/peers installs it";
        assert!(std::env::var("REQUIRE_PEERS").as_deref() != Ok("1"), "{why}");
        eprintln!("NOT TESTED: {why}");
    }
    folder
}

/// The server. Its process ends with it.
pub(crate) struct Postgres {
    process: Child,
    port: u16,
    _folder: TempDir,
}

/// A command that runs as who may run PostgreSQL: root may not.
fn as_its_user(program: &Path, folder: &Path) -> Command {
    let mut command = if is_root() {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
            .arg(program);
        command
    } else {
        Command::new(program)
    };
    command
        .current_dir(folder)
        .env("LC_ALL", "C")
        .stdin(Stdio::null());
    command
}

fn is_root() -> bool {
    let user = Command::new("id").arg("-u").output().expect("there is id");
    user.stdout.trim_ascii() == b"0"
}

impl Postgres {
    pub(crate) async fn start(programs: &Path) -> Self {
        let folder = tempfile::tempdir().expect("temporary folders can be made");
        let data = folder.path().join("data");
        std::fs::create_dir(&data).expect("writable");
        let password = folder.path().join("password");
        std::fs::write(&password, PASSWORD).expect("writable");
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(folder.path(), open).expect("ours");
        if is_root() {
            let owned = Command::new("chown")
                .arg("postgres")
                .args([&data, &password])
                .status();
            assert!(
                owned.expect("there is chown").success(),
                "is there a user postgres?"
            );
        }
        let mut initdb = as_its_user(&programs.join("initdb"), &data);
        initdb
            .args([
                "--auth=scram-sha-256",
                "--username",
                USER,
                "--no-sync",
                "--pwfile",
            ])
            .arg(&password)
            .arg(&data);
        let made = initdb.output().expect("initdb can be started");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has ports");
        let port = listener.local_addr().expect("bound").port();
        drop(listener);
        let log = std::fs::File::create(folder.path().join("log")).expect("writable");
        let mut postgres = as_its_user(&programs.join("postgres"), &data);
        postgres
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]);
        postgres.args(["-c", "unix_socket_directories=", "-p", &port.to_string()]);
        postgres.stdout(log.try_clone().expect("a file")).stderr(log);
        let process = postgres.spawn().expect("postgres can be started");
        let server = Self {
            process,
            port,
            _folder: folder,
        };
        server.until_ready().await;
        server
    }

    async fn until_ready(&self) {
        let ready = async {
            while tokio_postgres::connect(&self.url("postgres"), NoTls)
                .await
                .is_err()
            {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(START_PATIENCE, ready)
            .await
            .expect("PostgreSQL starts");
    }

    /// The URL of a database, as an operator writes it.
    pub(crate) fn url(&self, database: &str) -> String {
        format!(
            "postgresql://{USER}:{PASSWORD_IN_URL}@127.0.0.1:{}/{database}",
            self.port
        )
    }

    pub(crate) async fn client(&self, database: &str) -> Client {
        let connected = tokio_postgres::connect(&self.url(database), NoTls).await;
        let (client, connection) = connected.expect("it is ready");
        tokio::spawn(connection);
        client
    }

    /// A new database with the original's tables.
    pub(crate) async fn database(&self, name: &str) -> Client {
        let all = self.client("postgres").await;
        all.batch_execute(&format!("CREATE DATABASE {name}"))
            .await
            .expect("a new name");
        let client = self.client(name).await;
        client.batch_execute(TABLES).await.expect("good tables");
        client
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // A fast end: it takes its own children with it.
        let pid = self.process.id().to_string();
        let _ = Command::new("kill").args(["-INT", &pid]).status();
        let _ = self.process.wait();
    }
}
