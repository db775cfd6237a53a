//! Request paths of the registry door, parsed once into a checked value. Pure.
//!
//! Only reads of the OCI distribution API pass: the base, manifests, blobs, tag lists and referrers. Since
//! the grammar names every allowed character, tricks (`..`, `%2e`, `//`, NUL, encoded slashes) have no way
//! in: what is forwarded is written anew from the checked parts, never the bytes that the client sent.

use std::fmt;

/// The longest repository name, in bytes (distribution specification: host and name within 255).
pub const NAME_BYTES_MAX: usize = 255;
/// The longest path that is looked at, in bytes.
pub const PATH_BYTES_MAX: usize = 1024;
const QUERY_BYTES_MAX: usize = 512;

/// Hash function of a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Algorithm {
    /// 64 hexadecimal digits.
    Sha256,
    /// 128 hexadecimal digits.
    Sha512,
}

impl Algorithm {
    /// The name in front of the colon.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }
}

/// The digest of a blob or manifest, in lower-case hexadecimal: safe as a file name.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest {
    algorithm: Algorithm,
    hex: String,
}

impl Digest {
    /// Checks a digest such as `sha256:0123...`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (algorithm, hex) = text.split_once(':')?;
        let (algorithm, digits) = match algorithm {
            "sha256" => (Algorithm::Sha256, 64),
            "sha512" => (Algorithm::Sha512, 128),
            _ => return None,
        };
        let fits = hex.len() == digits && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        fits.then(|| Self {
            algorithm,
            hex: hex.to_owned(),
        })
    }

    /// The hash function.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// The hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.hex
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.algorithm.as_str(), self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What a manifest is asked for by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reference {
    /// A tag: the upstream says what it stands for.
    Tag(String),
    /// A digest: we can check what comes.
    Digest(Digest),
}

/// A checked request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// `/v2/`: is this a registry?
    Base,
    /// A manifest.
    Manifest {
        /// Repository.
        name: String,
        /// Tag or digest.
        reference: Reference,
    },
    /// A blob.
    Blob {
        /// Repository.
        name: String,
        /// What it must hash to.
        digest: Digest,
    },
    /// The list of tags.
    Tags {
        /// Repository.
        name: String,
        /// Paging, as sent.
        query: Option<String>,
    },
    /// Manifests that refer to a digest.
    Referrers {
        /// Repository.
        name: String,
        /// What they refer to.
        digest: Digest,
        /// Filter, as sent.
        query: Option<String>,
    },
}

/// Why a path is refused. The code is the distribution specification's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Not a path of the distribution API that we serve.
    #[error("only reads under /v2/ are served here")]
    NotServed,
    /// The repository name breaks the grammar.
    #[error("the repository name is not valid")]
    Name,
    /// Neither a tag nor a digest.
    #[error("the manifest reference is neither a tag nor a sha256 or sha512 digest")]
    Reference,
    /// Not a digest.
    #[error("the digest is not sha256 or sha512 with lower-case hexadecimal digits")]
    Digest,
    /// Too long, or characters that no request needs.
    #[error("the path or query is too long or has characters that no pull needs")]
    Malformed,
}

impl Refusal {
    /// The `code` of the error body.
    #[must_use]
    pub fn code(self) -> &'static str {
        match self {
            Self::NotServed => "UNSUPPORTED",
            Self::Name | Self::Malformed => "NAME_INVALID",
            Self::Reference => "MANIFEST_INVALID",
            Self::Digest => "DIGEST_INVALID",
        }
    }
}

