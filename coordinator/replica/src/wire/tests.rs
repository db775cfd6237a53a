//! Golden bytes of everything that members say, and nonsense that is refused.

use super::*;
use crate::format::encode_entry;
use crate::raft::{Commands, RaftEntry};
use openraft::EntryPayload;
use openraft::entry::RaftEntry as _;

const BALLOT: Ballot = Ballot {
    term: 300,
    member: 2,
    committed: true,
};
const PLACE: Position = Position {
    term: 7,
    member: 1,
    index: 1000,
};
const NAME: SnapshotName = SnapshotName {
    last: Some(PLACE),
    size_bytes: 5_000_000,
    crc: 0xDEAD_BEEF,
};

fn entry(index: u64) -> Bytes {
    let id = RaftLogId::from(Position { index, ..PLACE });
    let commands = Commands::new(&[b"ab"]);
    Bytes(encode_entry(&RaftEntry::new(id, EntryPayload::Normal(commands))))
}

fn requests() -> Vec<(Request, &'static str)> {
    let candidacy = Candidacy {
        ballot: BALLOT,
        last: Some(PLACE),
        transfer: true,
    };
    let append = Append {
        ballot: BALLOT,
        previous: Some(PLACE),
        committed: None,
        entries: vec![entry(1001)],
    };
    let chunk = Chunk {
        ballot: BALLOT,
        name: NAME,
        offset: 1_048_576,
        bytes: Bytes(b"piece".to_vec()),
    };
    let transfer = Transfer {
        ballot: BALLOT,
        to: 3,
        last: Some(PLACE),
    };
    let propose = Request::Propose {
        within_ms: 4500,
        commands: vec![Bytes(b"ab".to_vec()), Bytes(Vec::new())],
    };
    vec![
        (
            Request::Append(append),
            "01efbee7350300ac020201010701e8070001280107000000000000000100000000000000e90300000000000001010000000200000061620e5d85eb",
        ),
        (Request::Vote(candidacy), "01efbee7350301ac020201010701e80701"),
        (Request::PreVote(candidacy), "01efbee7350302ac020201010701e80701"),
        (
            Request::Snapshot(chunk),
            "01efbee7350303ac020201010701e807c096b102effdb6f50d808040057069656365",
        ),
        (Request::Transfer(transfer), "01efbee7350304ac02020103010701e807"),
        (propose, "01efbee735030594230202616200"),
        (Request::ReadIndex { within_ms: 900 }, "01efbee73503068407"),
        (Request::Echo, "01efbee7350307"),
    ]
}

fn answers() -> Vec<(Answer, &'static str)> {
    let voted = Answer::Voted {
        ballot: BALLOT,
        last: None,
        granted: true,
    };
    let large = Refusal::TooLarge {
        size_bytes: 300,
        size_bytes_max: 200,
    };
    let elsewhere = Refusal::NotLeader { leader: Some(3) };
    let unknown = Refusal::OutcomeUnknown("why".to_owned());
    vec![
        (Answer::Appended, "0100"),
        (Answer::AppendedUpTo(Some(PLACE)), "0101010701e807"),
        (Answer::Conflict, "0102"),
        (Answer::HigherBallot(BALLOT), "0103ac020201"),
        (voted, "0104ac0202010001"),
        (Answer::SnapshotAt { offset: 1_048_576 }, "0105808040"),
        (Answer::SnapshotInstalled { ballot: BALLOT }, "0106ac020201"),
        (Answer::Transferring, "0107"),
        (Answer::NotTransferring("no".to_owned()), "0108026e6f"),
        (Answer::Proposed(vec![Bytes(b"ab".to_vec())]), "010901026162"),
        (Answer::NotProposed(Refusal::Busy), "010a00"),
        (Answer::NotProposed(large), "010a01ac02c801"),
        (Answer::NotProposed(elsewhere), "010a020103"),
        (Answer::NotProposed(Refusal::Timeout), "010a03"),
        (Answer::NotProposed(unknown), "010a0403776879"),
        (Answer::NotProposed(Refusal::Stopped), "010a05"),
        (Answer::ReadAt { index: 1000 }, "010be807"),
        (Answer::NotReadable { leader: Some(3) }, "010c0103"),
        (Answer::Echo { lease_ms: 600 }, "010dd804"),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Version 1. Never edit these bytes: members of the previous release send and expect them.
#[test]
fn golden_bytes_of_version_1() {
    let cluster = cluster_mark("c");
    let mut wrong = Vec::new();
    for (request, golden) in requests() {
        let bytes = encode_request(cluster, 3, &request);
        if hex(&bytes) != golden {
            wrong.push(format!("{golden} {}", hex(&bytes)));
        }
        assert_eq!(decode_request(cluster, 3, &bytes), Ok(request));
    }
    for (answer, golden) in answers() {
        let bytes = encode_answer(&answer);
        if hex(&bytes) != golden {
            wrong.push(format!("{golden} {}", hex(&bytes)));
        }
        assert_eq!(decode_answer(&bytes), Ok(answer));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn an_append_becomes_what_it_was() {
    let append = Append {
        ballot: BALLOT,
        previous: Some(PLACE),
        committed: Some(PLACE),
        entries: vec![entry(1001), entry(1002)],
    };
    let rpc = append.clone().into_rpc().expect("the entries follow each other");
    assert_eq!(Append::of(&rpc), append);
    let gap = Append {
        entries: vec![entry(1001), entry(1003)],
        ..append.clone()
    };
    assert!(gap.into_rpc().is_err());
    for index in [u64::MAX, u64::MAX - 1] {
        let previous = Some(Position { index, ..PLACE });
        let endless = Append {
            previous,
            ..append.clone()
        };
        assert!(endless.into_rpc().is_err());
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let cluster = cluster_mark("c");
    for (request, _) in requests() {
        let bytes = encode_request(cluster, 3, &request);
        for length in 0..bytes.len() {
            assert!(decode_request(cluster, 3, &bytes[..length]).is_err());
        }
        let longer = [bytes.as_slice(), b"x"].concat();
        assert_eq!(decode_request(cluster, 3, &longer), Err(Garbage::Nonsense));
        let newer = [&[VERSION + 1], &bytes[1..]].concat();
        assert_eq!(
            decode_request(cluster, 3, &newer),
            Err(Garbage::Version(VERSION + 1))
        );
        for (cluster, to) in [(cluster, 4), (cluster_mark("d"), 3)] {
            assert_eq!(
                decode_request(cluster, to, &bytes),
                Err(Garbage::Misdirected { to: 3 })
            );
        }
    }
    let size_bytes = MESSAGE_BYTES_MAX + 1;
    assert_eq!(
        decode_answer(&vec![VERSION; size_bytes]),
        Err(Garbage::TooLarge { size_bytes })
    );
}

#[test]
fn lists_have_a_limit() {
    let count = LIST_MAX + 1;
    let commands = vec![Bytes(Vec::new()); count];
    let propose = Request::Propose {
        within_ms: 1,
        commands,
    };
    let bytes = encode_request(1, 1, &propose);
    assert_eq!(decode_request(1, 1, &bytes), Err(Garbage::Nonsense));
}
