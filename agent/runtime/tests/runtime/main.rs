//! The runtimes from outside: one contract for all, then what only child processes can do wrong.

mod chart;
mod contract;
mod control_plane;
mod crash;
mod kubelet;
mod kubernetes;
mod node_ports;
mod process;
mod support;
mod taken_over;
