//! Simulation, faults, invariants, oracle, process storms.
