//! Pulls images through the host's own registry proxy and keeps them unpacked, one folder for each digest,
//! shared by all workloads.
//!
//! A tag is resolved on every start, as Kubernetes does with pull policy `Always`; content that is here
//! already is not fetched again. Every byte is checked against its digest. A folder appears by rename, so
//! what has a name is whole.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use protocol::hotkey::Hotkey;
use reqwest::header::{ACCEPT, HOST, HeaderMap};
use reqwest::{Client, Response, StatusCode};
use sha2::{Digest as _, Sha256};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::image::{self, Configuration, Descriptor, Digest, Document, Kind, Reference};
use super::record::make_folder;
use super::unpack::{self, Budget};

/// The longest manifest or configuration that is accepted, in bytes.
const DOCUMENT_BYTES_MAX: usize = 4 * 1024 * 1024;
const PARTIAL: &str = ".partial-";
const BACKOFF_FIRST: Duration = Duration::from_millis(300);
const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Why an image is not here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The registry has nothing to say at the moment; retried until patience ends.
    #[error("{0}")]
    Transient(String),
    /// Trying again would change nothing.
    #[error("{0}")]
    Permanent(String),
}

fn permanent(text: impl ToString) -> Error {
    Error::Permanent(text.to_string())
}

/// An unpacked image.
#[derive(Debug)]
pub(crate) struct Image {
    /// Folder with its files.
    pub(crate) root: PathBuf,
    /// Its configuration.
    pub(crate) configuration: Configuration,
}

/// The images of this host and the way to the registry.
#[derive(Debug)]
pub(crate) struct Images {
    folder: PathBuf,
    client: Client,
    registry: SocketAddr,
    /// Port in the host name by which the proxy finds the validator.
    registry_port: u16,
    patience: Duration,
    bytes_max: u64,
    /// One pull at a time for each digest.
    busy: Mutex<BTreeMap<Digest, Arc<tokio::sync::Mutex<()>>>>,
}

/// Where to, how long, and how much.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) registry: SocketAddr,
    pub(crate) registry_port: u16,
    pub(crate) patience: Duration,
    pub(crate) bytes_max: u64,
}

/// A folder in the making, removed when its last owner gives it up.
#[derive(Debug)]
struct Partial(PathBuf);

impl Drop for Partial {
    fn drop(&mut self) {
        // Absent after the rename; what cannot be removed now is removed by the next start.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Stops the unpacking thread when the pull is given up.
#[derive(Debug)]
struct CancelOnDrop(Arc<AtomicBool>);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Pull<'a> {
    images: &'a Images,
    host: String,
    name: String,
    progress: &'a (dyn Fn(u64) + Sync),
    bytes_done: AtomicU64,
}

impl Images {
    /// Opens the folder and removes what earlier pulls left unfinished.
    pub(crate) fn open(folder: PathBuf, settings: Settings) -> std::io::Result<Self> {
        make_folder(&folder)?;
        for item in std::fs::read_dir(&folder)? {
            let item = item?;
            if item.file_name().to_string_lossy().starts_with(PARTIAL) {
                std::fs::remove_dir_all(item.path())?;
            }
        }
        let client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::limited(4))
            .connect_timeout(Duration::from_secs(5))
            .read_timeout(Duration::from_secs(30))
            .build()
            .map_err(std::io::Error::other)?;
        Ok(Self {
            folder,
            client,
            registry: settings.registry,
            registry_port: settings.registry_port,
            patience: settings.patience,
            bytes_max: settings.bytes_max,
            busy: Mutex::default(),
        })
    }

    /// The image, pulled if it is not here. `progress` gets the bytes received so far. Dropping the future
    /// gives up and leaves nothing behind.
    pub(crate) async fn pull(
        &self,
        validator: &Hotkey,
        image: &str,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<Image, Error> {
        let reference =
            Reference::parse(image).ok_or_else(|| permanent(format!("{image:?} is no name of an image")))?;
        let pull = Pull {
            images: self,
            host: format!(
                "{}.localregistry.chutes.ai:{}",
                validator.lower(),
                self.registry_port
            ),
            name: reference.name,
            progress,
            bytes_done: AtomicU64::new(0),
        };
        let (digest, config, layers) = pull.manifest(&reference.tag).await?;
        let lock = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            busy.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(busy.entry(digest.clone()).or_default())
        };
        let _only_one = lock.lock().await;
        let home = self.folder.join(digest.hex());
        if !home.exists() {
            pull.image(&home, &digest, &config, &layers).await?;
        }
        let text = std::fs::read(home.join("config.json")).map_err(permanent)?;
        Ok(Image {
            root: home.join("root"),
            configuration: serde_json::from_slice(&text).map_err(permanent)?,
        })
    }
}

