//! Raft: a replicated, durable log and state behind one non-generic front.
