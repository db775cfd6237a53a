//! How a host comes into the cluster. `token.rs` is what it is invited with.

pub mod token;

pub use token::Token;
