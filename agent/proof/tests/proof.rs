//! The proof from outside: golden vectors, what must differ, what must be refused, and how long it takes.

use proof::{
    Error, ITERATIONS_MAX, Profile, WorkProduct, check, decrypt, device_challenge_answer, encrypt, prove,
    software_device, verify_device_challenge,
};
use protocol::gpu::DeviceInfo;
use protocol::id::GpuId;

const PROFILE: Profile = Profile::DEVELOPMENT;
const IV: [u8; 16] = [7; 16];

fn device(byte: u8) -> DeviceInfo {
    software_device(GpuId::from_device_uuid(&hex::encode([byte; 16])).expect("32 digits"))
}

/// Computed by a second implementation in another language. These bytes never change without a new domain
/// text: another build must accept them.
#[test]
fn golden_vectors() {
    let device = device(0x5a);
    let proved = prove(&device, 42, 1, &PROFILE);
    assert_eq!(
        serde_json::to_string(&proved.work_product).expect("plain data"),
        r#"{"intermediate_hashes":["5638f707d538d37cbf7eb444ec83e476c4aae7370dfe59845496946784a73a17","328d74b415622eda7bf6518de60c59c5e55a90c26af27a5b38584dbcf600f654","5f20694a1a92f8817548937ba739d2409a8986371779bc4990c8344de53bbf43","86b76d714fcee884c048f37f66387f47274389af82dd683345ce58f1b669bb1f","7132df52316ed02d910d677d67a45c9b0f1e4729916a91b27343e6a16ceda2e7","d9660e7332473da41f20f515d4800a1eea4b32afe33fb5c81af8ac91397ff4f6","3ab84c24c3d8fc56a8941510662c6e0e108fb0f14af978773974c87014e09121","ba25a9ff2bec3b86af795f00a300932e601c6043208f247307e3aa79981e6cb5"],"num_matrices":8,"total_iterations":1}"#
    );
    assert_eq!(
        hex::encode(encrypt(&device, "hello", 42, 1, IV, &PROFILE)),
        "070707070707070707070707070707073653c80bddfc9625e09887484e3c9b967c402db848"
    );
    let challenge = format!("01{}", "ab".repeat(31));
    assert_eq!(
        device_challenge_answer(&[device], &challenge).as_deref(),
        Ok("19c4bec51667f9e9941e1c227667340053f6961e452658a41bde0561cd818f0b")
    );
    let large = prove(&self::device(0xff), u64::MAX, ITERATIONS_MAX, &PROFILE);
    assert_eq!(
        large.work_product.intermediate_hashes.last().map(String::as_str),
        Some("48a38b6439f49fb12f13b0b091bfb13f39c84874d038ece31b0d54c43a42f5a1")
    );
}

#[test]
fn what_was_proved_is_accepted_at_every_index() {
    for (byte, seed, iterations) in [(1, 0, 1), (2, 42, 2), (3, u64::MAX, 3)] {
        let device = device(byte);
        let proved = prove(&device, seed, iterations, &PROFILE);
        let count = proved.work_product.intermediate_hashes.len();
        assert_eq!(
            count,
            proved.work_product.num_matrices as usize * iterations as usize
        );
        for index in 0..count {
            assert!(
                check(&device, seed, &proved.work_product, index, &PROFILE),
                "{index}"
            );
        }
        for index in [count, count + 1, usize::MAX] {
            assert!(
                !check(&device, seed, &proved.work_product, index, &PROFILE),
                "{index}"
            );
        }
        let blob = encrypt(&device, "decrypt me please", seed, iterations, IV, &PROFILE);
        assert_eq!(decrypt(&proved, &blob).as_deref(), Ok("decrypt me please"));
    }
}

#[test]
fn every_input_changes_every_root_and_the_key() {
    let base = device(1);
    let proved = prove(&base, 42, 2, &PROFILE);
    let changed = |change: fn(&mut DeviceInfo)| {
        let mut device = base.clone();
        change(&mut device);
        device
    };
    let wider = Profile {
        name: "wider",
        ..PROFILE
    };
    let others = [
        (changed(|d| d.uuid = device(2).uuid), 42, 2, PROFILE),
        (changed(|d| d.name.push('x')), 42, 2, PROFILE),
        (changed(|d| d.memory += 1), 42, 2, PROFILE),
        (base.clone(), 43, 2, PROFILE),
        (base.clone(), 42 | 1 << 63, 2, PROFILE),
        (base.clone(), 42, 1, PROFILE),
        (base.clone(), 42, 3, PROFILE),
        (base.clone(), 42, 2, wider),
    ];
    for (number, (device, seed, iterations, profile)) in others.iter().enumerate() {
        let other = prove(device, *seed, *iterations, profile);
        for hash in &other.work_product.intermediate_hashes {
            assert!(
                !proved.work_product.intermediate_hashes.contains(hash),
                "other {number} shares a root"
            );
        }
        let blob = encrypt(device, "text", *seed, *iterations, IV, profile);
        assert_eq!(decrypt(&proved, &blob), Err(Error::WrongKey), "other {number}");
        // `check` takes the iteration count from the product; a wrong count is what decryption refuses.
        let checked = if *iterations == 2 {
            other.work_product.intermediate_hashes.len()
        } else {
            0
        };
        for index in 0..checked {
            assert!(
                !check(&base, 42, &other.work_product, index, &PROFILE),
                "other {number} is accepted at {index}"
            );
        }
    }
}

