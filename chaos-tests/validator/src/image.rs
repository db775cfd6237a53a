//! The registry's content: OCI images built from one executable. All images share a single gzip layer with
//! `usr/local/bin/chutes`; they differ by a label in their configuration.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Media type of the manifest.
pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// Where the executable lies in the image.
pub const EXECUTABLE_PATH: &str = "usr/local/bin/chutes";

/// The shared layer, on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Its file.
    pub path: PathBuf,
    /// `sha256:` and hexadecimal digits of the compressed bytes.
    pub digest: String,
    /// The same of the uncompressed tar.
    pub diff_id: String,
    /// Compressed size.
    pub size_bytes: u64,
}

/// A small blob: a configuration or a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// `sha256:` and hexadecimal digits.
    pub digest: String,
    /// Content.
    pub bytes: Vec<u8>,
}

impl Blob {
    fn new(bytes: Vec<u8>) -> Self {
        let digest = format!("sha256:{}", hex::encode(Sha256::digest(&bytes)));
        Self { digest, bytes }
    }
}

/// Makes images from the layer.
#[derive(Debug, Clone)]
pub struct Images {
    layer: Layer,
}

impl Images {
    /// Packs `executable` into a layer under `folder`. A layer that was packed before from the same
    /// executable has the same bytes; layers of other executables are removed: the folder is its own.
    ///
    /// # Errors
    /// Those of reading the executable and writing the layer.
    pub fn build(executable: &Path, folder: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let temporary = folder.join("layer.new");
        let gzip = GzEncoder::new(Hashing::new(File::create(&temporary)?), Compression::fast());
        let mut tar = tar::Builder::new(Hashing::new(gzip));
        let mut file = File::open(executable)?;
        for (number, character) in EXECUTABLE_PATH.char_indices() {
            if character == '/' {
                let mut header = tar::Header::new_gnu();
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(0o755);
                header.set_size(0);
                tar.append_data(&mut header, &EXECUTABLE_PATH[..=number], io::empty())?;
            }
        }
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(file.metadata()?.len());
        tar.append_data(&mut header, EXECUTABLE_PATH, &mut file)?;
        let hashed_tar = tar.into_inner()?;
        let diff_id = hashed_tar.digest();
        let hashed_file = hashed_tar.inner.finish()?;
        let (digest, size_bytes) = (hashed_file.digest(), hashed_file.count);
        let path = folder.join(digest.replace(':', "-"));
        for entry in std::fs::read_dir(folder)? {
            let old = entry?.path();
            if old != temporary && old != path {
                std::fs::remove_file(old)?;
            }
        }
        std::fs::rename(&temporary, &path)?;
        Ok(Self {
            layer: Layer {
                path,
                digest,
                diff_id,
                size_bytes,
            },
        })
    }

    /// The shared layer.
    #[must_use]
    pub fn layer(&self) -> &Layer {
        &self.layer
    }

    /// Configuration of the image called `reference`.
    #[must_use]
    pub fn config(&self, reference: &str) -> Blob {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Entrypoint": [format!("/{EXECUTABLE_PATH}")],
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "WorkingDir": "/app",
                "Labels": {"chutes.image": reference},
            },
            "rootfs": {"type": "layers", "diff_ids": [self.layer.diff_id]},
            "history": [{"created_by": "validator stand-in"}],
        });
        Blob::new(config.to_string().into_bytes())
    }

    /// Manifest of the image called `reference`.
    #[must_use]
    pub fn manifest(&self, reference: &str) -> Blob {
        let config = self.config(reference);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.bytes.len()},
            "layers": [
                {"mediaType": LAYER_TYPE, "digest": self.layer.digest, "size": self.layer.size_bytes},
            ],
        });
        Blob::new(manifest.to_string().into_bytes())
    }
}

/// Hashes and counts what is written through it.
#[derive(Debug)]
struct Hashing<W> {
    inner: W,
    hash: Sha256,
    count: u64,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            count: 0,
        }
    }

    fn digest(&self) -> String {
        format!("sha256:{}", hex::encode(self.hash.clone().finalize()))
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.count += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Reads the digest of a file.
///
/// # Errors
/// Those of reading.
pub fn digest_of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(format!("sha256:{}", hex::encode(hash.finalize()))),
            length => hash.update(&buffer[..length]),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    #[test]
    fn digests_are_those_of_the_bytes_and_builds_repeat() {
        let folder = tempfile::tempdir().expect("a folder");
        let executable = folder.path().join("program");
        std::fs::write(&executable, b"#!/bin/sh\necho hello\n").expect("written");
        let images = Images::build(&executable, &folder.path().join("one")).expect("built");
        let layer = images.layer();
        assert_eq!(digest_of_file(&layer.path).expect("read"), layer.digest);
        let packed = File::open(&layer.path).expect("there");
        assert_eq!(packed.metadata().expect("there").len(), layer.size_bytes);
        let mut unpacked = vec![];
        flate2::read::GzDecoder::new(packed)
            .read_to_end(&mut unpacked)
            .expect("gzip");
        assert_eq!(
            format!("sha256:{}", hex::encode(Sha256::digest(&unpacked))),
            layer.diff_id
        );
        let mut archive = tar::Archive::new(&unpacked[..]);
        let entries: Vec<(String, u32)> = archive
            .entries()
            .expect("a tar")
            .map(|entry| {
                let entry = entry.expect("an entry");
                let path = entry.path().expect("a path").display().to_string();
                (path, entry.header().mode().expect("a mode"))
            })
            .collect();
        assert_eq!(
            entries.last().map(|(path, mode)| (path.as_str(), *mode)),
            Some((EXECUTABLE_PATH, 0o755))
        );
        let manifest: Value = serde_json::from_slice(&images.manifest("a/b:1").bytes).expect("JSON");
        assert_eq!(manifest["config"]["digest"], images.config("a/b:1").digest);
        assert_ne!(images.manifest("a/b:1").digest, images.manifest("a/b:2").digest);
        let again = Images::build(&executable, &folder.path().join("two")).expect("built");
        assert_eq!(again.layer().digest, layer.digest);
    }
}
