//! How large a proof is. Parameters are data; a profile's name is part of every key.

/// Size of a proof. Both sides must use the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Enters every key, so that profiles never mix.
    pub name: &'static str,
    /// Rows and columns of a matrix. A sum of `n` products of entries fits 32 bits up to n = 133,000.
    pub n: usize,
    /// Share of a device's memory that is filled with matrices, in thousandths.
    pub memory_permille: u64,
    /// Upper limit of that fill in bytes.
    pub memory_bytes_max: u64,
    /// Dependent reads over all matrices of an iteration.
    pub walk_steps: u32,
}

impl Profile {
    /// For development and tests: a few thousandths of a second on one CPU core.
    pub const DEVELOPMENT: Self = Self {
        name: "development",
        n: 48,
        memory_permille: 950,
        memory_bytes_max: 48 * 48 * 8,
        walk_steps: 64,
    };

    /// For cards: fills 95 % of the memory. A CPU would need that much memory and hours, the verifier's
    /// side of encryption included; a verifier without a card uses openings and Freivalds' check instead.
    pub const STANDARD: Self = Self {
        name: "standard",
        n: 8192,
        memory_permille: 950,
        memory_bytes_max: u64::MAX,
        walk_steps: 1 << 20,
    };

    /// Bytes of one matrix.
    #[must_use]
    pub fn matrix_bytes(&self) -> u64 {
        (self.n * self.n) as u64
    }

    /// Matrices of one iteration on a device with so much memory: at least two given ones and a product.
    #[must_use]
    pub fn matrices(&self, memory_bytes: u64) -> u32 {
        let share = u128::from(memory_bytes) * u128::from(self.memory_permille) / 1000;
        let bytes = share.min(u128::from(self.memory_bytes_max));
        u32::try_from(bytes / u128::from(self.matrix_bytes()).max(1))
            .unwrap_or(u32::MAX)
            .max(3)
    }

    /// Bytes that the matrices of one iteration take on a device with so much memory.
    #[must_use]
    pub fn held_bytes(&self, memory_bytes: u64) -> u64 {
        self.matrix_bytes()
            .saturating_mul(u64::from(self.matrices(memory_bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matrices_fill_the_share_up_to_the_limit() {
        for (profile, memory, matrices) in [
            (Profile::DEVELOPMENT, 17_179_869_184, 8),
            (Profile::DEVELOPMENT, 48 * 48 * 5, 4),
            (Profile::DEVELOPMENT, 0, 3),
            (Profile::STANDARD, 85_031_714_816, 1203),
            (Profile::STANDARD, u64::MAX, u32::MAX),
        ] {
            assert_eq!(profile.matrices(memory), matrices, "{} {memory}", profile.name);
        }
    }

    #[test]
    fn a_product_of_extreme_entries_fits_32_bits() {
        for profile in [Profile::DEVELOPMENT, Profile::STANDARD] {
            assert!(127 * 127 * profile.n < i32::MAX as usize);
        }
    }
}