impl Pull<'_> {
    /// Digest and parts of the image behind a tag.
    async fn manifest(&self, tag: &str) -> Result<(Digest, Descriptor, Vec<Descriptor>), Error> {
        let mut tag = tag.to_owned();
        // A tag, or an index behind it, or the manifest behind that.
        for _ in 0..2 {
            let (bytes, digest) = self.document(&format!("manifests/{tag}")).await?;
            if Digest::parse(&tag).is_some_and(|wanted| wanted != digest) {
                return Err(permanent(format!("manifest {tag} came with digest {digest}")));
            }
            let document: Document =
                serde_json::from_slice(&bytes).map_err(|e| permanent(format!("manifest {tag}: {e}")))?;
            match document.kind().map_err(permanent)? {
                Kind::Index(entry) => tag = checked(&entry)?.to_string(),
                Kind::Manifest { config, layers } => return Ok((digest, config, layers)),
            }
        }
        Err(permanent("an index points to another index"))
    }

    /// Fetches and unpacks all of an image, then gives the folder its name.
    async fn image(
        &self,
        home: &Path,
        digest: &Digest,
        config: &Descriptor,
        layers: &[Descriptor],
    ) -> Result<(), Error> {
        let total = layers
            .iter()
            .fold(0_u64, |sum, layer| sum.saturating_add(layer.size));
        if total > self.images.bytes_max {
            let limit = self.images.bytes_max;
            return Err(permanent(format!(
                "the image has {total} bytes, {limit} are allowed"
            )));
        }
        let name = format!("{PARTIAL}{}-{:016x}", digest.hex(), fastrand::u64(..));
        let partial = Arc::new(Partial(self.images.folder.join(name)));
        let root = partial.0.join("root");
        make_folder(&root).map_err(permanent)?;

        let wanted = checked(config)?;
        let (bytes, found) = self.document(&format!("blobs/{wanted}")).await?;
        if found != wanted {
            return Err(permanent(format!(
                "configuration {wanted} came with digest {found}"
            )));
        }
        std::fs::write(partial.0.join("config.json"), bytes).map_err(permanent)?;

        let mut budget = Budget {
            bytes_max: self.images.bytes_max,
            bytes_used: 0,
        };
        for layer in layers {
            let path = partial.0.join("layer");
            self.layer(layer, &path).await?;
            budget = unpack_beside(path.clone(), root.clone(), budget, Arc::clone(&partial)).await?;
            std::fs::remove_file(&path).map_err(permanent)?;
        }
        std::fs::rename(&partial.0, home).map_err(permanent)
    }

    /// A small document and the digest of what came.
    async fn document(&self, path: &str) -> Result<(Vec<u8>, Digest), Error> {
        let mut patience = Patience::new(self.images.patience);
        loop {
            match self.try_document(path).await {
                Err(Error::Transient(error)) => patience.pause(path, error).await?,
                done => return done,
            }
        }
    }

    async fn try_document(&self, path: &str) -> Result<(Vec<u8>, Digest), Error> {
        let mut response = self.get(path).await?;
        let stated = stated_digest(response.headers());
        let mut bytes = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| transient(&e))? {
            if bytes.len() + chunk.len() > DOCUMENT_BYTES_MAX {
                return Err(permanent(format!(
                    "{path} is longer than {DOCUMENT_BYTES_MAX} bytes"
                )));
            }
            bytes.extend_from_slice(&chunk);
        }
        let digest = Digest::of_hash(&Sha256::digest(&bytes));
        if stated.is_some_and(|stated| stated != digest) {
            return Err(permanent(format!(
                "{path} does not have the digest that the registry states"
            )));
        }
        Ok((bytes, digest))
    }

    /// A layer into a file.
    async fn layer(&self, layer: &Descriptor, file: &Path) -> Result<(), Error> {
        let wanted = checked(layer)?;
        let mut patience = Patience::new(self.images.patience);
        loop {
            match self.try_layer(layer.size, &wanted, file).await {
                Err(Error::Transient(error)) => patience.pause(&wanted.to_string(), error).await?,
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        self.bytes_done.fetch_add(layer.size, Ordering::Relaxed);
        Ok(())
    }

    async fn try_layer(&self, size: u64, wanted: &Digest, file: &Path) -> Result<(), Error> {
        let mut response = self.get(&format!("blobs/{wanted}")).await?;
        let mut out = File::create(file).map_err(permanent)?;
        let mut hash = Sha256::new();
        let mut received = 0_u64;
        while let Some(chunk) = response.chunk().await.map_err(|e| transient(&e))? {
            received += chunk.len() as u64;
            if received > size {
                return Err(permanent(format!(
                    "layer {wanted} is longer than its {size} bytes"
                )));
            }
            hash.update(&chunk);
            out.write_all(&chunk).map_err(permanent)?;
            (self.progress)(self.bytes_done.load(Ordering::Relaxed) + received);
        }
        if received < size {
            return Err(Error::Transient(format!(
                "layer {wanted} ended after {received} of {size} bytes"
            )));
        }
        let found = Digest::of_hash(&hash.finalize());
        if found != *wanted {
            return Err(permanent(format!("layer {wanted} came with digest {found}")));
        }
        Ok(())
    }

    async fn get(&self, path: &str) -> Result<Response, Error> {
        let url = format!("http://{}/v2/{}/{path}", self.images.registry, self.name);
        let request = self
            .images
            .client
            .get(url)
            .header(HOST, &self.host)
            .header(ACCEPT, image::ACCEPT);
        let response = request.send().await.map_err(|e| transient(&e))?;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok(response);
        }
        let text = format!("the registry answers {path} with {status}");
        let passing = status.is_server_error()
            || matches!(
                status,
                StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT
            );
        Err(if passing {
            Error::Transient(text)
        } else {
            Error::Permanent(text)
        })
    }
}

