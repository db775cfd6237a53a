//! How long answers to requests are remembered and in which order they go, and that request names lie side by side.

use std::collections::BTreeMap;

use protocol::time::UnixMillis;

use super::World;
use crate::state_machine::answers::{Answered, Answers};
use crate::state_machine::command::{
    ANSWERS_MAX, Answer, Command, Proposal, REQUEST_MEMORY_LEAST_MS, Rejection, Reply, RequestId,
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

/// Beside a plain map: names in any order, some without the time, given by clocks that differ.
#[test]
fn answers_are_those_of_a_plain_map_and_the_oldest_goes_first() {
    let (mut answers, mut plain) = (Answers::default(), BTreeMap::new());
    let mut random = fastrand::Rng::with_seed(1);
    let mut now = BEGAN;
    for step in 0..20_000 {
        now += random.u64(0..3);
        let clock = UnixMillis(now + 500 * random.u64(0..3));
        let request = match step % 10 {
            0 => RequestId(random.u128(..)),
            _ => RequestId::new(clock, random.u128(..)),
        };
        let answer: Answer = match random.u8(0..8) {
            0 => Err(Rejection::Replayed),
            1 => Ok(Reply::Unchanged),
            _ => Ok(Reply::Done),
        };
        let at = UnixMillis(now);
        plain.insert(request, (at, answer.clone()));
        answers.insert(request, Answered { at, answer });
        while plain.len() > 2_000 {
            let oldest = plain.iter().min_by_key(|(request, (at, _))| (*at, **request));
            let oldest = oldest.map(|(request, _)| *request).unwrap();
            assert!(answers.forget_oldest(UnixMillis(now), 0));
            assert_eq!(answers.get(oldest), None);
            plain.remove(&oldest);
        }
    }
    assert_eq!(answers.len(), plain.len());
    for (request, (at, answer)) in plain {
        assert_eq!(answers.get(request), Some(Answered { at, answer }));
    }
    assert!(answers.ages_are_right());
    let mut restored = Answers::default();
    for (request, answered) in answers.drain_changed() {
        if let Some(answered) = answered {
            restored.restore(request, answered);
        }
    }
    assert_eq!(restored, answers);
}
