//! Using certificates: TLS settings of both sides, and what a certificate says of its owner.

use std::path::Path;
use std::sync::Arc;

use protocol::id::ServerId;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha256};

use super::{CA_CERTIFICATE, HOST_CERTIFICATE, HOST_KEY, IdentityError, Result, read_text, tls_error};

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(authorities: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(authority.clone()).map_err(|error| tls_error(&error))?;
    }
    Ok(Arc::new(roots))
}

/// All certificates of a file, one at least.
fn certificates(folder: &Path, name: &str) -> Result<Vec<CertificateDer<'static>>> {
    let (path, what) = (folder.join(name), "certificate");
    let text = read_text(&path)?;
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let found = found.ok().filter(|found| !found.is_empty());
    found.ok_or(IdentityError::Malformed { path, what })
}

/// A certificate with its key, and the authorities that both ends trust: one, or two while the cluster changes over
/// from one to the other.
#[derive(Debug)]
pub struct Identity {
    /// The newest one last.
    authorities: Vec<CertificateDer<'static>>,
    /// Ours, and behind it what leads from the newest authority back to the one before.
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    /// Reads a host's identity from its folder.
    ///
    /// # Errors
    /// [`IdentityError`] naming the file.
    pub fn of_host(folder: &Path) -> Result<Self> {
        let (path, what) = (folder.join(HOST_KEY), "private key");
        let key = PrivateKeyDer::from_pem_slice(read_text(&path)?.as_bytes());
        Ok(Self {
            authorities: certificates(folder, CA_CERTIFICATE)?,
            chain: certificates(folder, HOST_CERTIFICATE)?,
            key: key.map_err(|_| IdentityError::Malformed { path, what })?,
        })
    }

    /// Fingerprints of the authorities that it trusts; the last one has signed its certificate.
    #[must_use]
    pub fn trusted(&self) -> Vec<[u8; 32]> {
        let hash = |authority: &CertificateDer<'_>| Sha256::digest(authority).into();
        self.authorities.iter().map(hash).collect()
    }

    /// TLS of the QUIC door. Whoever shows a certificate must have it from our authority; who shows none gets as
    /// far as the protocols that need none. The authorities' certificates are sent along, for those who know only a
    /// fingerprint.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quic_server(&self, protocols: &[&[u8]]) -> Result<QuicServerConfig> {
        let roots = roots(&self.authorities)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
            .allow_unauthenticated()
            .build()
            .map_err(|error| tls_error(&error))?;
        let chain = [&self.chain[..], &self.authorities].concat();
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| tls_error(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, self.key.clone_key())
            .map_err(|error| tls_error(&error))?;
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        QuicServerConfig::try_from(config).map_err(|error| tls_error(&error))
    }

    /// TLS of a QUIC connection to a member.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quic_client(&self, protocol: &[u8]) -> Result<QuicClientConfig> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| tls_error(&error))?
            .with_root_certificates(roots(&self.authorities)?)
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| tls_error(&error))?;
        config.alpn_protocols = vec![protocol.to_vec()];
        QuicClientConfig::try_from(config).map_err(|error| tls_error(&error))
    }

    /// What our own certificate says.
    ///
    /// # Errors
    /// [`IdentityError::Unusable`].
    pub fn bearer(&self) -> Result<Bearer> {
        Bearer::of(&self.chain[0])
    }
}

/// Whom a certificate names, once TLS has found that our authority made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bearer {
    /// The host.
    pub server: ServerId,
    /// Its member id, if it is one.
    pub member: Option<u64>,
    /// SHA-256 of its `SubjectPublicKeyInfo`: what the state knows it by.
    pub key_hash: [u8; 32],
    /// The key itself: a point of P-256.
    pub public_key: Vec<u8>,
}

