//! Placement decisions: a strategy looks at a view of the state and proposes.
