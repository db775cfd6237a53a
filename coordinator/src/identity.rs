//! Who is who inside the cluster: a certificate authority of our own, and certificates for members and
//! hosts.
//!
//! The private keys lie in files of mode 0600 beside the data of those they belong to. A certificate's name
//! is the server's id, which must therefore be a valid DNS name.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::id::ServerId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The name under which every coordinator member answers hosts.
pub const COORDINATOR_NAME: &str = "coordinator.chutes.internal";
/// File with the authority's certificate.
pub const CA_CERTIFICATE: &str = "ca.pem";
/// File with the authority's private key; on members only.
pub const CA_KEY: &str = "ca.key";
/// File with a host's certificate.
pub const HOST_CERTIFICATE: &str = "host.pem";
/// File with a host's private key.
pub const HOST_KEY: &str = "host.key";

/// Why a certificate cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file is missing or unreadable.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path} holds no usable {what}")]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What was expected.
        what: &'static str,
    },
    /// Certificates could not be made.
    #[error("make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS refuses the certificate or its key.
    #[error("TLS: {0}")]
    Tls(String),
}

type Result<T> = std::result::Result<T, IdentityError>;

/// A certificate with its key, and the authority that both ends trust.
#[derive(Debug)]
pub struct Identity {
    authority: CertificateDer<'static>,
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads a host's identity from its folder.
    ///
    /// # Errors
    /// [`IdentityError`] naming the file.
    pub fn of_host(folder: &Path) -> Result<Self> {
        Self::read(
            &folder.join(CA_CERTIFICATE),
            &folder.join(HOST_CERTIFICATE),
            &folder.join(HOST_KEY),
        )
    }

    fn read(authority: &Path, certificate: &Path, key: &Path) -> Result<Self> {
        Ok(Self {
            authority: read_certificate(authority)?,
            certificate: read_certificate(certificate)?,
            key: PrivateKeyDer::from_pem_slice(&read(key)?).map_err(|_| IdentityError::Malformed {
                path: key.to_owned(),
                what: "private key",
            })?,
        })
    }

    fn roots(&self) -> Result<Arc<RootCertStore>> {
        let mut roots = RootCertStore::empty();
        roots
            .add(self.authority.clone())
            .map_err(|error| IdentityError::Tls(error.to_string()))?;
        Ok(Arc::new(roots))
    }

    /// TLS of a QUIC door that only lets holders of a certificate of this cluster in.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quic_server(&self, alpn: &[u8]) -> Result<QuicServerConfig> {
        let tls = |error: &dyn std::fmt::Display| IdentityError::Tls(error.to_string());
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(self.roots()?, provider())
            .build()
            .map_err(|error| tls(&error))?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| tls(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(|error| tls(&error))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        QuicServerConfig::try_from(config).map_err(|error| tls(&error))
    }

    /// TLS of a QUIC connection to a member.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quic_client(&self, alpn: &[u8]) -> Result<QuicClientConfig> {
        let tls = |error: &dyn std::fmt::Display| IdentityError::Tls(error.to_string());
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| tls(&error))?
            .with_root_certificates(self.roots()?)
            .with_client_auth_cert(vec![self.certificate.clone()], self.key.clone_key())
            .map_err(|error| tls(&error))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        QuicClientConfig::try_from(config).map_err(|error| tls(&error))
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// The cluster's certificate authority, in a member's folder.
#[derive(Debug)]
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Reads the authority of a folder, or founds it there.
    ///
    /// # Errors
    /// [`IdentityError`] naming the file.
    pub fn open_or_found(folder: &Path) -> Result<Self> {
        let (certificate, key) = (folder.join(CA_CERTIFICATE), folder.join(CA_KEY));
        if !certificate.exists() && !key.exists() {
            let (certificate_pem, key_pem) = found()?;
            write_secret(&key, &key_pem)?;
            write_secret(&certificate, &certificate_pem)?;
        }
        let certificate_pem = read_text(&certificate)?;
        let key_pair = KeyPair::from_pem(&read_text(&key)?).map_err(|_| IdentityError::Malformed {
            path: key,
            what: "private key",
        })?;
        // What was read is trusted as it is; only the name matters to what is signed with it.
        let issuer = Issuer::new(authority_parameters(), key_pair);
        Ok(Self {
            certificate_pem,
            issuer,
        })
    }

    /// Makes a host's certificate and writes it, with its key and the authority's certificate, into `folder`.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn issue_host(&self, server: &ServerId, folder: &Path) -> Result<()> {
        let (certificate, key) = self.issue(server.as_str())?;
        write_secret(&folder.join(HOST_KEY), &key)?;
        write_secret(&folder.join(HOST_CERTIFICATE), &certificate)?;
        write_secret(&folder.join(CA_CERTIFICATE), &self.certificate_pem)
    }

    /// A fresh identity for a coordinator member.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn member(&self) -> Result<Identity> {
        let unusable = |_| IdentityError::Tls("a certificate made just now does not parse".to_owned());
        let (certificate, key) = self.issue(COORDINATOR_NAME)?;
        Ok(Identity {
            authority: CertificateDer::from_pem_slice(self.certificate_pem.as_bytes()).map_err(unusable)?,
            certificate: CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(unusable)?,
            key: PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(unusable)?,
        })
    }

    fn issue(&self, name: &str) -> Result<(String, String)> {
        let mut parameters = CertificateParams::new(vec![name.to_owned()])?;
        parameters.distinguished_name = named(name);
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn authority_parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named("chutes miner cluster");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters
}

fn found() -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let certificate = authority_parameters().self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })
}

fn read_text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|source| IdentityError::File {
        path: path.to_owned(),
        source,
    })
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>> {
    CertificateDer::from_pem_slice(&read(path)?).map_err(|_| IdentityError::Malformed {
        path: path.to_owned(),
        what: "certificate",
    })
}

/// Writes a file of mode 0600 so that a crash leaves the old one or the new one.
fn write_secret(path: &Path, text: &str) -> Result<()> {
    let failed = |source| IdentityError::File {
        path: path.to_owned(),
        source,
    };
    let temporary = path.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failed)?;
    file.write_all(text.as_bytes())
        .and_then(|()| file.sync_all())
        .map_err(failed)?;
    std::fs::rename(&temporary, path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_authority_survives_a_restart_and_its_certificates_work() {
        let folder = tempfile::tempdir().unwrap();
        let host = tempfile::tempdir().unwrap();
        Authority::open_or_found(folder.path()).unwrap();
        let authority = Authority::open_or_found(folder.path()).unwrap();
        authority
            .issue_host(&ServerId::parse("server-1").unwrap(), host.path())
            .unwrap();
        let identity = Identity::of_host(host.path()).unwrap();
        identity.quic_client(b"test").unwrap();
        authority.member().unwrap().quic_server(b"test").unwrap();
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Identity::of_host(folder.path()).unwrap_err().to_string();
        assert!(error.contains("ca.pem"), "{error}");
        std::fs::write(folder.path().join(CA_CERTIFICATE), "nonsense").unwrap();
        let error = Identity::of_host(folder.path()).unwrap_err().to_string();
        assert!(error.contains("ca.pem holds no usable certificate"), "{error}");
    }
}
