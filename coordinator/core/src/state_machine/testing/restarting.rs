//! A state that is read back from its rows is the state that wrote them.

use std::collections::BTreeMap;

use protocol::hotkey::Signer;
use protocol::id::{GpuId, ServerId};

use crate::state_machine::effect::{EffectKind, Subject};
use crate::state_machine::state::{Faults, State};

/// The state that a member begins with after it has written all its rows.
fn read_back(state: &mut State) -> State {
    let rows: BTreeMap<(u8, Vec<u8>), Vec<u8>> = state
        .drain_rows()
        .into_iter()
        .filter_map(|row| Some(((row.table, row.key), row.value?)))
        .collect();
    let mut rows = rows.into_iter().map(|((table, key), value)| (table, key, value));
    State::from_rows(&mut rows, Faults::none()).expect("good rows")
}

/// Rows were taken in the order of their bytes, in which 256 comes before 255: a member that had started anew did
/// effects of one subject in another order than the others, and refused what they took.
#[test]
fn effects_of_one_subject_keep_their_order() {
    let validator = Signer::from_seed(&[2; 32]).hotkey().clone();
    let subject = Subject::Server(ServerId::parse("gpu-1").unwrap());
    for first in [0, 127, 255, 383, 16_383, 65_535] {
        let mut state = State::new(Faults::none());
        state.settings_mut().next_effect = first;
        for number in 0..3 {
            let gpu = GpuId::parse(&format!("{number:032x}")).unwrap();
            let kind = EffectKind::DeleteGpu { gpu };
            state.push_effect(subject.clone(), validator.clone(), kind);
        }
        let read = read_back(&mut state);
        assert_eq!(read, state, "from {first}");
        let ready: Vec<u64> = read.outbox().ready().map(|effect| effect.id).collect();
        assert_eq!(ready, [first]);
        let all: Vec<u64> = read
            .outbox()
            .of_subject(&subject)
            .map(|effect| effect.id)
            .collect();
        assert_eq!(all, [first, first + 1, first + 2]);
    }
}
