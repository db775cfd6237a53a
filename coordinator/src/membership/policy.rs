//! Who should vote: a pure function of who there is, who answers, and where each one stands.
//!
//! One, three or five of the eligible members vote, spread over sites. A member becomes a learner first and a
//! voter only when it has caught up. A step is never taken that would leave fewer living voters than a
//! majority, and one step ends before the next begins.

use std::collections::{BTreeMap, BTreeSet};

use coordinator_core::state_machine::host::Pin;

/// A member as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its id.
    pub member: u64,
    /// `address:port` of its door.
    pub address: String,
    /// Provider or place; hosts without one share the empty site.
    pub site: String,
    /// What the operator wants.
    pub pin: Pin,
    /// It answers. The leader itself always does.
    pub alive: bool,
    /// It holds nearly all of the log.
    pub caught_up: bool,
}

/// The members that the replicated log knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roles {
    /// The leader, which asks.
    pub leader: u64,
    /// Those whose acknowledgement counts.
    pub voters: BTreeSet<u64>,
    /// Those that only follow.
    pub learners: BTreeSet<u64>,
    /// Where the members of the log are looked for; none where that is not asked.
    pub addresses: BTreeMap<u64, String>,
    /// A change of voters has begun and not ended; until then `voters` are the old and the new ones.
    pub changing: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Let it follow the log.
    AddLearner(u64, String),
    /// Look for it elsewhere: it has moved.
    Move(u64, String),
    /// Let exactly these vote; all of them follow the log already.
    SetVoters(BTreeSet<u64>),
    /// Lead no more, since another set of voters is wanted without this leader.
    Transfer(u64),
    /// It is no host of ours any more.
    Remove(u64),
}

/// How many of so many eligible members vote.
#[must_use]
pub fn voters_wanted(eligible: usize) -> usize {
    match eligible {
        0..=2 => 1,
        3..=4 => 3,
        _ => 5,
    }
}

/// The next step towards the wanted voters, if one is needed and safe.
#[must_use]
pub fn next_step(candidates: &[Candidate], roles: &Roles) -> Option<Step> {
    let by_id: BTreeMap<u64, &Candidate> = candidates.iter().map(|c| (c.member, c)).collect();
    let known = |member: &u64| roles.voters.contains(member) || roles.learners.contains(member);
    if let Some(new) = candidates.iter().find(|c| !known(&c.member)) {
        return Some(Step::AddLearner(new.member, new.address.clone()));
    }
    let has_moved = |c: &&Candidate| {
        let known = roles.addresses.get(&c.member);
        known.is_some_and(|known| *known != c.address)
    };
    // Also one that does not answer: that is what comes of having moved.
    if let Some(moved) = candidates.iter().find(has_moved) {
        return Some(Step::Move(moved.member, moved.address.clone()));
    }
    let wanted = wanted(candidates, roles);
    if roles.changing {
        return is_safe(&wanted, &by_id).then_some(Step::SetVoters(wanted));
    }
    if wanted != roles.voters && is_safe(&wanted, &by_id) {
        if !wanted.contains(&roles.leader) {
            let able = |member: &&u64| by_id.get(*member).is_some_and(|c| c.alive && c.caught_up);
            let both = wanted.intersection(&roles.voters).find(able).copied();
            // Nobody of the wanted ones can lead yet: let one in beside this leader first.
            return Some(both.map_or_else(
                || Step::SetVoters(wanted.iter().copied().chain([roles.leader]).collect()),
                Step::Transfer,
            ));
        }
        return Some(Step::SetVoters(wanted));
    }
    let gone = |member: &&u64| !by_id.contains_key(member);
    let gone = roles.learners.iter().find(gone).copied();
    gone.map(Step::Remove)
}

/// The best set of voters that can be had now.
fn wanted(candidates: &[Candidate], roles: &Roles) -> BTreeSet<u64> {
    let votes = |c: &Candidate| roles.voters.contains(&c.member);
    let eligible = candidates.iter().filter(|c| c.pin != Pin::Never).count();
    let mut able: Vec<&Candidate> = candidates
        .iter()
        .filter(|c| c.pin != Pin::Never && (votes(c) || (c.alive && c.caught_up)))
        .collect();
    let mut chosen: Vec<&Candidate> = Vec::new();
    let count = voters_wanted(eligible);
    while chosen.len() < count && !able.is_empty() {
        let neighbours = |c: &Candidate| chosen.iter().filter(|other| other.site == c.site).count();
        let best = (0..able.len())
            .min_by_key(|index| {
                let c = able[*index];
                (
                    c.pin != Pin::Voter,
                    !c.alive,
                    neighbours(c),
                    !votes(c),
                    c.member != roles.leader,
                    c.member,
                )
            })
            .expect("not empty");
        chosen.push(able.remove(best));
    }
    // Two voters survive no more than one does, and four no more than three.
    if chosen.len().is_multiple_of(2)
        && let Some(position) = chosen.iter().rposition(|c| c.member != roles.leader)
    {
        chosen.remove(position);
    }
    chosen.iter().map(|c| c.member).collect()
}

