//! The coordinator: leader, executor, validator connection, host link, management API.

pub mod api;
pub mod backup;
pub mod clock;
pub mod config;
pub mod door;
pub mod executor;
pub mod host_link;
pub mod identity;
pub mod join;
pub mod leader;
pub mod member;
pub mod member_link;
pub mod membership;
pub mod recovery;
pub mod sealed_worker;
pub mod signer;
pub mod store;
pub mod validator;
