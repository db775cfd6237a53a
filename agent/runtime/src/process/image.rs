//! The documents of an image, as registries serve them (pure): reference, index, manifest, configuration.
//! Docker's and OCI's forms have the same members.

use serde::Deserialize;

/// What we ask a registry for.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";
/// The most layers of an image.
pub(crate) const LAYERS_MAX: usize = 512;
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Name and tag (or digest) of an image, without registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// `user/name`.
    pub(crate) name: String,
    /// Tag or digest.
    pub(crate) tag: String,
}

impl Reference {
    /// Takes `user/name:tag`, `user/name@sha256:...` or `user/name`. What is accepted is safe in a URL.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (name, tag) = match text.split_once('@') {
            Some((name, digest)) => (name, Digest::parse(digest)?.to_string()),
            None => match text.rsplit_once(':') {
                Some((name, tag)) => (name, tag.to_owned()),
                None => (text, "latest".to_owned()),
            },
        };
        let is_word = |word: &str, more: &str| {
            !word.is_empty()
                && !word.starts_with('.')
                && word
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || more.contains(c))
        };
        let good = name.len() <= 255
            && tag.len() <= 128
            && name.split('/').all(|part| is_word(part, "._-"))
            && is_word(&tag, "._-:");
        good.then(|| Self {
            name: name.to_owned(),
            tag,
        })
    }
}

/// A sha256 digest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Digest(String);

impl Digest {
    /// Takes `sha256:` and 64 lower-case hexadecimal digits.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:")?;
        let good = hex.len() == 64
            && hex
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        good.then(|| Self(hex.to_owned()))
    }

    /// From the hash itself.
    pub(crate) fn of_hash(hash: &[u8]) -> Self {
        Self(hex::encode(hash))
    }

    /// The digits alone, for file names.
    pub(crate) fn hex(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// Points to a blob or another document.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    /// Digest as text.
    pub(crate) digest: String,
    /// Bytes.
    pub(crate) size: u64,
    /// What it is.
    #[serde(default)]
    pub(crate) media_type: String,
    /// For which machine, in an index.
    pub(crate) platform: Option<Platform>,
}

/// A kind of machine.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Platform {
    architecture: String,
    os: String,
}

/// An index (with `manifests`) or a manifest (with `config` and `layers`).
#[derive(Debug, Deserialize)]
pub(crate) struct Document {
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

/// What a document turns out to be.
#[derive(Debug)]
pub(crate) enum Kind {
    /// A list of manifests, of which this one is for our machine.
    Index(Descriptor),
    /// One image.
    Manifest {
        /// Its configuration.
        config: Descriptor,
        /// Its layers, lowest first.
        layers: Vec<Descriptor>,
    },
}

impl Document {
    /// Says what it is, or why it is of no use.
    pub(crate) fn kind(self) -> Result<Kind, String> {
        if let Some(manifests) = self.manifests {
            let architecture = match std::env::consts::ARCH {
                "x86_64" => "amd64",
                "aarch64" => "arm64",
                other => other,
            };
            let fits = |entry: &Descriptor| {
                let platform = entry.platform.as_ref();
                platform.is_some_and(|it| it.os == "linux" && it.architecture == architecture)
            };
            let found = manifests.into_iter().find(fits);
            return found
                .map(Kind::Index)
                .ok_or_else(|| format!("the image has no variant for linux/{architecture}"));
        }
        let (Some(config), Some(layers)) = (self.config, self.layers) else {
            return Err("the manifest has no configuration or no layers".to_owned());
        };
        if layers.len() > LAYERS_MAX {
            return Err(format!(
                "the image has {} layers, more than {LAYERS_MAX}",
                layers.len()
            ));
        }
        if let Some(layer) = layers.iter().find(|layer| layer.media_type.contains("zstd")) {
            return Err(format!("layers of type {} are not supported", layer.media_type));
        }
        Ok(Kind::Manifest { config, layers })
    }
}

/// The configuration of an image, as far as we use it.
#[derive(Debug, Default, Deserialize)]
pub(crate) struct Configuration {
    config: Option<ContainerConfiguration>,
}

#[derive(Debug, Default, Deserialize)]
struct ContainerConfiguration {
    #[serde(rename = "Env")]
    env: Option<Vec<String>>,
}

impl Configuration {
    /// Folders in which commands are looked for, inside the image.
    pub(crate) fn path(&self) -> Vec<String> {
        let path = self
            .variables()
            .find(|(name, _)| *name == "PATH")
            .map(|(_, value)| value);
        path.unwrap_or(DEFAULT_PATH)
            .split(':')
            .map(str::to_owned)
            .collect()
    }

    /// The image's own variables, without the search path.
    pub(crate) fn environment(&self) -> Vec<(String, String)> {
        let others = self.variables().filter(|(name, _)| *name != "PATH");
        others
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        let list = self.config.as_ref().and_then(|config| config.env.as_deref());
        list.unwrap_or_default()
            .iter()
            .filter_map(|item| item.split_once('='))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_checked() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, expected) in [
            ("user/name:1.0", Some(("user/name", "1.0"))),
            ("user/name", Some(("user/name", "latest"))),
            (&format!("user/name@{digest}"), Some(("user/name", &*digest))),
            ("user/../name:1", None),
            ("user//name:1", None),
            ("user/name:", None),
            ("user/name:a/b", None),
            ("user/name?x:1", None),
            ("user/name@sha256:00", None),
            ("", None),
        ] {
            let seen = Reference::parse(text);
            let seen = seen.as_ref().map(|it| (it.name.as_str(), it.tag.as_str()));
            assert_eq!(seen, expected, "{text}");
        }
    }

    #[test]
    fn documents_of_both_kinds_are_told_apart() {
        let kind = |text: &str| serde_json::from_str::<Document>(text).expect("JSON").kind();
        let entry = |arch: &str| {
            format!(r#"{{"digest":"{arch}","size":1,"platform":{{"os":"linux","architecture":"{arch}"}}}}"#)
        };
        let all = format!(r#"{{"manifests":[{},{}]}}"#, entry("amd64"), entry("arm64"));
        assert!(matches!(kind(&all), Ok(Kind::Index(it)) if it.digest.ends_with("64")));
        assert!(kind(&format!(r#"{{"manifests":[{}]}}"#, entry("mips"))).is_err());
        assert!(kind("{}").is_err());
        let manifest = r#"{"config":{"digest":"a","size":1},"layers":[{"digest":"b","size":2}]}"#;
        assert!(matches!(kind(manifest), Ok(Kind::Manifest { .. })));
        assert!(kind(&manifest.replace(r#""size":2"#, r#""size":2,"mediaType":"x+zstd""#)).is_err());
    }

    #[test]
    fn an_image_without_variables_has_the_usual_path() {
        let configuration = Configuration::default();
        assert_eq!(configuration.path().len(), 6);
        let text = r#"{"config":{"Env":["PATH=/opt/bin:/bin","A=b=c","odd"]}}"#;
        let configuration: Configuration = serde_json::from_str(text).expect("JSON");
        assert_eq!(configuration.path(), ["/opt/bin", "/bin"]);
        assert_eq!(configuration.environment(), [("A".to_owned(), "b=c".to_owned())]);
    }
}