impl Request {
    /// Parses the path and query of a request in origin form.
    ///
    /// # Errors
    /// [`Refusal`], for everything that is not exactly a read of the distribution API.
    pub fn parse(path: &str, query: Option<&str>) -> Result<Self, Refusal> {
        if path.len() > PATH_BYTES_MAX || query.is_some_and(|query| !query_is_plain(query)) {
            return Err(Refusal::Malformed);
        }
        let Some(rest) = path.strip_prefix("/v2") else {
            return Err(Refusal::NotServed);
        };
        if rest.is_empty() || rest == "/" {
            return Ok(Self::Base);
        }
        let rest = rest.strip_prefix('/').ok_or(Refusal::NotServed)?;
        let query = || query.map(ToOwned::to_owned);
        if let Some(name) = rest.strip_suffix("/tags/list") {
            return Ok(Self::Tags {
                name: checked_name(name)?,
                query: query(),
            });
        }
        let (front, last) = rest.rsplit_once('/').ok_or(Refusal::NotServed)?;
        let (name, kind) = front.rsplit_once('/').ok_or(Refusal::NotServed)?;
        let digest = || Digest::parse(last).ok_or(Refusal::Digest);
        match kind {
            "manifests" => {
                let name = checked_name(name)?;
                let reference = match Digest::parse(last) {
                    Some(digest) => Reference::Digest(digest),
                    None if tag_is_valid(last) => Reference::Tag(last.to_owned()),
                    None => return Err(Refusal::Reference),
                };
                Ok(Self::Manifest { name, reference })
            }
            "blobs" => Ok(Self::Blob {
                name: checked_name(name)?,
                digest: digest()?,
            }),
            "referrers" => Ok(Self::Referrers {
                name: checked_name(name)?,
                digest: digest()?,
                query: query(),
            }),
            _ => Err(Refusal::NotServed),
        }
    }

    /// Path and query for the upstream, written from the checked parts. The query of manifests and blobs is
    /// dropped: containerd's `?ns=` is for mirrors and means nothing to the registry itself.
    #[must_use]
    pub fn upstream_path(&self) -> String {
        let with_query = |path: String, query: &Option<String>| match query {
            Some(query) if !query.is_empty() => format!("{path}?{query}"),
            _ => path,
        };
        match self {
            Self::Base => "/v2/".to_owned(),
            Self::Manifest {
                name,
                reference: Reference::Tag(tag),
            } => format!("/v2/{name}/manifests/{tag}"),
            Self::Manifest {
                name,
                reference: Reference::Digest(digest),
            } => {
                format!("/v2/{name}/manifests/{digest}")
            }
            Self::Blob { name, digest } => format!("/v2/{name}/blobs/{digest}"),
            Self::Tags { name, query } => with_query(format!("/v2/{name}/tags/list"), query),
            Self::Referrers { name, digest, query } => {
                with_query(format!("/v2/{name}/referrers/{digest}"), query)
            }
        }
    }
}

fn query_is_plain(query: &str) -> bool {
    let allowed = |b: u8| {
        b.is_ascii_alphanumeric()
            || matches!(
                b,
                b'=' | b'&' | b'-' | b'_' | b'.' | b'~' | b'%' | b'+' | b':' | b'/'
            )
    };
    query.len() <= QUERY_BYTES_MAX && query.bytes().all(allowed)
}

