//! A validator stand-in and a chute stand-in that speak the real protocol, for development and tests.
//!
//! ```text
//!  scenario, control --> program --> state --> file, ledger, events --> sockets
//!  miner    --> auth --> streams, nodes, launch, instances, jobs ----^
//!  container --> launch (claim, proof, activation), jobs ------------^
//!  miner    --> registry (images from one executable)
//! ```
//!
//! Reading order: [`scenario`] (what is published, relaxed and broken), `state`, `validator` (the one way
//! in), [`event`], [`ledger`], `socket`, `streams`, `nodes` with `verification`, `gates` and `launch`,
//! `instances`, `jobs`, `program`, `registry` with [`image`], [`pay`], `control`, [`server`]. The container's
//! side is [`chute`]. Strict where the real validator is lax; what is relaxed is said in lines to print.

mod auth;
pub mod chute;
mod cipher;
mod clock;
pub mod command;
mod compute;
mod control;
pub mod event;
pub mod faults;
mod gates;
mod gpu;
mod identity;
pub mod image;
mod instances;
mod jobs;
mod launch;
pub mod ledger;
mod nodes;
pub mod pay;
mod problem;
mod program;
mod registry;
mod rows;
pub mod scenario;
pub mod server;
mod servers;
pub mod sites;
mod socket;
mod state;
mod streams;
mod token;
mod validator;
mod verification;
