//! The proof itself: a chain of products over matrices that only this device and seed have, a root for
//! each, and a walk of dependent reads over all of them that ends in a secret.
//!
//! Matrices 0 and 1 of an iteration come from their keys. Matrix k is the reduced product of matrix k - 1
//! and an earlier one that its key picks, so nothing can be skipped and nothing may be forgotten. The walk
//! reads rows at places that depend on what it has read: whoever did not keep the matrices must make them
//! again.

use std::fmt;

use protocol::gpu::DeviceInfo;
use serde::{Deserialize, Serialize};

use crate::commitment;
use crate::digest::{hash_fields, word};
use crate::matrix::Matrix;
use crate::profile::Profile;

/// The most iterations of one proof, as validators ask for them (`validator-protocol`, section 5.1).
pub const ITERATIONS_MAX: u32 = 10;

/// What a prover shows, named as on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkProduct {
    /// The root of each matrix, 64 lower-case hexadecimal digits; all of iteration 0, then of 1, ...
    pub intermediate_hashes: Vec<String>,
    /// Matrices of one iteration.
    pub num_matrices: u32,
    /// Iterations.
    pub total_iterations: u32,
}

/// A finished proof: what is shown, and the secret that only the work gives. `Debug` hides the secret.
#[derive(Clone)]
pub struct Proved {
    /// What is shown.
    pub work_product: WorkProduct,
    pub(crate) secret: Secret,
}

impl fmt::Debug for Proved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proved")
            .field("work_product", &self.work_product)
            .finish_non_exhaustive()
    }
}

/// The last state of the walk, and what it belongs to.
#[derive(Clone)]
pub(crate) struct Secret {
    pub(crate) state: [u8; 32],
    pub(crate) uuid: String,
    pub(crate) seed: u64,
}

/// Everything that determines a proof.
struct Plan<'a> {
    device: &'a DeviceInfo,
    seed: u64,
    iterations: u32,
    profile: &'a Profile,
    matrices: u32,
}

impl<'a> Plan<'a> {
    fn new(device: &'a DeviceInfo, seed: u64, iterations: u32, profile: &'a Profile) -> Self {
        Self {
            device,
            seed,
            iterations: iterations.clamp(1, ITERATIONS_MAX),
            profile,
            matrices: profile.matrices(device.memory),
        }
    }

    /// The key of one matrix; no two devices, seeds, iterations, profiles or matrices share one.
    fn key(&self, purpose: &str, iteration: u32, matrix: u32) -> [u8; 32] {
        hash_fields(
            purpose,
            &[
                self.profile.name.as_bytes(),
                &(self.profile.n as u64).to_le_bytes(),
                &self.seed.to_le_bytes(),
                self.device.uuid.as_str().as_bytes(),
                self.device.name.as_bytes(),
                &self.device.memory.to_le_bytes(),
                &self.iterations.to_le_bytes(),
                &iteration.to_le_bytes(),
                &matrix.to_le_bytes(),
            ],
        )
    }

    /// Appends the next matrix of an iteration.
    fn grow(&self, iteration: u32, made: &mut Vec<Matrix>) {
        let number = u32::try_from(made.len()).expect("at most u32::MAX matrices");
        let key = self.key("matrix", iteration, number);
        let next = match &made[..] {
            [.., last] if number >= 2 => {
                let earlier = word(&key, 1) % u64::from(number - 1);
                let earlier = usize::try_from(earlier).expect("an index of a made matrix");
                last.times(&made[earlier]).reduced(word(&key, 0))
            }
            _ => Matrix::from_key(word(&key, 0), self.profile.n),
        };
        made.push(next);
    }

    /// The first `count` matrices of an iteration.
    fn matrices(&self, iteration: u32, count: u32) -> Vec<Matrix> {
        let mut made = Vec::new();
        for _ in 0..count {
            self.grow(iteration, &mut made);
        }
        made
    }

    /// The walk over an iteration's matrices, from the state that the iteration before left.
    fn walk(&self, state: [u8; 32], matrices: &[Matrix], roots: &[[u8; 32]]) -> [u8; 32] {
        let mut fields: Vec<&[u8]> = vec![&state];
        fields.extend(roots.iter().map(<[u8; 32]>::as_slice));
        let mut state = hash_fields("walk", &fields);
        let place = |word: u64, count: usize| usize::try_from(word % count as u64).expect("below a length");
        for _ in 0..self.profile.walk_steps {
            let matrix = &matrices[place(word(&state, 0), matrices.len())];
            let row = matrix.row(place(word(&state, 1), matrix.n()));
            let bytes: Vec<u8> = row.iter().map(|entry| entry.cast_unsigned()).collect();
            state = hash_fields("step", &[&state, &bytes]);
        }
        state
    }
}

/// Does the work for one device. `iterations` outside 1 to [`ITERATIONS_MAX`] are brought into that range.
///
/// Takes and holds [`Profile::held_bytes`] of memory, and runs until done: callers give it a thread.
#[must_use]
pub fn prove(device: &DeviceInfo, seed: u64, iterations: u32, profile: &Profile) -> Proved {
    let plan = Plan::new(device, seed, iterations, profile);
    let mut state = plan.key("start", 0, 0);
    let mut intermediate_hashes = Vec::new();
    for iteration in 0..plan.iterations {
        let matrices = plan.matrices(iteration, plan.matrices);
        let roots: Vec<[u8; 32]> = matrices.iter().map(commitment::root).collect();
        state = plan.walk(state, &matrices, &roots);
        intermediate_hashes.extend(roots.iter().map(hex::encode));
    }
    Proved {
        work_product: WorkProduct {
            intermediate_hashes,
            num_matrices: plan.matrices,
            total_iterations: plan.iterations,
        },
        secret: Secret {
            state,
            uuid: device.uuid.to_string(),
            seed,
        },
    }
}

/// Checks one root of a work product by making its matrix again; `index` counts through all iterations.
///
/// False for an index or a shape that this device and profile cannot have. Only the root at `index` is
/// looked at; that all iterations were done follows from the prover's being able to decrypt.
#[must_use]
pub fn check(
    device: &DeviceInfo,
    seed: u64,
    work_product: &WorkProduct,
    index: usize,
    profile: &Profile,
) -> bool {
    let plan = Plan::new(device, seed, work_product.total_iterations, profile);
    let expected = plan.matrices as usize * plan.iterations as usize;
    if work_product.total_iterations != plan.iterations
        || work_product.num_matrices != plan.matrices
        || work_product.intermediate_hashes.len() != expected
    {
        return false;
    }
    let Some(shown) = work_product.intermediate_hashes.get(index) else {
        return false;
    };
    let index = u32::try_from(index).expect("below matrices x iterations");
    let (iteration, number) = (index / plan.matrices, index % plan.matrices);
    let matrices = plan.matrices(iteration, number + 1);
    matrices
        .last()
        .is_some_and(|matrix| hex::encode(commitment::root(matrix)) == *shown)
}