/// True if a majority of these voters lives.
fn is_safe(voters: &BTreeSet<u64>, by_id: &BTreeMap<u64, &Candidate>) -> bool {
    let alive = voters
        .iter()
        .filter(|member| by_id.get(member).is_some_and(|c| c.alive));
    alive.count() > voters.len() / 2
}

/// What the loss of a whole site would leave.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct SiteLoss {
    /// The site.
    pub site: String,
    /// Voters there.
    pub voters: usize,
    /// Writes go on without it.
    pub survives: bool,
}

/// For each site with a member, what its loss would do. Dead voters elsewhere count as lost.
#[must_use]
pub fn losses(candidates: &[Candidate], roles: &Roles) -> Vec<SiteLoss> {
    let sites: BTreeSet<&str> = candidates.iter().map(|c| c.site.as_str()).collect();
    let voters = || candidates.iter().filter(|c| roles.voters.contains(&c.member));
    let of_site = |site| {
        let left = voters().filter(|c| c.site != site && c.alive).count();
        SiteLoss {
            site: str::to_owned(site),
            voters: voters().filter(|c| c.site == site).count(),
            survives: left > roles.voters.len() / 2,
        }
    };
    sites.into_iter().map(of_site).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(member: u64) -> Candidate {
        Candidate {
            member,
            address: format!("10.0.0.{member}:4433"),
            site: String::new(),
            pin: Pin::Auto,
            alive: true,
            caught_up: true,
        }
    }

    fn roles(voters: &[u64], learners: &[u64]) -> Roles {
        Roles {
            leader: voters[0],
            voters: voters.iter().copied().collect(),
            learners: learners.iter().copied().collect(),
            addresses: BTreeMap::new(),
            changing: false,
        }
    }

    fn voters(list: &[u64]) -> Option<Step> {
        Some(Step::SetVoters(list.iter().copied().collect()))
    }

    /// Takes steps until there is none; the voters at the end.
    fn settle(candidates: &[Candidate], mut roles: Roles) -> BTreeSet<u64> {
        for _ in 0..20 {
            let Some(step) = next_step(candidates, &roles) else {
                return roles.voters;
            };
            match step {
                Step::AddLearner(member, _) => {
                    roles.learners.insert(member);
                }
                Step::Move(member, address) => {
                    roles.addresses.insert(member, address);
                }
                Step::SetVoters(voters) => {
                    roles.learners.extend(roles.voters.difference(&voters));
                    roles.learners.retain(|member| !voters.contains(member));
                    roles.voters = voters;
                }
                Step::Transfer(member) => roles.leader = member,
                Step::Remove(member) => {
                    assert!(roles.learners.remove(&member), "only learners are removed");
                }
            }
        }
        panic!("no end: {candidates:?} {roles:?}");
    }

    #[test]
    fn one_three_or_five_vote() {
        for (hosts, expected) in [(1, 1), (2, 1), (3, 3), (4, 3), (5, 5), (9, 5)] {
            let candidates: Vec<_> = (1..=hosts).map(candidate).collect();
            assert_eq!(
                settle(&candidates, roles(&[1], &[])).len(),
                expected,
                "{hosts} hosts"
            );
        }
    }

    #[test]
    fn a_new_member_learns_before_it_votes() {
        let mut candidates: Vec<_> = (1..=3).map(candidate).collect();
        let step = next_step(&candidates, &roles(&[1], &[2]));
        assert_eq!(step, Some(Step::AddLearner(3, "10.0.0.3:4433".to_owned())));
        candidates[2].caught_up = false;
        assert_eq!(next_step(&candidates, &roles(&[1], &[2, 3])), None);
        candidates[2].caught_up = true;
        assert_eq!(next_step(&candidates, &roles(&[1], &[2, 3])), voters(&[1, 2, 3]));
    }

    #[test]
    fn a_member_that_moved_is_looked_for_at_its_new_address_before_it_is_replaced() {
        let mut candidates: Vec<_> = (1..=4).map(candidate).collect();
        let mut now = roles(&[1, 2, 3], &[4]);
        now.addresses = candidates.iter().map(|c| (c.member, c.address.clone())).collect();
        assert_eq!(next_step(&candidates, &now), None);
        candidates[1].address = "10.9.9.9:4433".to_owned();
        candidates[1].alive = false;
        let step = next_step(&candidates, &now);
        assert_eq!(step, Some(Step::Move(2, "10.9.9.9:4433".to_owned())));
        now.changing = true;
        assert_eq!(next_step(&candidates, &now), step, "the change needs it");
    }

    #[test]
    fn a_dead_voter_is_replaced_when_somebody_can_and_kept_when_nobody_can() {
        let mut candidates: Vec<_> = (1..=4).map(candidate).collect();
        candidates[1].alive = false;
        assert_eq!(
            next_step(&candidates, &roles(&[1, 2, 3], &[4])),
            voters(&[1, 3, 4])
        );
        candidates[3].alive = false;
        assert_eq!(next_step(&candidates, &roles(&[1, 2, 3], &[4])), None);
    }

    #[test]
    fn nothing_changes_without_a_living_majority_of_the_new_voters() {
        let mut candidates: Vec<_> = (1..=3).map(candidate).collect();
        candidates[1].alive = false;
        candidates[2].alive = false;
        assert_eq!(next_step(&candidates[..2], &roles(&[1, 2, 3], &[])), voters(&[1]));
        assert_eq!(next_step(&candidates, &roles(&[1, 2, 3], &[])), None);
    }

    #[test]
    fn a_change_that_an_earlier_leader_began_is_ended() {
        let candidates: Vec<_> = (1..=3).map(candidate).collect();
        let mut now = roles(&[1, 2, 3], &[]);
        assert_eq!(next_step(&candidates, &now), None);
        now.changing = true;
        assert_eq!(next_step(&candidates, &now), voters(&[1, 2, 3]));
    }

    #[test]
    fn sites_share_the_votes() {
        let mut candidates: Vec<_> = (1..=6).map(candidate).collect();
        for (candidate, site) in candidates.iter_mut().zip(["a", "a", "a", "a", "b", "c"]) {
            candidate.site = site.to_owned();
        }
        let four = [0, 1, 4, 5].map(|index| candidates[index].clone());
        let chosen = settle(&four, roles(&[1], &[]));
        assert_eq!(chosen, BTreeSet::from([1, 5, 6]));
        let all = losses(&four, &roles(&[1, 5, 6], &[2]));
        assert!(
            all.iter().all(|loss| loss.survives && loss.voters == 1),
            "{all:?}"
        );
        let bad = losses(&candidates[..3], &roles(&[1, 2, 3], &[]));
        assert_eq!(
            bad,
            [SiteLoss {
                site: "a".to_owned(),
                voters: 3,
                survives: false
            }]
        );
    }

    #[test]
    fn the_operator_decides() {
        let mut candidates: Vec<_> = (1..=4).map(candidate).collect();
        candidates[0].pin = Pin::Never;
        candidates[3].pin = Pin::Voter;
        let step = next_step(&candidates, &roles(&[1, 2, 3], &[4]));
        assert_eq!(step, Some(Step::Transfer(2)), "the leader makes room");
        let settled = settle(&candidates, roles(&[2, 1, 3], &[4]));
        assert_eq!(settled, BTreeSet::from([2, 3, 4]));
        let settled = settle(&candidates, roles(&[1], &[2, 3, 4]));
        assert_eq!(settled, BTreeSet::from([2, 3, 4]));
    }

    #[test]
    fn a_removed_host_loses_its_vote_and_then_its_place() {
        let candidates: Vec<_> = [1, 2, 4].map(candidate).to_vec();
        let now = roles(&[1, 2, 3], &[4]);
        assert_eq!(next_step(&candidates, &now), voters(&[1, 2, 4]));
        assert_eq!(
            next_step(&candidates, &roles(&[1, 2, 4], &[3])),
            Some(Step::Remove(3))
        );
        // Two are left: one votes, the other learns.
        let settled = settle(&candidates[..2], roles(&[1, 2, 4], &[]));
        assert_eq!(settled, BTreeSet::from([1]));
    }

    #[test]
    fn whatever_happens_it_settles_on_a_living_majority() {
        for seed in 0..2_000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let count = random.u64(1..8);
            let candidates: Vec<_> = (1..=count)
                .map(|member| Candidate {
                    site: ["a", "b", "c"][random.usize(..3)].to_owned(),
                    pin: [Pin::Auto, Pin::Auto, Pin::Never, Pin::Voter][random.usize(..4)],
                    alive: member == 1 || random.u8(..4) > 0,
                    caught_up: member == 1 || random.u8(..4) > 0,
                    ..candidate(member)
                })
                .collect();
            let settled = settle(&candidates, roles(&[1], &[]));
            assert!(
                settled.len() % 2 == 1,
                "seed {seed}: {settled:?} of {candidates:?}"
            );
            let alive = settled
                .iter()
                .filter(|member| candidates[usize::try_from(**member).expect("small") - 1].alive);
            assert!(alive.count() > settled.len() / 2, "seed {seed}");
        }
    }
}
