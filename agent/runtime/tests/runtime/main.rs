//! The runtimes from outside: one contract for all, then what only child processes can do wrong.

mod contract;
mod crash;
mod process;
mod support;
