//! The original miner's tables, read in one transaction that changes nothing and sees one moment.
//!
//! Each row comes as JSON text, so that no type of a column matters. Columns that an older generation does not have
//! get what it meant by their absence; those that nothing here needs are passed over.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::jiff::Timestamp;
use k8s_openapi::jiff::civil::DateTime;
use k8s_openapi::jiff::tz::TimeZone;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio_postgres::config::Host;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

const CONNECT_MAX: Duration = Duration::from_secs(10);
const READ_MAX: Duration = Duration::from_secs(120);
const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL TIME ZONE 'UTC'";

/// A GPU host.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Server {
    pub(crate) server_id: String,
    pub(crate) name: String,
    pub(crate) validator: String,
    #[serde(default)]
    pub(crate) ip_address: Option<String>,
    /// What one GPU costs per hour, in dollars.
    #[serde(default)]
    pub(crate) hourly_cost: Option<f64>,
    /// 64 bits: never a float.
    #[serde(default)]
    pub(crate) seed: Option<i64>,
    #[serde(default = "unlocked")]
    locked: Option<bool>,
}

impl Server {
    /// Null is locked to the original; without the column there is no lock.
    pub(crate) fn is_locked(&self) -> bool {
        self.locked.unwrap_or(true)
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the column may be null")]
fn unlocked() -> Option<bool> {
    Some(false)
}

/// A GPU, and the deployment that holds it.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Gpu {
    pub(crate) gpu_id: String,
    pub(crate) server_id: String,
    #[serde(default)]
    pub(crate) deployment_id: Option<String>,
    #[serde(default)]
    pub(crate) model_short_ref: Option<String>,
    #[serde(default)]
    verified: Option<bool>,
}

impl Gpu {
    pub(crate) fn is_verified(&self) -> bool {
        self.verified == Some(true)
    }
}

/// A chute in its newest version.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Chute {
    pub(crate) chute_id: String,
    pub(crate) name: String,
    pub(crate) image: String,
    pub(crate) code: String,
    pub(crate) filename: String,
    pub(crate) ref_str: String,
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) supported_gpus: Option<Vec<String>>,
    pub(crate) gpu_count: u32,
    #[serde(default)]
    pub(crate) chutes_version: Option<String>,
    #[serde(default)]
    pub(crate) preemptible: Option<bool>,
    #[serde(default)]
    pub(crate) tee: Option<bool>,
}

/// A copy of a chute on a server.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Deployment {
    pub(crate) deployment_id: String,
    pub(crate) chute_id: String,
    pub(crate) server_id: String,
    pub(crate) version: String,
    #[serde(default)]
    pub(crate) instance_id: Option<String>,
    #[serde(default)]
    pub(crate) job_id: Option<String>,
    #[serde(default)]
    pub(crate) config_id: Option<String>,
    #[serde(default)]
    pub(crate) active: Option<bool>,
    #[serde(default)]
    pub(crate) stub: Option<bool>,
    #[serde(default)]
    pub(crate) created_at: Option<String>,
    #[serde(default)]
    pub(crate) verified_at: Option<String>,
    #[serde(default)]
    pub(crate) activated_at: Option<String>,
    #[serde(default)]
    pub(crate) preemptible: Option<bool>,
}

/// Everything that is taken over.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rows {
    pub(crate) servers: Vec<Server>,
    pub(crate) gpus: Vec<Gpu>,
    pub(crate) chutes: Vec<Chute>,
    pub(crate) deployments: Vec<Deployment>,
}

/// Reads all tables as they are at one moment.
pub(crate) async fn read(url: &str) -> Result<Rows> {
    let database = Database::of(url)?;
    let reading = async {
        let (client, connection) = database.connect().await?;
        // It ends with the client, and what it has to say of a failure the client says too.
        let connection = tokio::spawn(connection);
        let rows = database.rows(&client).await;
        drop(client);
        let _ = connection.await;
        rows
    };
    let read = tokio::time::timeout(READ_MAX, reading).await;
    read.with_context(|| {
        format!(
            "{} did not answer within {} s",
            database.shown,
            READ_MAX.as_secs()
        )
    })?
}

