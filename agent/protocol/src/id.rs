//! Newtype identifiers. Each wraps the text that the outside uses for the thing, so that a GPU's id can
//! never be passed where a server's is meant.
//!
//! Text from outside is checked, by `parse` and whenever one is deserialised: length and alphabet are bounded,
//! since identifiers end up in file names, URLs and Kubernetes object names.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The longest identifier that is accepted from outside, in bytes.
pub const ID_BYTES_MAX: usize = 128;

/// Why a text is no identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{kind} {text:?} is not valid: 1 to {ID_BYTES_MAX} letters, digits, '-', '_' or '.' are allowed, not starting with '.'"
)]
pub struct InvalidId {
    kind: &'static str,
    text: String,
}

fn check(kind: &'static str, text: &str) -> Result<(), InvalidId> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > ID_BYTES_MAX || text.starts_with('.') || !text.chars().all(allowed) {
        return Err(InvalidId {
            kind,
            text: text.chars().take(ID_BYTES_MAX).collect(),
        });
    }
    Ok(())
}

macro_rules! identifiers {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String")]
        pub struct $name(String);

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                check(stringify!($name), &text)?;
                Ok(Self(text))
            }
        }

        impl $name {
            /// Checks text from outside.
            ///
            /// # Errors
            /// [`InvalidId`] when the text is empty, too long or has characters that do not belong in a
            /// file name, a URL segment or an object name.
            pub fn parse(text: &str) -> Result<Self, InvalidId> {
                check(stringify!($name), text)?;
                Ok(Self(text.to_owned()))
            }

            /// The text itself.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl std::str::FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::parse(text)
            }
        }
    )*};
}

identifiers! {
    /// A machine that runs our agent, or a sealed worker. On Kubernetes the node's UID.
    ServerId;
    /// One GPU: 32 hexadecimal digits, no `GPU-` prefix, no dashes. The validator says *node* for it.
    GpuId;
    /// An application in a validator's catalogue.
    ChuteId;
    /// A published version of a chute.
    ChuteVersion;
    /// Our attempt to run a chute on certain GPUs; chosen by us.
    DeploymentId;
    /// The validator's record of a deployment.
    InstanceId;
    /// A launch config: ties a starting workload to its instance.
    ConfigId;
    /// A chute run once on offer.
    JobId;
}

impl GpuId {
    /// Takes a device UUID in any of its forms (`GPU-` prefix, dashes, capitals) and brings it to 32
    /// lower-case hexadecimal digits.
    ///
    /// # Errors
    /// [`InvalidId`] when what is left is not 32 hexadecimal digits.
    pub fn from_device_uuid(text: &str) -> Result<Self, InvalidId> {
        let bare: String = text
            .trim_start_matches("GPU-")
            .chars()
            .filter(|c| *c != '-')
            .collect::<String>()
            .to_lowercase();
        if bare.len() == 32 && bare.chars().all(|c| c.is_ascii_hexdigit()) {
            Ok(Self(bare))
        } else {
            Err(InvalidId {
                kind: "GpuId",
                text: text.chars().take(ID_BYTES_MAX).collect(),
            })
        }
    }

    /// The form that `NVIDIA_VISIBLE_DEVICES` wants: `GPU-` and the dashed UUID.
    #[must_use]
    pub fn visible_device(&self) -> String {
        let id = &self.0;
        match (
            id.get(0..8),
            id.get(8..12),
            id.get(12..16),
            id.get(16..20),
            id.get(20..),
        ) {
            (Some(a), Some(b), Some(c), Some(d), Some(e)) => format!("GPU-{a}-{b}-{c}-{d}-{e}"),
            _ => format!("GPU-{id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_from_outside_are_checked() {
        for good in ["a", "14a91d88-0b5d-4c2e-9d0c-3a7b8f6e5d4c", "host_1.example"] {
            assert!(ChuteId::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a b", "ü", "a\n", &"x".repeat(129)] {
            assert!(ChuteId::parse(bad).is_err(), "{bad:?}");
            let json = serde_json::to_string(bad).expect("a text");
            assert!(serde_json::from_str::<ChuteId>(&json).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn gpu_ids_take_every_form_of_a_device_uuid() {
        let bare = "aabbccdd00112233445566778899eeff";
        for form in [
            bare,
            "GPU-aabbccdd-0011-2233-4455-66778899eeff",
            "AABBCCDD-0011-2233-4455-66778899EEFF",
        ] {
            assert_eq!(
                GpuId::from_device_uuid(form).map(|id| id.to_string()),
                Ok(bare.to_owned())
            );
        }
        assert!(GpuId::from_device_uuid("GPU-1234").is_err());
        let id = GpuId::from_device_uuid(bare).expect("checked above");
        assert_eq!(id.visible_device(), "GPU-aabbccdd-0011-2233-4455-66778899eeff");
    }
}
