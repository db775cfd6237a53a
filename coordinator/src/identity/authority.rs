//! Making keys and certificates.

use std::path::Path;
use std::time::Duration;

use protocol::id::ServerId;
use protocol::time::UnixMillis;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SignatureAlgorithm, date_time_ymd,
};
use sha2::{Digest, Sha256};

use super::{CA_CERTIFICATE, CA_KEY, COORDINATOR_NAME, HOST_KEY, IdentityError, Result};
use super::{read_text, write_secret};

/// How long a certificate is good, in ms: 90 days. It is renewed when a third is left.
pub const LIFE_MS: u64 = 90 * DAY_MS;
const DAY_MS: u64 = 24 * 60 * 60_000;

/// Whom a certificate names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// The host's id, which must therefore be a valid DNS name.
    pub server: ServerId,
    /// The member's id, if it is one.
    pub member: Option<u64>,
}

impl Names {
    fn list(&self) -> Vec<String> {
        let mut names = vec![self.server.to_string()];
        if let Some(member) = self.member {
            names.extend([replica::quic::server_name(member), COORDINATOR_NAME.to_owned()]);
        }
        names
    }
}

/// A host's own key.
#[derive(Debug)]
pub struct HostKey(KeyPair);

impl HostKey {
    /// Reads the key of a folder, or makes one there.
    ///
    /// # Errors
    /// [`IdentityError`] naming the file.
    pub fn open_or_make(folder: &Path) -> Result<Self> {
        let path = folder.join(HOST_KEY);
        if !path.exists() {
            let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
            write_secret(&path, &key.serialize_pem())?;
        }
        let what = "private key";
        let key = KeyPair::from_pem(&read_text(&path)?);
        Ok(Self(key.map_err(|_| IdentityError::Malformed { path, what })?))
    }

    /// The public half as certificates and requests carry it: a point of P-256.
    #[must_use]
    pub fn public(&self) -> Vec<u8> {
        self.0.public_key_raw().to_vec()
    }
}

/// A public key of P-256 that is somebody else's.
struct PublicKey<'a>(&'a [u8]);

impl PublicKeyData for PublicKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// The hash under which the state knows a public key: SHA-256 of its `SubjectPublicKeyInfo`.
#[must_use]
pub fn key_hash(public_key: &[u8]) -> [u8; 32] {
    Sha256::digest(PublicKey(public_key).subject_public_key_info()).into()
}

/// The cluster's authority.
#[derive(Debug)]
pub struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// Makes one, and leaves its files in the founder's folder. What is there already is kept.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn found(folder: &Path) -> Result<Self> {
        let (certificate, key) = (folder.join(CA_CERTIFICATE), folder.join(CA_KEY));
        if !certificate.exists() {
            let (made, key_pem) = Self::make()?;
            write_secret(&key, &key_pem)?;
            write_secret(&certificate, &made.certificate_pem)?;
        }
        Self::from_pem(read_text(&certificate)?, &read_text(&key)?)
    }

    /// Makes one, with its private key as PEM.
    ///
    /// # Errors
    /// [`IdentityError::Make`].
    pub fn make() -> Result<(Self, String)> {
        let pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let (certificate_pem, key_pem) = (parameters().self_signed(&pair)?.pem(), pair.serialize_pem());
        let issuer = Issuer::new(parameters(), pair);
        let made = Self {
            certificate_pem,
            issuer,
        };
        Ok((made, key_pem))
    }

    /// A certificate for the key of the authority that comes after this one: sent behind a certificate of that one,
    /// it leads those that know only this one to it.
    ///
    /// # Errors
    /// [`IdentityError::Make`].
    pub fn bridge_to(&self, next: &Self) -> Result<String> {
        let key = PublicKey(next.issuer.key().public_key_raw());
        Ok(parameters().signed_by(&key, &self.issuer)?.pem())
    }

    /// The authority that the state holds.
    ///
    /// # Errors
    /// [`IdentityError::Unusable`].
    pub fn from_pem(certificate_pem: String, key_pem: &str) -> Result<Self> {
        let key = KeyPair::from_pem(key_pem).map_err(|_| IdentityError::Unusable("key of the authority"))?;
        Ok(Self {
            certificate_pem,
            // Only the name matters to what is signed with it.
            issuer: Issuer::new(parameters(), key),
        })
    }

    /// Its certificate.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Signs a certificate for a public key (a point of P-256, uncompressed), good from a day before `now`,
    /// since clocks differ, and for [`LIFE_MS`].
    ///
    /// # Errors
    /// [`IdentityError::Unusable`] when the key is none; [`IdentityError::Make`].
    pub fn issue(&self, names: &Names, public_key: &[u8], now: UnixMillis) -> Result<String> {
        if public_key.len() != 65 || public_key[0] != 4 {
            return Err(IdentityError::Unusable("public key of P-256"));
        }
        let mut parameters = CertificateParams::new(names.list())?;
        parameters.distinguished_name = named(names.server.as_str());
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let at = |ms: u64| date_time_ymd(1970, 1, 1) + Duration::from_millis(ms);
        parameters.not_before = at(now.0.saturating_sub(DAY_MS));
        parameters.not_after = at(now.0 + LIFE_MS);
        Ok(parameters.signed_by(&PublicKey(public_key), &self.issuer)?.pem())
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn parameters() -> CertificateParams {
    let mut parameters = CertificateParams::default();
    parameters.distinguished_name = named("chutes miner cluster");
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    parameters
}
