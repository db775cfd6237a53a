//! Machines of a miner with real agents on them: a cluster that is lost as a whole or in its majority, another
//! authority, and UDP that does not get through.

mod authorities;
mod doctor;
mod machine;
mod recover;
mod restore;
#[path = "../processes/signed.rs"]
mod signed;