impl Bearer {
    /// Reads a certificate.
    ///
    /// # Errors
    /// [`IdentityError::Unusable`] when it is none of ours.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self> {
        let foreign = || IdentityError::Unusable("certificate of a host");
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|_| foreign())?;
        let key = ParsedCertificate::try_from(certificate).map_err(|_| foreign())?;
        let key_info = key.subject_public_key_info();
        // All our keys are uncompressed points of P-256, which stand at the end.
        let public_key = key_info.last_chunk::<65>().ok_or_else(foreign)?.to_vec();
        let (mut server, mut member) = (None, None);
        for name in parsed.valid_dns_names() {
            if name == super::COORDINATOR_NAME {
                continue;
            }
            let number = name
                .strip_prefix("member-")
                .and_then(|rest| rest.strip_suffix(".chutes.internal"));
            if let Some(number) = number {
                member = Some(number.parse().map_err(|_| foreign())?);
            } else {
                server = Some(ServerId::parse(name).map_err(|_| foreign())?);
            }
        }
        Ok(Self {
            server: server.ok_or_else(foreign)?,
            member,
            key_hash: Sha256::digest(key_info).into(),
            public_key,
        })
    }

    /// What the other end of a connection showed; none if it showed no certificate.
    ///
    /// # Errors
    /// [`IdentityError::Unusable`].
    pub fn of_peer(connection: &quinn::Connection) -> Result<Option<Self>> {
        let chain = connection
            .peer_identity()
            .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
        chain
            .and_then(|chain| chain.first().cloned())
            .map(|certificate| Self::of(&certificate))
            .transpose()
    }
}

/// Trusts a member whose chain ends in an authority with one of the given fingerprints: all that an invited host
/// knows of the cluster. The authority that was shown is kept for later.
#[derive(Debug)]
pub struct JoinVerifier {
    fingerprints: Vec<[u8; 32]>,
}

impl JoinVerifier {
    /// TLS of the connection of an invited host, which has no certificate yet.
    ///
    /// # Errors
    /// [`IdentityError::Tls`].
    pub fn quic_client(fingerprints: Vec<[u8; 32]>, protocol: &[u8]) -> Result<QuicClientConfig> {
        let mut config = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| tls_error(&error))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Self { fingerprints }))
            .with_no_client_auth();
        config.alpn_protocols = vec![protocol.to_vec()];
        QuicClientConfig::try_from(config).map_err(|error| tls_error(&error))
    }
}

