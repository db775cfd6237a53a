//! The replicated state machine and the scheduler, pure.
