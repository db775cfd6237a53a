//! Identifiers that a validator makes: random UUIDs, and name-based ones (version 5 in the OID namespace),
//! by which chutes, versions and code folders are named (`validator-protocol`, section 3.3).

use ring::rand::{SecureRandom, SystemRandom};

const OID_NAMESPACE: [u8; 16] = [
    0x6b, 0xa7, 0xb8, 0x12, 0x9d, 0xad, 0x11, 0xd1, 0x80, 0xb4, 0x00, 0xc0, 0x4f, 0xd4, 0x30, 0xc8,
];

/// Bytes from the operating system's generator.
pub(crate) fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .expect("the operating system's generator does not fail once the machine is up");
    bytes
}

/// A random UUID (version 4).
pub(crate) fn random_uuid() -> String {
    dashed(random_bytes::<16>(), 4)
}

/// The UUID of a name (version 5, OID namespace).
pub(crate) fn uuid_of_name(name: &str) -> String {
    let mut input = OID_NAMESPACE.to_vec();
    input.extend_from_slice(name.as_bytes());
    let digest = ring::digest::digest(&ring::digest::SHA1_FOR_LEGACY_USE_ONLY, &input);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest.as_ref()[..16]);
    dashed(bytes, 5)
}

fn dashed(mut bytes: [u8; 16], version: u8) -> String {
    bytes[6] = (bytes[6] & 0x0f) | (version << 4);
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    let hex = hex::encode(bytes);
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_based_uuids_match_another_implementation() {
        // From Python: uuid.uuid5(uuid.NAMESPACE_OID, "acme::chute::model").
        assert_eq!(
            uuid_of_name("acme::chute::model"),
            "af8aa49f-94dd-59aa-a2a3-d486133ed3dd"
        );
    }

    #[test]
    fn random_uuids_differ_and_carry_their_version() {
        let (a, b) = (random_uuid(), random_uuid());
        assert_ne!(a, b);
        assert_eq!((a.len(), a.as_bytes()[14]), (36, b'4'));
    }
}