/// Milliseconds since 1970 of a time as PostgreSQL writes it into JSON. Without an offset it is UTC, the time zone
/// of the original's database.
pub(crate) fn unix_ms(text: &str) -> Result<u64> {
    let timestamp = text.parse::<Timestamp>().or_else(|_| {
        let local = text.parse::<DateTime>()?;
        Ok::<_, k8s_openapi::jiff::Error>(local.to_zoned(TimeZone::UTC)?.timestamp())
    });
    let timestamp = timestamp.with_context(|| format!("{text:?} is no time"))?;
    u64::try_from(timestamp.as_millisecond()).with_context(|| format!("{text:?} is before 1970"))
}

/// The database, and how messages call it: without its password.
pub(crate) struct Database {
    config: tokio_postgres::Config,
    pub(crate) shown: String,
}

impl Database {
    pub(crate) fn of(url: &str) -> Result<Self> {
        // As the original's own setting has it.
        let url = url.replacen("postgresql+asyncpg://", "postgresql://", 1);
        // The parser's words may repeat part of the password.
        let Ok(mut config) = url.parse::<tokio_postgres::Config>() else {
            bail!(
                "--postgres is no URL such as postgresql://chutes:PASSWORD@127.0.0.1:5432/chutes \
                 (characters other than letters and digits in the password are written as %XX)"
            );
        };
        config
            .connect_timeout(CONNECT_MAX)
            .application_name("chutes-miner");
        let hosts = config.get_hosts().iter().map(|host| match host {
            Host::Tcp(name) => name.clone(),
            #[cfg(unix)]
            Host::Unix(folder) => folder.display().to_string(),
        });
        let ports = config.get_ports().iter().map(u16::to_string);
        let shown = format!(
            "PostgreSQL at {} port {}",
            hosts.collect::<Vec<_>>().join(","),
            Some(ports.collect::<Vec<_>>().join(","))
                .filter(|ports| !ports.is_empty())
                .unwrap_or_else(|| "5432".to_owned())
        );
        Ok(Self { config, shown })
    }

    pub(crate) async fn connect(
        &self,
    ) -> Result<(
        Client,
        impl Future<Output = Result<(), tokio_postgres::Error>> + use<>,
    )> {
        match self.config.connect(NoTls).await {
            Ok(connected) => Ok(connected),
            Err(error) => {
                let way_out = self.way_out(&error);
                Err(error).with_context(|| format!("cannot open {}; {way_out}", self.shown))
            }
        }
    }

