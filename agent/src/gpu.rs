//! GPUs of this host: what they are, and the proof that they are what they say.
//!
//! ```text
//!  validator --HTTP--> api --> guard (who, when, once) --> worker (one thread, one proof) --> Prover backend
//!                                                                                       cpu | cuda
//! ```
//!
//! Reading order: [`device`] (facts, pure), [`cuda`] (the only file that talks to the CUDA driver),
//! [`prover`] (what every backend promises), [`cpu`] (software GPUs), [`worker`] (the thread seam, queue
//! limits and the cache of the last proof), [`guard`] (signatures, replays, rate), [`remote_token`],
//! [`metrics`], [`api`] (HTTP). The process around it is [`crate::proof_plane`].

pub mod api;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod guard;
pub mod metrics;
pub mod prover;
pub mod remote_token;
pub mod worker;
