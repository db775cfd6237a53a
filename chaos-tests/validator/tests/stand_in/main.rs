//! The stand-in from outside: a miner written here against reqwest and tokio-tungstenite, the chute stand-in
//! as its containers, and clients that are not ours.

mod development;
mod faults;
mod jobs;
mod launch;
mod peers;
mod registry;
mod socket;
mod support;