#[test]
fn a_changed_work_product_is_refused() {
    let device = device(1);
    let good = prove(&device, 42, 2, &PROFILE).work_product;
    for index in 0..good.intermediate_hashes.len() {
        let mut forged = good.clone();
        let hash = &mut forged.intermediate_hashes[index];
        let digit = if hash.starts_with('0') { "1" } else { "0" };
        hash.replace_range(..1, digit);
        assert!(!check(&device, 42, &forged, index, &PROFILE), "{index}");
        let mut swapped = good.clone();
        swapped.intermediate_hashes.rotate_left(1);
        assert!(!check(&device, 42, &swapped, index, &PROFILE), "{index}");
    }
    let shapes: [fn(&mut WorkProduct); 8] = [
        |w| w.intermediate_hashes.clear(),
        |w| drop(w.intermediate_hashes.pop()),
        |w| w.intermediate_hashes.push("00".repeat(32)),
        |w| w.num_matrices = 0,
        |w| w.num_matrices = u32::MAX,
        |w| w.total_iterations = 0,
        |w| w.total_iterations = u32::MAX,
        |w| (w.num_matrices, w.total_iterations) = (w.total_iterations, w.num_matrices),
    ];
    for (number, change) in shapes.iter().enumerate() {
        let mut forged = good.clone();
        change(&mut forged);
        assert!(!check(&device, 42, &forged, 0, &PROFILE), "shape {number}");
    }
}

#[test]
fn a_changed_ciphertext_is_refused() {
    let device = device(1);
    let proved = prove(&device, 42, 1, &PROFILE);
    let blob = encrypt(&device, "text", 42, 1, IV, &PROFILE);
    assert_eq!(blob.len(), 16 + 4 + 16);
    for at in 0..blob.len() {
        let mut forged = blob.clone();
        forged[at] ^= 1;
        assert_eq!(decrypt(&proved, &forged), Err(Error::WrongKey), "byte {at}");
    }
    for length in 0..blob.len() {
        assert!(decrypt(&proved, &blob[..length]).is_err(), "length {length}");
    }
    assert_eq!(decrypt(&proved, &blob[..31]), Err(Error::CiphertextLength(31)));
    assert_eq!(
        decrypt(&proved, &vec![0; 1 << 20]),
        Err(Error::CiphertextLength(1 << 20))
    );
    assert_ne!(
        encrypt(&device, "text", 42, 1, [8; 16], &PROFILE)[16..],
        blob[16..]
    );
    let empty = encrypt(&device, "", 42, 1, IV, &PROFILE);
    assert_eq!(decrypt(&proved, &empty).as_deref(), Ok(""));
}

#[test]
fn iterations_out_of_range_are_brought_into_it() {
    let device = device(1);
    assert_eq!(prove(&device, 1, 0, &PROFILE).work_product.total_iterations, 1);
    let most = prove(&device, 1, u32::MAX, &PROFILE).work_product;
    assert_eq!(most.total_iterations, ITERATIONS_MAX);
}

#[test]
fn device_challenges_bind_the_picked_device() {
    let devices: Vec<DeviceInfo> = (1..=3).map(device).collect();
    for first in [0_u8, 1, 2, 3, 25, 255] {
        let challenge = format!("{first:02x}{}", "ab".repeat(31));
        let answer = device_challenge_answer(&devices, &challenge).expect("a good challenge");
        assert_eq!(answer.len(), 64);
        assert!(verify_device_challenge(&devices, &challenge, &answer));
        let picked = usize::from(first) % devices.len();
        let changes: [fn(&mut DeviceInfo); 6] = [
            |d| d.uuid = device(9).uuid,
            |d| d.name.push('x'),
            |d| d.memory += 1,
            |d| d.processors += 1,
            |d| d.clock_rate_khz += 1,
            |d| d.max_threads_per_processor += 1,
        ];
        for change in changes {
            let mut others = devices.clone();
            change(&mut others[picked]);
            assert!(!verify_device_challenge(&others, &challenge, &answer));
        }
        let mut turned = devices.clone();
        turned.rotate_left(1);
        assert!(!verify_device_challenge(&turned, &challenge, &answer));
        assert!(!verify_device_challenge(&devices[..2], &challenge, &answer));
        assert!(!verify_device_challenge(
            &devices,
            &challenge,
            &answer.to_uppercase()
        ));
        assert!(!verify_device_challenge(&devices, &"00".repeat(32), &answer));
    }
    assert_eq!(
        device_challenge_answer(&[], &"00".repeat(32)),
        Err(Error::NoDevice)
    );
    for bad in ["", "00", &"zz".repeat(32), &"00".repeat(33), &"0".repeat(63)] {
        assert_eq!(
            device_challenge_answer(&devices, bad),
            Err(Error::MalformedChallenge),
            "{bad}"
        );
    }
    assert!(!verify_device_challenge(&[], &"00".repeat(32), &"00".repeat(32)));
}

#[test]
fn debug_output_hides_the_secret() {
    let text = format!("{:?}", prove(&device(1), 42, 1, &PROFILE));
    assert!(
        text.contains("intermediate_hashes") && text.ends_with(".. }"),
        "{text}"
    );
}
