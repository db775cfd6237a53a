//! Another process of this host, over HTTP on its root-only Unix socket.

use std::path::Path;
use std::time::Duration;

use protocol::gpu::DeviceInfo;
use serde::{Deserialize, Serialize};

const TIMEOUT: Duration = Duration::from_secs(10);
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Why a neighbour did not do its part; it may be starting.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No connection, or one that broke.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// It said no.
    #[error("{path} was answered with {status}")]
    Refused {
        /// What was asked.
        path: String,
        /// The answer.
        status: reqwest::StatusCode,
    },
    /// It said something that we do not understand.
    #[error("{path} was answered with something else: {reason}")]
    Malformed {
        /// What was asked.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

/// A process behind a socket.
#[derive(Debug, Clone)]
pub struct Neighbour {
    client: reqwest::Client,
}

#[derive(Deserialize)]
struct Devices {
    devices: Vec<DeviceInfo>,
}

impl Neighbour {
    /// The process that listens, or will listen, on this socket.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new(socket: &Path) -> Result<Self, Error> {
        let client = reqwest::Client::builder()
            .unix_socket(socket)
            .no_proxy()
            .timeout(TIMEOUT)
            .build()?;
        Ok(Self { client })
    }

    /// The GPUs that the proof process sees.
    ///
    /// # Errors
    /// [`Error`]; which GPUs there are is not known then.
    pub async fn devices(&self) -> Result<Vec<DeviceInfo>, Error> {
        let path = "/devices";
        let devices: Devices =
            serde_json::from_slice(&self.get(path).await?).map_err(|error| malformed(path, error))?;
        Ok(devices.devices)
    }

    /// What the process counts, in Prometheus' text form.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn metrics(&self) -> Result<String, Error> {
        let path = "/metrics";
        String::from_utf8(self.get(path).await?).map_err(|error| malformed(path, error))
    }

    async fn get(&self, path: &str) -> Result<Vec<u8>, Error> {
        let mut response = accepted(path, self.client.get(url(path)).send().await?)?;
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            if bytes.len() + chunk.len() > ANSWER_BYTES_MAX {
                return Err(malformed(path, format!("more than {ANSWER_BYTES_MAX} bytes")));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    }

    /// Replaces something there.
    ///
    /// # Errors
    /// [`Error`]; whether it was replaced is not known then, and it may be sent again.
    pub async fn put(&self, path: &str, body: &impl Serialize) -> Result<(), Error> {
        accepted(path, self.client.put(url(path)).json(body).send().await?)?;
        Ok(())
    }
}

fn malformed(path: &str, reason: impl ToString) -> Error {
    Error::Malformed {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn url(path: &str) -> String {
    format!("http://localhost{path}")
}

fn accepted(path: &str, response: reqwest::Response) -> Result<reqwest::Response, Error> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    Err(Error::Refused {
        path: path.to_owned(),
        status,
    })
}
