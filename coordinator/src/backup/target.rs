//! Where snapshots are kept: a directory, perhaps of another machine, or a bucket.

use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tokio::fs;
use tokio::io::AsyncWriteExt;

use super::bucket::{Bucket, BucketSettings};
use super::{Error, Name, Result, Stream};

/// Where snapshots go, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A directory that exists.
    Directory(PathBuf),
    /// A bucket of an S3-compatible store.
    Bucket(BucketSettings),
}

/// Where snapshots go.
#[derive(Debug)]
pub enum Target {
    /// A directory.
    Directory(PathBuf),
    /// A bucket.
    Bucket(Box<Bucket>),
}

impl Target {
    /// The target at a place; a bucket's key file is read now.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Bucket`].
    pub fn open(place: &Place) -> Result<Self> {
        Ok(match place {
            Place::Directory(directory) => Self::Directory(directory.clone()),
            Place::Bucket(settings) => Self::Bucket(Box::new(Bucket::open(settings)?)),
        })
    }

    /// The snapshots of this cluster, the oldest first.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Bucket`].
    pub async fn list(&self, cluster: &str) -> Result<Vec<Name>> {
        let names = match self {
            Self::Directory(directory) => files_of(directory).await?,
            Self::Bucket(bucket) => bucket.list(&super::name::prefix(cluster)).await?,
        };
        let mut names: Vec<Name> = names
            .iter()
            .filter_map(|name| Name::parse(name, cluster))
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Puts a snapshot there as a whole; its size. `spool` is a file of this machine to gather it in.
    pub(super) async fn put(&self, name: &str, stream: &mut Stream, spool: &Path) -> Result<u64> {
        match self {
            Self::Directory(directory) => {
                remove_parts(directory, &stream.head().cluster).await?;
                let part = directory.join(format!(".{name}.part"));
                let (size_bytes, _) = gathered(stream, &part).await?;
                let to = directory.join(name);
                let renamed = fs::rename(&part, &to).await;
                renamed.map_err(|source| in_file(&to, source))?;
                sync_directory(directory).await?;
                Ok(size_bytes)
            }
            Self::Bucket(bucket) => {
                let (size_bytes, sha256) = gathered(stream, spool).await?;
                let sent = bucket.put(name, spool, size_bytes, &sha256).await;
                let removed = fs::remove_file(spool).await;
                sent?;
                removed.map_err(|source| in_file(spool, source))?;
                Ok(size_bytes)
            }
        }
    }

    /// Deletes a snapshot. One that is gone already is as good.
    pub(super) async fn delete(&self, name: &str) -> Result<()> {
        match self {
            Self::Directory(directory) => {
                let file = directory.join(name);
                match fs::remove_file(&file).await {
                    Err(source) if source.kind() != io::ErrorKind::NotFound => Err(in_file(&file, source)),
                    _ => Ok(()),
                }
            }
            Self::Bucket(bucket) => bucket.delete(name).await,
        }
    }

    /// Copies a snapshot into a file of this machine; mode 0600.
    ///
    /// # Errors
    /// [`Error::File`]; [`Error::Bucket`].
    pub async fn fetch(&self, name: &str, to: &Path) -> Result<()> {
        match self {
            Self::Directory(directory) => {
                let from = directory.join(name);
                let copied = fs::copy(&from, to).await;
                copied.map(drop).map_err(|source| in_file(&from, source))
            }
            Self::Bucket(bucket) => {
                let mut out = private(to).await?;
                bucket.get(name, &mut out, to).await?;
                out.sync_all().await.map_err(|source| in_file(to, source))
            }
        }
    }
}

pub(super) fn in_file(path: &Path, source: io::Error) -> Error {
    Error::File {
        path: path.to_owned(),
        source,
    }
}

async fn files_of(directory: &Path) -> Result<Vec<String>> {
    let failed = |source| in_file(directory, source);
    let mut entries = fs::read_dir(directory).await.map_err(failed)?;
    let mut names = Vec::new();
    while let Some(entry) = entries.next_entry().await.map_err(failed)? {
        if entry.file_type().await.map_err(failed)?.is_file()
            && let Ok(name) = entry.file_name().into_string()
        {
            names.push(name);
        }
    }
    Ok(names)
}

/// Removes what a crash left half written.
async fn remove_parts(directory: &Path, cluster: &str) -> Result<()> {
    for file in files_of(directory).await? {
        let name = file.strip_prefix('.').and_then(|file| file.strip_suffix(".part"));
        if name.is_some_and(|name| Name::parse(name, cluster).is_some()) {
            let file = directory.join(file);
            fs::remove_file(&file)
                .await
                .map_err(|source| in_file(&file, source))?;
        }
    }
    Ok(())
}

async fn private(file: &Path) -> Result<fs::File> {
    let mut options = fs::OpenOptions::new();
    let opened = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(file);
    opened.await.map_err(|source| in_file(file, source))
}

/// Writes a stream into a file, durably; its size and its SHA-256. Nothing is left where that fails.
async fn gathered(stream: &mut Stream, file: &Path) -> Result<(u64, [u8; 32])> {
    let written = write(stream, file).await;
    if written.is_err() {
        // It says nothing new if this fails too.
        let _ = fs::remove_file(file).await;
    }
    written
}

async fn write(stream: &mut Stream, file: &Path) -> Result<(u64, [u8; 32])> {
    let failed = |source| in_file(file, source);
    let mut out = private(file).await?;
    let (mut size_bytes, mut sha256) = (0, Sha256::new());
    while let Some(bytes) = stream
        .next()
        .await
        .map_err(|error| Error::Take(error.to_string()))?
    {
        out.write_all(&bytes).await.map_err(failed)?;
        sha256.update(&bytes);
        size_bytes += bytes.len() as u64;
    }
    out.flush().await.map_err(failed)?;
    out.sync_all().await.map_err(failed)?;
    Ok((size_bytes, sha256.finalize().into()))
}

async fn sync_directory(directory: &Path) -> Result<()> {
    let failed = |source| in_file(directory, source);
    let opened = fs::File::open(directory).await.map_err(failed)?;
    opened.sync_all().await.map_err(failed)
}
