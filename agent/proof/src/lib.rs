//! Pure arithmetic of our own GPU proof: prove and verify on the CPU.