    fn way_out(&self, error: &tokio_postgres::Error) -> &'static str {
        let cause = std::error::Error::source(error).map(ToString::to_string);
        let words = format!("{error}: {}", cause.unwrap_or_default());
        match error.code() {
            Some(code) if *code == SqlState::INVALID_PASSWORD => {
                "the password is in the secret postgres-secret, under postgres-password"
            }
            Some(code)
                if *code == SqlState::INVALID_AUTHORIZATION_SPECIFICATION
                    && error
                        .as_db_error()
                        .is_some_and(|it| it.message().contains("no encryption")) =>
            {
                "it demands TLS, which is not spoken here: reach it through `kubectl port-forward`, and let \
                 pg_hba.conf take connections from there"
            }
            Some(code) if *code == SqlState::INVALID_CATALOG_NAME => {
                "the database of the original miner is called chutes"
            }
            Some(_) => "it refuses this user: the original miner's is called chutes",
            None if words.contains("TLS") || words.contains("tls") => {
                "TLS is not spoken here: reach it through `kubectl port-forward`, with sslmode=disable in the URL"
            }
            None if words.contains("password missing") || words.contains("invalid configuration") => {
                "write it as postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
            }
            None => {
                "is it there? In the cluster of the original: kubectl -n chutes port-forward service/postgres 5432"
            }
        }
    }

    async fn rows(&self, client: &Client) -> Result<Rows> {
        let begun = client.batch_execute(BEGIN).await;
        begun.with_context(|| format!("read from {}", self.shown))?;
        let rows = Rows {
            servers: self.table(client, "servers").await?,
            gpus: self.table(client, "gpus").await?,
            chutes: self.table(client, "chutes").await?,
            deployments: self.table(client, "deployments").await?,
        };
        let ended = client.batch_execute("ROLLBACK").await;
        ended.with_context(|| format!("read from {}", self.shown))?;
        Ok(rows)
    }

    async fn table<T: DeserializeOwned>(&self, client: &Client, name: &str) -> Result<Vec<T>> {
        let shown = &self.shown;
        let query = format!("SELECT to_jsonb(t)::text FROM {name} t ORDER BY 1");
        let messages = match client.simple_query(&query).await {
            Ok(messages) => messages,
            Err(error) => {
                let way_out = match error.code() {
                    Some(code) if *code == SqlState::UNDEFINED_TABLE => {
                        "is this the original miner's database? It is called chutes"
                    }
                    Some(code) if *code == SqlState::INSUFFICIENT_PRIVILEGE => {
                        "this user may not read it: the original miner's is called chutes"
                    }
                    _ => "try again",
                };
                return Err(error)
                    .with_context(|| format!("cannot read the table {name} of {shown}; {way_out}"));
            }
        };
        let mut rows = Vec::new();
        for message in messages {
            let SimpleQueryMessage::Row(row) = message else {
                continue;
            };
            let text = row.get(0).unwrap_or_default();
            let row = serde_json::from_str(text).with_context(|| {
                format!(
                    "a row of the table {name} of {shown} is not as the original miner writes it: {}",
                    beginning(text)
                )
            })?;
            rows.push(row);
        }
        Ok(rows)
    }
}

/// Enough of a row to find it.
fn beginning(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_with_and_without_an_offset() {
        for (text, expected) in [
            ("2026-11-22T20:07:41.093078+00:00", Some(1_795_378_061_093)),
            ("2026-11-22T22:07:41.093+02:00", Some(1_795_378_061_093)),
            ("2026-11-22T20:07:41.093078", Some(1_795_378_061_093)),
            ("1970-01-01T00:00:00+00:00", Some(0)),
            ("1969-12-31T23:59:59+00:00", None),
            ("infinity", None),
            ("", None),
        ] {
            assert_eq!(unix_ms(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn older_and_newer_columns_are_put_up_with() {
        let read = |text: &str| serde_json::from_str::<Server>(text).expect("a server");
        let old =
            read(r#"{"server_id": "a", "name": "a", "validator": "5F", "hourly_cost": 1, "more": [1]}"#);
        assert!(!old.is_locked() && old.seed.is_none());
        let null = r#"{"server_id": "a", "name": "a", "validator": "5F", "locked": null, "seed": 9223372036854775807}"#;
        let null = read(null);
        assert!(null.is_locked());
        assert_eq!(null.seed, Some(i64::MAX));
    }

    #[test]
    fn a_bad_url_is_not_repeated() {
        for url in [
            "postgres://chutes:secret@127.0.0.1/chutes?secret=1",
            "http://secret",
            "postgres://chutes:secret@127.0.0.1:port/chutes",
        ] {
            let Err(error) = Database::of(url) else {
                panic!("{url} is none");
            };
            let shown = format!("{error:#}");
            assert!(!shown.contains("cret") && shown.contains("--postgres"), "{shown}");
        }
        let database = Database::of("postgresql+asyncpg://chutes:secret@[::1]:5433/chutes").expect("good");
        assert_eq!(database.shown, "PostgreSQL at ::1 port 5433");
    }
}