impl ServerCertVerifier for JoinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        let refused = |reason: &str| rustls::Error::General(reason.to_owned());
        let is_known = |certificate: &&CertificateDer<'_>| {
            let hash: [u8; 32] = Sha256::digest(certificate).into();
            self.fingerprints.contains(&hash)
        };
        let known = intermediates.iter().filter(is_known);
        let known: Vec<CertificateDer<'static>> = known.map(|it| it.clone().into_owned()).collect();
        if known.is_empty() {
            return Err(refused(
                "this member belongs to another cluster than the invitation",
            ));
        }
        let roots = roots(&known).map_err(|error| refused(&error.to_string()))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .map_err(|error| refused(&error.to_string()))?;
        verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, &algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = provider().signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Authority, CA_KEY, HostKey, Names};
    use super::*;
    use protocol::time::UnixMillis;

    const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

    fn names(member: Option<u64>) -> Names {
        Names {
            server: ServerId::parse("server-1").unwrap(),
            member,
        }
    }

    fn issued(authority: &Authority, folder: &Path, member: Option<u64>) -> Identity {
        let key = HostKey::open_or_make(folder).unwrap();
        let certificate = authority.issue(&names(member), &key.public(), NOW).unwrap();
        std::fs::write(folder.join(HOST_CERTIFICATE), certificate).unwrap();
        std::fs::write(folder.join(CA_CERTIFICATE), authority.certificate_pem()).unwrap();
        Identity::of_host(folder).unwrap()
    }

    #[test]
    fn a_certificate_says_what_its_owner_is() {
        let (founder, host) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let authority = Authority::found(founder.path()).unwrap();
        for member in [None, Some(7)] {
            let identity = issued(&authority, host.path(), member);
            let bearer = identity.bearer().unwrap();
            let key = HostKey::open_or_make(host.path()).unwrap();
            assert_eq!(bearer.server, names(member).server);
            assert_eq!(bearer.member, member);
            assert_eq!(
                bearer.key_hash,
                super::super::authority::key_hash(&key.public()),
                "the hash that a request is recorded under"
            );
            identity.quic_client(b"test").unwrap();
            identity.quic_server(&[b"test"]).unwrap();
        }
    }

    #[test]
    fn an_authority_is_found_once_and_read_back_from_its_texts() {
        let folder = tempfile::tempdir().unwrap();
        let first = Authority::found(folder.path())
            .unwrap()
            .certificate_pem()
            .to_owned();
        let again = Authority::found(folder.path()).unwrap();
        assert_eq!(again.certificate_pem(), first);
        let key = read_text(&folder.path().join(CA_KEY)).unwrap();
        let unsealed = Authority::from_pem(first, &key).unwrap();
        let error = unsealed
            .issue(&names(None), b"short", NOW)
            .unwrap_err()
            .to_string();
        assert!(error.contains("public key"), "{error}");
        issued(&unsealed, folder.path(), None);
    }

    /// What a chain of certificates is worth to somebody who trusts these authorities.
    fn is_trusted(shown: &Identity, authorities: &Identity) -> bool {
        let roots = roots(&authorities.authorities).unwrap();
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider())
            .build()
            .unwrap();
        let name = ServerName::try_from("server-1").unwrap();
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_millis(NOW.0));
        verifier
            .verify_server_cert(&shown.chain[0], &shown.chain[1..], &name, &[], now)
            .is_ok()
    }

    #[test]
    fn whoever_knows_only_the_old_authority_follows_the_bridge_to_the_new_one() {
        let folders = [(); 4].map(|()| tempfile::tempdir().unwrap());
        let [founder, old, new, late] = folders.each_ref().map(tempfile::TempDir::path);
        let first = Authority::found(founder).unwrap();
        let (next, next_key) = Authority::make().unwrap();
        let bridge = first.bridge_to(&next).unwrap();
        let next = Authority::from_pem(next.certificate_pem().to_owned(), &next_key).unwrap();

        let before = issued(&first, old, Some(1));
        issued(&next, new, Some(1));
        let certificate = read_text(&new.join(HOST_CERTIFICATE)).unwrap();
        let both = format!("{}{}", first.certificate_pem(), next.certificate_pem());
        std::fs::write(new.join(HOST_CERTIFICATE), format!("{certificate}{bridge}")).unwrap();
        std::fs::write(new.join(CA_CERTIFICATE), both).unwrap();
        let during = Identity::of_host(new).unwrap();
        assert_eq!(during.trusted().len(), 2);
        assert_eq!(during.trusted()[0], before.trusted()[0]);
        assert_eq!(
            during.bearer().unwrap().member,
            Some(1),
            "the bridge is not taken for ours"
        );
        let after = issued(&next, late, Some(1));
        assert_eq!(after.trusted(), during.trusted()[1..]);

        assert!(is_trusted(&during, &before), "by the bridge");
        assert!(is_trusted(&before, &during));
        assert!(is_trusted(&during, &after));
        assert!(is_trusted(&after, &during));
        assert!(!is_trusted(&before, &after), "the old one is dropped");
        assert!(!is_trusted(&after, &before), "there is no bridge");
        during.quic_client(b"test").unwrap();
        during.quic_server(&[b"test"]).unwrap();
    }

    #[test]
    fn a_missing_or_broken_file_is_named() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(HOST_KEY), "nonsense").unwrap();
        let error = Identity::of_host(folder.path()).unwrap_err().to_string();
        assert!(error.contains("ca.pem"), "{error}");
        std::fs::write(folder.path().join(CA_CERTIFICATE), "nonsense").unwrap();
        let error = Identity::of_host(folder.path()).unwrap_err().to_string();
        assert!(error.contains("ca.pem holds no usable certificate"), "{error}");
        let error = HostKey::open_or_make(folder.path()).unwrap_err().to_string();
        assert!(error.contains("host.key holds no usable private key"), "{error}");
    }
}
