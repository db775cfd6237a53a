//! Placeholder for the room `signer`.
