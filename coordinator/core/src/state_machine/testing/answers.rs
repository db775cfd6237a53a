//! How long answers to requests are remembered, and that request names lie side by side.

use protocol::time::UnixMillis;

use super::World;
use crate::state_machine::command::{
    ANSWERS_MAX, Command, Proposal, REQUEST_MEMORY_LEAST_MS, Reply, RequestId,
};
use crate::state_machine::state::State;
use crate::state_machine::{apply, invariant};

const BEGAN: u64 = 1_800_000_000_000;

fn write(state: &mut State, number: usize, at: u64) -> RequestId {
    let request = RequestId::new(UnixMillis(at), number as u128);
    let proposal = Proposal {
        request,
        at: UnixMillis(at),
        guard: None,
        command: Command::PassTime,
    };
    assert_eq!(apply(state, proposal), Ok(Reply::Unchanged));
    request
}

/// Each answer once cost 230 bytes for ten minutes, which a script that writes without pause filled the memory with.
#[test]
fn a_flood_is_forgotten_early_but_not_before_its_proposers_have_their_answers() {
    let World(mut state, _) = World::empty();
    let first = write(&mut state, 1, BEGAN);
    for number in 2..ANSWERS_MAX + 10 {
        write(&mut state, number, BEGAN + 1);
    }
    assert_eq!(state.answer_to(first), Some(Ok(Reply::Unchanged)), "it is young");
    let later = BEGAN + REQUEST_MEMORY_LEAST_MS;
    let last = write(&mut state, ANSWERS_MAX + 10, later);
    assert_eq!(state.answer_to(first), None);
    assert!(state.answer_to(last).is_some());
    write(&mut state, ANSWERS_MAX + 11, later + 1);
    assert_eq!(state.answers.len(), ANSWERS_MAX);
    assert_eq!(invariant::violations(&state), Vec::<String>::new());
}

#[test]
fn names_of_requests_sort_by_time_in_memory_and_as_they_are_stored() {
    let stored = |request: RequestId| postcard::to_stdvec(&request).unwrap();
    for step in 0..2_000 {
        let at = BEGAN + 37 * 128 * step;
        let early = RequestId::new(UnixMillis(at), u128::MAX);
        let late = RequestId::new(UnixMillis(at + 128), 0);
        assert!(early < late, "{early:?} {late:?}");
        assert!(stored(early) < stored(late), "{early:?} {late:?}");
    }
    let (one, other) = (
        RequestId::new(UnixMillis(BEGAN), 1),
        RequestId::new(UnixMillis(BEGAN), 2),
    );
    assert_ne!(one, other);
    // 72 random bits are left.
    let mut seen = std::collections::BTreeSet::new();
    for bit in 0..72 {
        seen.insert(RequestId::new(UnixMillis(BEGAN), 1 << bit));
    }
    assert_eq!(seen.len(), 72);
}
