//! How a host comes into the cluster, comes back into it, and keeps its certificate.
//!
//! ```text
//! operator: host invite --> token --> join on the host --QUIC, no certificate yet--> any member
//!                                       key made here                                 JoinHost in the log
//!                                       admission.json, host.pem, ca.pem  <---------- certificate signed
//! ```
//! `token.rs` is what a host is invited with, `admission.rs` what it keeps afterwards, `wire.rs` what is asked
//! and answered, `client.rs` the asking host, `gate.rs` the answering member. `node.rs` is how nodes of a shared
//! Kubernetes cluster enter without an invitation, `reach.rs` whether UDP gets there at all. `authority.rs` opens the
//! authority's key and makes the next authority's.

pub mod admission;
pub mod authority;
pub mod client;
pub mod gate;
pub mod node;
pub mod reach;
pub mod token;
pub mod wire;

pub use admission::Admission;
pub use gate::Gate;
pub(crate) use gate::STRANGER;
pub use node::{Node, Nodes, Notice};
pub use token::Token;
