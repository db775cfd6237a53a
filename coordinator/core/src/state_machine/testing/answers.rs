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

/// What is on the disk after these changes.
fn write_down(answers: &mut Answers, disk: &mut BTreeMap<RequestId, Vec<u8>>) {
    for (key, value) in answers.drain_changed() {
        match value {
            Some(value) => drop(disk.insert(key, value)),
            None => assert!(disk.remove(&key).is_some(), "what was never there is not removed"),
        }
    }
}

fn read_back(disk: &BTreeMap<RequestId, Vec<u8>>) -> Answers {
    let mut answers = Answers::default();
    for (key, value) in disk {
        answers
            .restore(*key, value)
            .expect("it was written by this program");
    }
    answers
}

/// Beside a plain map: names in any order, some without the time, given by clocks that differ; read back now and then.
#[test]
fn answers_are_those_of_a_plain_map_and_the_oldest_goes_first() {
    let (mut answers, mut plain) = (Answers::default(), BTreeMap::new());
    let mut disk = BTreeMap::new();
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
        if step % 700 == 0 {
            write_down(&mut answers, &mut disk);
            assert!(answers.are_consistent());
            if random.bool() {
                answers = read_back(&disk);
            }
        }
    }
    assert_eq!(answers.len(), plain.len());
    for (request, (at, answer)) in plain {
        assert_eq!(answers.get(request), Some(Answered { at, answer }));
    }
    assert!(answers.are_consistent());
    write_down(&mut answers, &mut disk);
    assert_eq!(read_back(&disk), answers);
    assert!(disk.len() < answers.len() / 50, "{} pieces", disk.len());
}

/// A piece that is full when it is written is cut in two by the next answer: both halves are written.
#[test]
fn a_full_piece_that_is_cut_in_two_is_written_anew() {
    for middle in [1, 255, 127] {
        let (mut answers, mut disk) = (Answers::default(), BTreeMap::new());
        let done = || Answered {
            at: UnixMillis(BEGAN),
            answer: Ok(Reply::Done),
        };
        for number in 0..128 {
            answers.insert(RequestId(2 * number), done());
        }
        write_down(&mut answers, &mut disk);
        assert_eq!(disk.len(), 1);
        answers.insert(RequestId(middle), done());
        write_down(&mut answers, &mut disk);
        assert_eq!(disk.len(), 2);
        assert_eq!(read_back(&disk), answers, "with {middle}");
    }
}

/// Each answer was a row of its own, and each write an insertion and a removal on every member.
#[test]
fn answers_in_rows_of_their_own_are_read_and_written_in_pieces() {
    let answer_of = |number: u64| match number % 3 {
        0 => Ok(Reply::Done),
        1 => Ok(Reply::Unchanged),
        _ => Err(Rejection::Replayed),
    };
    let (mut disk, mut expected) = (BTreeMap::new(), Answers::default());
    for number in 0..300 {
        let request = RequestId::new(UnixMillis(BEGAN + number), u128::from(number));
        let (at, answer) = (UnixMillis(BEGAN + number), answer_of(number));
        let answered = Answered { at, answer };
        let single = [vec![0], postcard::to_stdvec(&answered).unwrap()].concat();
        disk.insert(request, single);
        expected.insert(request, answered);
    }
    let mut answers = read_back(&disk);
    assert_eq!(answers, expected);
    assert!(answers.are_consistent());
    write_down(&mut answers, &mut disk);
    assert!(disk.values().all(|value| value.first() == Some(&1)));
    assert!(disk.len() <= 5, "{} pieces", disk.len());
    assert_eq!(read_back(&disk), expected);
    assert_eq!(answers.drain_changed().count(), 0);
}

#[test]
fn a_piece_is_stored_alike_and_a_damaged_one_is_refused() {
    let mut answers = Answers::default();
    for (number, answer) in [Ok(Reply::Done), Ok(Reply::Unchanged), Err(Rejection::Replayed)]
        .into_iter()
        .enumerate()
    {
        let at = UnixMillis(BEGAN + number as u64);
        answers.insert(RequestId(number as u128 + 1), Answered { at, answer });
    }
    let pieces: Vec<_> = answers.drain_changed().collect();
    let [(key, Some(piece))] = pieces.as_slice() else {
        panic!("it is one piece: {pieces:?}")
    };
    assert_eq!((*key, hex::encode(piece).as_str()), (RequestId(1), PIECE));
    let rows = piece.len() - 3 * 25;
    let refused = |what: &str, key: u128, piece: &[u8]| {
        let restored = Answers::default().restore(RequestId(key), piece);
        assert_eq!(restored, None, "{what}");
    };
    refused("cut short", 1, &piece[..piece.len() - 1]);
    refused("without rows", 1, &piece[..rows]);
    refused("before its key", 2, piece);
    refused(
        "without the first row's answer",
        1,
        &[&[1, 0], &piece[rows..]].concat(),
    );
    let mut damaged = piece.clone();
    damaged[rows + 24] = 3;
    refused("a word that is none", 1, &damaged);
    let mut damaged = piece.clone();
    damaged[rows..].rotate_left(25);
    refused("out of order", 1, &damaged);
    refused("a form that is none", 1, &[2]);
    assert_eq!(answers.restore(RequestId(1), piece), None, "it is there already");
    assert_eq!(answers.restore(RequestId(0), piece), None, "others are there");
}

const PIECE: &str = "010103010200000000000000000000000000000001000001a3185c50000000000000000000000000000000000002000001a3185c50010100000000000000000000000000000003000001a3185c500202";