fn checked_name(name: &str) -> Result<String, Refusal> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.split('/').all(component_is_valid) {
        return Err(Refusal::Name);
    }
    Ok(name.to_owned())
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`, the grammar of one component of a name.
fn component_is_valid(component: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends_well = |end: Option<&u8>| end.is_some_and(|b| alphanumeric(*b));
    if !ends_well(bytes.first()) || !ends_well(bytes.last()) {
        return false;
    }
    let separators = bytes.split(|b| alphanumeric(*b)).filter(|run| !run.is_empty());
    separators
        .into_iter()
        .all(|run| matches!(run, b"." | b"_" | b"__") || run.iter().all(|b| *b == b'-'))
}

fn tag_is_valid(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= 128 && bytes.next().is_some_and(word) && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn check(path: &str, query: Option<&str>, expected: Result<&str, Refusal>) {
        let parsed = Request::parse(path, query).map(|request| request.upstream_path());
        assert_eq!(
            parsed.as_deref().map_err(|refusal| *refusal),
            expected,
            "{path:?} {query:?}"
        );
    }

    #[test]
    fn reads_pass_and_are_written_anew() {
        for path in ["/v2/", "/v2"] {
            check(path, None, Ok("/v2/"));
        }
        for path in [
            "/v2/a/manifests/latest".to_owned(),
            "/v2/user/vllm_0.8-x/manifests/v1.2_3-patch".to_owned(),
            format!("/v2/user/name/manifests/sha256:{HEX}"),
            format!("/v2/a/b/c/blobs/sha256:{HEX}"),
            format!("/v2/a/blobs/sha512:{HEX}{HEX}"),
            "/v2/user/name/tags/list".to_owned(),
            format!("/v2/a/referrers/sha256:{HEX}"),
            "/v2/manifests/manifests/manifests".to_owned(),
            "/v2/a__b--c.d/manifests/x".to_owned(),
        ] {
            check(&path, None, Ok(&path));
        }
        check(
            "/v2/a/tags/list",
            Some("n=10&last=x"),
            Ok("/v2/a/tags/list?n=10&last=x"),
        );
        check(
            "/v2/a/manifests/x",
            Some("ns=registry.example"),
            Ok("/v2/a/manifests/x"),
        );
    }

    #[test]
    fn tricks_are_refused() {
        let blob = |name: &str, digest: &str| format!("/v2/{name}/blobs/{digest}");
        let good = format!("sha256:{HEX}");
        for (path, refusal) in [
            ("/".to_owned(), Refusal::NotServed),
            (String::new(), Refusal::NotServed),
            ("*".to_owned(), Refusal::NotServed),
            ("/v1/".to_owned(), Refusal::NotServed),
            ("/v2x".to_owned(), Refusal::NotServed),
            ("/v2/_catalog".to_owned(), Refusal::NotServed),
            ("/v2/a/blobs/uploads/".to_owned(), Refusal::NotServed),
            ("//v2/a/manifests/x".to_owned(), Refusal::NotServed),
            ("/v2//a/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a//manifests/x".to_owned(), Refusal::Name),
            ("/v2/../v2/a/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a/../b/manifests/x".to_owned(), Refusal::Name),
            ("/v2/%2e%2e/a/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a%2fb/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a/manifests/..".to_owned(), Refusal::Reference),
            ("/v2/a/manifests/.x".to_owned(), Refusal::Reference),
            ("/v2/a/manifests/x%00".to_owned(), Refusal::Reference),
            ("/v2/a/manifests/x\0".to_owned(), Refusal::Reference),
            ("/v2/a/manifests/".to_owned(), Refusal::Reference),
            (format!("/v2/a/manifests/{}", "x".repeat(129)), Refusal::Reference),
            ("/v2/A/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a_/manifests/x".to_owned(), Refusal::Name),
            ("/v2/-a/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a..b/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a___b/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a._b/manifests/x".to_owned(), Refusal::Name),
            ("/v2/a\\b/manifests/x".to_owned(), Refusal::Name),
            ("/v2/ü/manifests/x".to_owned(), Refusal::Name),
            ("/v2/manifests/x".to_owned(), Refusal::NotServed),
            (format!("/v2/{}/manifests/x", "a".repeat(256)), Refusal::Name),
            (
                format!("/v2/{}/manifests/x", "a".repeat(2000)),
                Refusal::Malformed,
            ),
            (blob("a", "latest"), Refusal::Digest),
            (blob("a", &good.to_uppercase()), Refusal::Digest),
            (blob("a", &good[..70]), Refusal::Digest),
            (blob("a", &format!("md5:{HEX}")), Refusal::Digest),
            (blob("a", &format!("sha256:../{}", &HEX[3..])), Refusal::NotServed),
            (blob("a", &format!("sha512:{HEX}")), Refusal::Digest),
        ] {
            check(&path, None, Err(refusal));
        }
        for query in ["a b", "x\r\nHost: y", "<", &"q".repeat(513)] {
            check("/v2/a/tags/list", Some(query), Err(Refusal::Malformed));
        }
    }
}
