//! What is sealed opens with its key, and with nothing changed; the same bytes for ever.

use super::*;

fn key() -> SnapshotKey {
    SnapshotKey::new([3; 32])
}

fn head() -> Head {
    Head {
        cluster: "miner".to_owned(),
        last_index: 42,
        created_at: UnixMillis(1_800_000_000_000),
        recipient: String::new(),
        format: 1,
        written_by: "0.1.0".to_owned(),
    }
}

fn summary() -> Summary {
    Summary {
        members: BTreeSet::from([1, 2, 3]),
        rows: BTreeMap::from([("servers".to_owned(), 7)]),
        size_bytes: 100,
    }
}

fn sealed(plain: &[u8]) -> Vec<u8> {
    let (mut sealer, mut file) = Sealer::new(&key().recipient(), head(), &summary(), [9; 32]).expect("a key");
    for part in plain.chunks(100_001) {
        file.extend(sealer.put(part));
    }
    file.extend(sealer.finish());
    file
}

fn opened(file: &[u8], key: &SnapshotKey) -> Result<Vec<u8>, ReadError> {
    let mut opened = Sealed::open(file)?.unseal(key)?;
    let mut plain = Vec::new();
    opened.read_to_end(&mut plain)?;
    Ok(plain)
}

#[test]
fn what_was_sealed_is_read_back_at_any_length() {
    let overhead = serde_json::to_vec(&summary()).expect("plain data").len() + 4;
    let one = PIECE_BYTES - overhead;
    for length in [0, 1, one - 1, one, one + 1, one + PIECE_BYTES, 3 * PIECE_BYTES] {
        let plain: Vec<u8> = (0..length).map(|i| u8::try_from(i % 251).unwrap_or(0)).collect();
        let file = sealed(&plain);
        let found = opened(&file, &key()).expect("its key");
        assert!(found == plain, "{length} bytes");
        let read = Sealed::open(file.as_slice()).expect("a head");
        assert_eq!(read.head().recipient, key().recipient().id());
        let unsealed = read.unseal(&key()).expect("its key");
        assert_eq!(unsealed.summary(), &summary());
    }
}

#[test]
fn another_key_is_refused_by_name() {
    let other = SnapshotKey::new([4; 32]);
    let error = opened(&sealed(b"x"), &other)
        .expect_err("another key")
        .to_string();
    assert!(error.contains(&key().recipient().id()), "{error}");
    assert!(error.contains(&other.recipient().id()), "{error}");
}

#[test]
fn any_change_and_any_cut_is_found() {
    let file = sealed(&vec![5; PIECE_BYTES + 10]);
    let positions = (0..400).chain([file.len() / 2, file.len() - 1]);
    for position in positions {
        let mut changed = file.clone();
        changed[position] ^= 1;
        assert!(opened(&changed, &key()).is_err(), "byte {position} changed");
    }
    // A cut at the end of a piece leaves whole pieces.
    for length in [0, 5, 9, 100, file.len() - 26, file.len() - 27, file.len() - 1] {
        assert!(opened(&file[..length], &key()).is_err(), "cut to {length}");
    }
    let mut longer = file.clone();
    longer.push(0);
    assert!(opened(&longer, &key()).is_err(), "a byte more");
}

#[test]
fn newer_and_other_files_are_told_apart() {
    let mut newer = sealed(b"x");
    newer[8] = VERSION + 1;
    assert!(matches!(opened(&newer, &key()), Err(ReadError::Newer(_))));
    assert!(matches!(opened(b"something else", &key()), Err(ReadError::Other)));
}

#[test]
fn keys_are_one_word_each_and_secrets_stay_hidden() {
    let text = key().file_text();
    let again = SnapshotKey::parse(&text).expect("as written");
    assert_eq!(again.recipient(), key().recipient());
    let public = key().recipient().to_string();
    assert_eq!(public.parse(), Ok(key().recipient()));
    assert!(!format!("{:?}", key()).contains(&"03".repeat(32)));
    let mistyped = public.replace('a', "b");
    for bad in ["", "chutes-snapshot-1.", "chutes-snapshot-1.00", &text, &mistyped] {
        assert!(bad.parse::<Recipient>().is_err(), "{bad}");
    }
    for bad in ["", "# only a comment", &public] {
        let error = SnapshotKey::parse(bad).expect_err("no key").to_string();
        assert!(bad.len() < 3 || !error.contains(bad), "{error}");
    }
}

/// RFC 7748, section 5.2, the first iteration; and ring agrees with us.
#[test]
fn the_agreement_is_x25519() {
    let mut nine = [0; 32];
    nine[0] = 9;
    let once = SnapshotKey::new(nine).agree(&nine).0;
    assert_eq!(
        hex::encode(once),
        "422c8e7a6227d7bca1350b3e2bb7279f7897b87bb6854b783c60e80311ae3079"
    );
    let random = ring::rand::SystemRandom::new();
    let theirs = ring::agreement::EphemeralPrivateKey::generate(&ring::agreement::X25519, &random);
    let theirs = theirs.expect("randomness");
    let public = theirs.compute_public_key().expect("a key");
    let public: [u8; 32] = public.as_ref().try_into().expect("32 bytes");
    let ours = key().recipient();
    let ours = ring::agreement::UnparsedPublicKey::new(&ring::agreement::X25519, ours.as_bytes());
    let agreed = ring::agreement::agree_ephemeral(theirs, &ours, <[u8]>::to_vec).expect("two keys");
    assert_eq!(agreed, key().agree(&public).0);
}

/// Version 1. Never edit: files that operators keep hold these bytes.
#[test]
fn a_file_of_the_first_version_opens() {
    assert_eq!(hex::encode(sealed(b"first version")), GOLDEN);
    let file = hex::decode(GOLDEN).expect("hex");
    assert_eq!(opened(&file, &key()).expect("its key"), b"first version");
}

const GOLDEN: &str = "\
    4348555453415645017d0000007b22636c7573746572223a226d696e6572222c226c6173745f696e646578223a\
    34322c22637265617465645f6174223a313830303030303030303030302c22726563697069656e74223a223364\
    3734333539653338613838613432222c22666f726d6174223a312c227772697474656e5f6279223a22302e312e\
    30227d57db4b359f23ae5e146e4e2512056704722506348c150c14753d0c933d04d4216181f6c74a137207fd43\
    88c552d2cb7174920d0aa48d45fd2e9b5d83a8f27329815c5ee69f9657194248d56024f6c5827d8a4286d25fe5\
    080e9c98a0682be56e3e6f017832848b737ae89b9f8c8ff002603a1a95490d7ac9f550";
