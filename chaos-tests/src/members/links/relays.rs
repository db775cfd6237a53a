//! A relay in front of each member, a gate in front of the validator for each.

use std::net::IpAddr;

use super::MEMBERS;
use crate::faults::gate::Gate;
use crate::faults::relay::{Direction, Quality, Relay};
use crate::members::cluster::Way;
use crate::members::trial::Place;
use crate::storm::doors;

pub(super) struct Relays {
    relays: Vec<Relay>,
    gates: Vec<Gate>,
    /// Members send from the address of their door.
    addresses: Vec<IpAddr>,
}

impl Relays {
    /// Those of a cluster that is not there yet, and how its hosts are reached.
    pub(super) async fn around(place: &Place) -> anyhow::Result<(Self, Vec<Way>)> {
        let ready = doors::ready(&place.plan.data)?;
        let validator = doors::stand_in_address(&ready)?;
        let mut between = Self {
            relays: Vec::new(),
            gates: Vec::new(),
            addresses: Vec::new(),
        };
        let mut ways = Vec::new();
        for door in place.ground.member_doors(MEMBERS) {
            let (relay, gate) = (Relay::start(door, 1).await?, Gate::start(validator).await?);
            ways.push(Way {
                advertise: Some(relay.address()),
                validator: Some(gate.address()),
                observes: false,
            });
            between.relays.push(relay);
            between.gates.push(gate);
            between.addresses.push(door.ip());
        }
        ways.push(Way {
            observes: true,
            ..Way::default()
        });
        Ok((between, ways))
    }

    /// Datagrams from one member to another are like this from now on, whoever began to speak.
    fn set(&self, from: usize, to: usize, quality: Quality) {
        self.relays[to].set_for(self.addresses[from], Direction::There, quality);
        self.relays[from].set_for(self.addresses[to], Direction::Back, quality);
    }

    pub(super) fn cut(&self, pairs: &[(usize, usize)]) {
        for (from, to) in pairs {
            self.set(*from, *to, Quality::CUT);
        }
    }

    pub(super) fn set_all(&self, quality: Quality) {
        for one in 0..MEMBERS {
            for other in (0..MEMBERS).filter(|other| *other != one) {
                self.set(one, other, quality);
            }
        }
    }

    /// Members hear nothing of other hosts, and these nothing of them.
    pub(super) fn cut_hosts(&self) {
        for relay in &self.relays {
            relay.set_both(Quality::CUT);
        }
        // What members say to each other is not meant.
        self.set_all(Quality::default());
    }

    pub(super) fn change_ports(&self) {
        for relay in &self.relays {
            relay.change_ports();
        }
    }

    pub(super) fn cut_validator_from(&self, member: usize) {
        self.gates[member].cut(true);
    }

    pub(super) fn heal(&self) {
        for relay in &self.relays {
            relay.heal();
        }
        for gate in &self.gates {
            gate.cut(false);
        }
    }
}
