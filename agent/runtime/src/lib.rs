//! Workload to objects, diff, and the Runtime trait with its implementations.
