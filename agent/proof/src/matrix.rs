//! Square matrices of small integers: entries made by counter, exact products, and Freivalds' check.
//!
//! Any entry can be made alone and in any order, and sums are exact, so the result does not depend on the
//! machine. The 64-bit mixing is the published SplitMix64 finaliser.

/// Increment of SplitMix64: 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;
/// The prime 2^61 - 1, the field of Freivalds' check.
const PRIME: u64 = (1 << 61) - 1;

/// SplitMix64's finaliser: a bijection of 64-bit words.
#[must_use]
pub fn mix(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Brings a word to -127..=127 by its upper half.
fn small(word: u64) -> i8 {
    let scaled = ((word >> 32) * 255) >> 32;
    i8::try_from(i64::try_from(scaled).expect("below 255") - 127).expect("-127..=127")
}

/// The word at a position under a key.
fn word_at(key: u64, row: usize, column: usize) -> u64 {
    let position = ((row as u64) << 32) | column as u64;
    mix(key.wrapping_add(position.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// The entry of a given (not computed) matrix.
#[must_use]
pub fn entry(key: u64, row: usize, column: usize) -> i8 {
    small(word_at(key, row, column))
}

/// An exact sum brought back to an entry. The key and the position take part, so that structure in the
/// factors does not survive.
#[must_use]
pub fn reduce(key: u64, row: usize, column: usize, sum: i32) -> i8 {
    let sum = u64::from(sum.cast_unsigned());
    small(mix(word_at(key, row, column) ^ sum.wrapping_mul(GOLDEN)))
}

/// A square matrix of entries from -127 to 127, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Matrix {
    n: usize,
    entries: Vec<i8>,
}

/// An exact product of two matrices, before it is reduced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    n: usize,
    sums: Vec<i32>,
}

impl Matrix {
    /// The given matrix of a key.
    #[must_use]
    pub fn from_key(key: u64, n: usize) -> Self {
        let entries = (0..n * n).map(|at| entry(key, at / n, at % n)).collect();
        Self { n, entries }
    }

    /// A matrix from entries row by row; `None` unless there are `n * n` of them.
    #[must_use]
    pub fn from_entries(n: usize, entries: Vec<i8>) -> Option<Self> {
        (entries.len() == n.checked_mul(n)?).then_some(Self { n, entries })
    }

    /// Rows, and columns.
    #[must_use]
    pub fn n(&self) -> usize {
        self.n
    }

    /// One row.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn row(&self, row: usize) -> &[i8] {
        &self.entries[row * self.n..(row + 1) * self.n]
    }

    /// The exact product `self` x `right`.
    ///
    /// # Panics
    /// If the sizes differ.
    #[must_use]
    pub fn times(&self, right: &Self) -> Product {
        assert_eq!(self.n, right.n, "matrices of one proof have one size");
        let n = self.n;
        let mut sums = vec![0_i32; n * n];
        for (row, out) in sums.chunks_exact_mut(n).enumerate() {
            for (left, right_row) in self.row(row).iter().zip(right.entries.chunks_exact(n)) {
                let left = i32::from(*left);
                for (sum, right) in out.iter_mut().zip(right_row) {
                    *sum += left * i32::from(*right);
                }
            }
        }
        Product { n, sums }
    }
}

impl Product {
    /// A product from sums row by row, as a prover opens it; `None` unless there are `n * n` of them.
    #[must_use]
    pub fn from_sums(n: usize, sums: Vec<i32>) -> Option<Self> {
        (sums.len() == n.checked_mul(n)?).then_some(Self { n, sums })
    }

    /// The exact sums, row by row.
    #[must_use]
    pub fn sums(&self) -> &[i32] {
        &self.sums
    }

    /// The next matrix of the chain.
    #[must_use]
    pub fn reduced(&self, key: u64) -> Matrix {
        let n = self.n;
        let entries = self
            .sums
            .iter()
            .enumerate()
            .map(|(at, sum)| reduce(key, at / n, at % n, *sum))
            .collect();
        Matrix { n, entries }
    }

    /// Freivalds' check that this is `left` x `right`, in n^2 steps: both sides times a vector that the
    /// verifier draws from `challenge` *after* the prover has committed. A right product always passes; a
    /// wrong one passes with a probability below 2^-60.
    #[must_use]
    pub fn is_product_of(&self, left: &Matrix, right: &Matrix, challenge: [u64; 2]) -> bool {
        if left.n != self.n || right.n != self.n {
            return false;
        }
        let vector: Vec<u64> = (0..self.n)
            .map(|at| word_at(challenge[0], at, 0) ^ word_at(challenge[1], 0, at))
            .map(|word| word % PRIME)
            .collect();
        let of_right = times_vector(&right.entries, &vector);
        times_vector(&self.sums, &vector) == times_vector(&left.entries, &of_right)
    }
}

/// Matrix times vector over the field.
fn times_vector<E: Copy + Into<i64>>(entries: &[E], vector: &[u64]) -> Vec<u64> {
    let prime = i128::from(PRIME);
    entries
        .chunks_exact(vector.len().max(1))
        .map(|row| {
            let sum: i128 = row
                .iter()
                .zip(vector)
                // At most 2^32 x 2^61 each: 2^34 of them fit.
                .map(|(entry, value)| i128::from((*entry).into()) * i128::from(*value))
                .sum();
            u64::try_from(sum.rem_euclid(prime)).expect("a remainder of a 61-bit prime")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published first outputs of SplitMix64 from seed 0.
    #[test]
    fn mixing_is_splitmix64() {
        let outputs = [1_u64, 2, 3].map(|step| mix(step.wrapping_mul(GOLDEN)));
        assert_eq!(
            outputs,
            [
                0xE220_A839_7B1D_CDAF,
                0x6E78_9E6A_A1B9_65F4,
                0x06C4_5D18_8009_454F
            ]
        );
    }

    #[test]
    fn entries_cover_their_range_and_nothing_else() {
        assert_eq!((small(0), small(u64::MAX)), (-127, 127));
        let mut counts = [0_u32; 256];
        for at in 0..25_500 {
            counts[usize::try_from(i16::from(entry(7, at, at * 3)) + 128).expect("0..=255")] += 1;
        }
        assert_eq!(counts[0], 0, "-128 never appears");
        assert!(
            counts[1..].iter().all(|count| (40..200).contains(count)),
            "{counts:?}"
        );
    }

    #[test]
    fn products_equal_the_schoolbook() {
        let (a, b) = (Matrix::from_key(1, 17), Matrix::from_key(2, 17));
        let product = a.times(&b);
        for row in 0..17 {
            for column in 0..17 {
                let sum: i32 = (0..17)
                    .map(|k| i32::from(a.row(row)[k]) * i32::from(b.row(k)[column]))
                    .sum();
                assert_eq!(product.sums()[row * 17 + column], sum);
            }
        }
    }

    #[test]
    fn freivalds_accepts_right_and_refuses_wrong_products() {
        for seed in 0..40_u64 {
            let n = 1 + usize::try_from(seed).expect("small") % 13;
            let (a, b) = (Matrix::from_key(seed, n), Matrix::from_key(seed + 1000, n));
            let right = a.times(&b);
            assert!(right.is_product_of(&a, &b, [seed, 9]));
            let mut sums = right.sums().to_vec();
            let at = usize::try_from(mix(seed)).expect("64-bit") % sums.len();
            sums[at] += if seed % 2 == 0 { 1 } else { -1 };
            let wrong = Product::from_sums(n, sums).expect("same size");
            assert!(!wrong.is_product_of(&a, &b, [seed, 9]), "seed {seed}");
            assert!(!right.is_product_of(&a, &Matrix::from_key(0, n + 1), [seed, 9]));
        }
        assert_eq!(Product::from_sums(3, vec![0; 8]), None);
        assert_eq!(Matrix::from_entries(3, vec![0; 8]), None);
    }
}
