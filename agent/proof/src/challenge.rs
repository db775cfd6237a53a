//! Device challenges: a quick question that only who knows the facts of a host's GPUs can answer.
//!
//! The first byte of the challenge picks the device by its place in the list, so the order matters.

use protocol::gpu::DeviceInfo;

use crate::Error;
use crate::digest::hash_fields;

/// Answers a challenge of 64 hexadecimal digits with 64 lower-case ones.
///
/// # Errors
/// [`Error::NoDevice`] without devices, [`Error::MalformedChallenge`].
pub fn device_challenge_answer(devices: &[DeviceInfo], challenge: &str) -> Result<String, Error> {
    if devices.is_empty() {
        return Err(Error::NoDevice);
    }
    let mut bytes = [0; 32];
    hex::decode_to_slice(challenge, &mut bytes).map_err(|_| Error::MalformedChallenge)?;
    let device = &devices[usize::from(bytes[0]) % devices.len()];
    Ok(hex::encode(hash_fields(
        "device challenge",
        &[
            &bytes,
            &(devices.len() as u64).to_le_bytes(),
            device.uuid.as_str().as_bytes(),
            device.name.as_bytes(),
            &device.memory.to_le_bytes(),
            &device.processors.to_le_bytes(),
            &device.clock_rate_khz.to_le_bytes(),
            &device.max_threads_per_processor.to_le_bytes(),
        ],
    )))
}

/// True if `answer` is the answer of a host with these devices, in this order.
#[must_use]
pub fn verify_device_challenge(devices: &[DeviceInfo], challenge: &str, answer: &str) -> bool {
    device_challenge_answer(devices, challenge).is_ok_and(|expected| expected == answer)
}
