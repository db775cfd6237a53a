//! Our own GPU proof as pure arithmetic: prove, check, encrypt and decrypt, on any CPU.
//!
//! It has the shape of GraVal on the wire and is *not* compatible with it: for development, tests, health
//! checks and private networks. Everything is integer arithmetic, so a CPU and a card agree bit for bit.
//!
//! ```text
//!  device facts, seed --> keys --> matrices 0 and 1 --> chain of products --> Merkle root of each --> work product
//!                                                              |
//!                                                              +--> walk of dependent reads --> secret --> decrypt
//! ```
//!
//! Reading order: [`profile`], [`device`], [`matrix`] (entries, products, Freivalds' check),
//! [`commitment`] (Merkle roots and openings), [`work`] (prove and check), [`secret`] (encryption),
//! [`challenge`] (device challenges). Nothing here reads a clock, a file, a socket or random numbers.

pub mod challenge;
pub mod commitment;
pub mod device;
mod digest;
pub mod matrix;
pub mod profile;
pub mod secret;
pub mod work;

pub use challenge::{device_challenge_answer, verify_device_challenge};
pub use device::{SOFTWARE, software_device};
pub use profile::Profile;
pub use secret::{decrypt, encrypt};
pub use work::{ITERATIONS_MAX, Proved, WorkProduct, check, prove};

/// Why something cannot be answered or decrypted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A challenge to a host without GPUs.
    #[error("there is no GPU that could answer")]
    NoDevice,
    /// A challenge that is not 64 hexadecimal digits.
    #[error("the challenge is not 64 hexadecimal digits")]
    MalformedChallenge,
    /// A ciphertext shorter than its fixed parts or longer than allowed; the length in bytes.
    #[error("a ciphertext of {0} bytes is not possible")]
    CiphertextLength(usize),
    /// The ciphertext was made for another device, seed, iteration count or profile, or was changed.
    #[error("the ciphertext does not belong to this proof")]
    WrongKey,
    /// What was encrypted is not UTF-8.
    #[error("the plaintext is not UTF-8")]
    NotText,
}