/// Bounds the repetition of what fails for a passing reason.
struct Patience {
    until: Instant,
    pause: Duration,
}

impl Patience {
    fn new(patience: Duration) -> Self {
        Self {
            until: Instant::now() + patience,
            pause: BACKOFF_FIRST,
        }
    }

    /// Waits before the next attempt, longer each time; the error comes back when patience has ended.
    async fn pause(&mut self, what: &str, error: String) -> Result<(), Error> {
        if Instant::now() >= self.until {
            return Err(Error::Transient(error));
        }
        tracing::warn!(what, error, "pull is retried");
        sleep(self.pause.mul_f64(0.5 + fastrand::f64())).await;
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        Ok(())
    }
}

fn transient(error: &reqwest::Error) -> Error {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    Error::Transient(text)
}

fn checked(descriptor: &Descriptor) -> Result<Digest, Error> {
    let text: String = descriptor.digest.chars().take(100).collect();
    Digest::parse(&text).ok_or_else(|| permanent(format!("{text:?} is not a sha256 digest")))
}

fn stated_digest(headers: &HeaderMap) -> Option<Digest> {
    Digest::parse(headers.get("docker-content-digest")?.to_str().ok()?)
}

/// Unpacks in a thread of its own, since it keeps a processor and the disk busy.
#[expect(
    clippy::disallowed_methods,
    reason = "the thread is the seam between unpacking and the rest"
)]
async fn unpack_beside(
    layer: PathBuf,
    root: PathBuf,
    mut budget: Budget,
    partial: Arc<Partial>,
) -> Result<Budget, Error> {
    let (done, result) = oneshot::channel();
    let cancelled = Arc::new(AtomicBool::new(false));
    let guard = CancelOnDrop(Arc::clone(&cancelled));
    std::thread::spawn(move || {
        let unpacked = unpack::unpack(&layer, &root, &mut budget, &cancelled);
        drop(partial);
        // Nobody waits any more when the pull was given up.
        let _ = done.send(unpacked.map(|()| budget));
    });
    let unpacked = result.await.map_err(|_| permanent("unpacking broke off"))?;
    drop(guard);
    unpacked.map_err(permanent)
}
