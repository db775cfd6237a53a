//! One host's session: what it says becomes commands, and it is told its desired set whenever that changes.

use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::desired::DesiredSet;
use coordinator_core::state_machine::{Command, State};
use protocol::id::ServerId;
use protocol::link::{FromHost, RegistryHeaders, ToHost};
use protocol::report::{HostFacts, WorkloadReport};
use protocol::time::UnixMillis;
use protocol::workload::{Fence, Secret, WorkloadPhase};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};

use super::{AskHost, Hub};
use crate::signer::{SealedKind, Sign};
use crate::store::{self, Store};

/// How long a new connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// A host whose clock is off by this much gets no new work, in ms: signatures live for 30 s.
const CLOCK_OFFSET_MAX_MS: u64 = 20_000;
/// Between two records of mere progress: the log is for facts, not for heartbeats.
const PROGRESS_EVERY: Duration = Duration::from_secs(15);

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum End {
    /// The host closed it.
    #[error("the host closed the connection")]
    Closed,
    /// It did not say who it is.
    #[error("no hello within {HELLO_TIMEOUT:?}")]
    NoHello,
    /// It claims to be somebody that its certificate does not name.
    #[error("the certificate does not belong to server {0}")]
    WrongIdentity(ServerId),
    /// The state machine refused the host.
    #[error("the host was refused: {0}")]
    Refused(String),
    /// This member is in touch with no leader and could only tell the host what is out of date, or its seed or its
    /// clock is not the right one.
    #[error("this member is cut off from the others, or its seed or clock is wrong: try another one")]
    CutOff,
    /// A newer session of the same host took over.
    #[error("a newer connection of the same host took over")]
    Replaced,
}

/// What a session works with.
#[derive(Debug, Clone)]
pub struct Context {
    /// The state.
    pub store: Store,
    /// Opens launch tokens on their way to the host.
    pub signer: Arc<dyn Sign>,
    /// Who is connected.
    pub hub: Hub,
    /// Registry headers as they are renewed.
    pub headers: watch::Receiver<Vec<RegistryHeaders>>,
    /// Members' doors, for hosts to know when this one dies.
    pub doors: watch::Receiver<Vec<String>>,
    /// False while this member is in touch with no leader, or has a wrong seed or clock.
    pub in_touch: watch::Receiver<bool>,
    /// The way to ask the host of this session.
    pub way: Option<Arc<dyn AskHost>>,
}

/// Serves one host until either side ends. `is_identity` says whether the other end may claim to be a
/// server.
///
/// # Errors
/// [`End`]: there is no other way out.
pub async fn serve(
    context: Context,
    is_identity: impl Fn(&ServerId) -> bool,
    mut incoming: mpsc::Receiver<FromHost>,
    outgoing: mpsc::Sender<ToHost>,
) -> Result<(), End> {
    let hello = timeout(HELLO_TIMEOUT, incoming.recv())
        .await
        .map_err(|_| End::NoHello)?;
    let Some(FromHost::Hello { facts, fence, clock }) = hello else {
        return Err(End::NoHello);
    };
    let server = facts.server.clone();
    if !is_identity(&server) {
        return Err(End::WrongIdentity(server));
    }
    let said_at = Instant::now();
    let now = context.store.clock().now();
    let session = context.hub.join(server.clone(), now, context.way.clone());
    let _presence = Presence {
        hub: context.hub.clone(),
        server: server.clone(),
        session,
    };
    tracing::info!(host = facts.name, %server, %fence, "host connected");
    let mut served = Session {
        context: &context,
        server: server.clone(),
        sent: None,
        told: None,
        recorded: None,
        recorded_at: Instant::now(),
        quarantine: None,
    };
    let mut in_touch = context.in_touch.clone();
    let cut_off = async {
        // Its sender ends with the member.
        let _ = in_touch.wait_for(|in_touch| !in_touch).await;
    };
    tokio::select! {
        biased;
        () = cut_off => Err(End::CutOff),
        end = served.run(facts, (clock, said_at), session, &mut incoming, &outgoing) => end,
    }
}

/// A host counts as connected as long as this exists. A session whose connection is lost does not end, it is dropped.
struct Presence {
    hub: Hub,
    server: ServerId,
    session: u64,
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.hub.leave(&self.server, self.session);
    }
}

struct Session<'a> {
    context: &'a Context,
    server: ServerId,
    /// Fence of the last set that was sent.
    sent: Option<Fence>,
    /// The authorities that it was told of.
    told: Option<Vec<[u8; 32]>>,
    /// The last report that was recorded.
    recorded: Option<WorkloadReport>,
    recorded_at: Instant,
    /// Why it gets nothing new to do, by what it said of its clock.
    quarantine: Option<String>,
}

impl Session<'_> {
    async fn run(
        &mut self,
        facts: HostFacts,
        clock: (UnixMillis, Instant),
        session: u64,
        incoming: &mut mpsc::Receiver<FromHost>,
        outgoing: &mpsc::Sender<ToHost>,
    ) -> Result<(), End> {
        self.record_facts(facts).await?;
        self.judge_clock(clock).await;
        self.keep_condition().await?;
        let mut changes = self.context.store.changes();
        let (mut headers, mut doors) = (self.context.headers.clone(), self.context.doors.clone());
        headers.mark_changed();
        doors.mark_changed();
        loop {
            if !self.context.hub.is_current(&self.server, session) {
                return Err(End::Replaced);
            }
            self.stay_reachable().await?;
            self.send_desired(outgoing).await?;
            self.send_authorities(outgoing).await?;
            tokio::select! {
                biased;
                message = incoming.recv() => match message {
                    Some(message) => self.take(message).await?,
                    None => return Err(End::Closed),
                },
                () = changes.changed() => {}
                changed = doors.changed() => {
                    if changed.is_err() {
                        return Err(End::Closed);
                    }
                    let list = doors.borrow_and_update().clone();
                    if !list.is_empty() {
                        outgoing.send(ToHost::Doors(list)).await.map_err(|_| End::Closed)?;
                    }
                }
                changed = headers.changed() => {
                    if changed.is_err() {
                        return Err(End::Closed);
                    }
                    let sets = headers.borrow_and_update().clone();
                    if !sets.is_empty() {
                        outgoing.send(ToHost::RegistryHeaders(sets)).await.map_err(|_| End::Closed)?;
                    }
                }
            }
        }
    }

    async fn take(&mut self, message: FromHost) -> Result<(), End> {
        let now = self.context.store.clock().now();
        match message {
            FromHost::Hello { facts, .. } | FromHost::Facts(facts) => {
                if facts.server != self.server {
                    return Err(End::WrongIdentity(facts.server));
                }
                self.context.hub.hear(&self.server, now, None);
                self.record_facts(facts).await
            }
            FromHost::Report(report) => {
                self.context.hub.hear(&self.server, now, Some(report.clone()));
                self.keep_condition().await?;
                self.record_report(report).await
            }
        }
    }

    async fn record_facts(&self, facts: HostFacts) -> Result<(), End> {
        let known = self.context.store.read(|state| {
            state
                .servers()
                .get(&self.server)
                .is_some_and(|server| server.facts == facts && server.reachable)
        });
        if known {
            Ok(())
        } else {
            self.propose(Command::RecordHost { facts }).await
        }
    }

    /// A leader that was not told yet that the host is here again may take it for silent: as long as it is here, it is
    /// not.
    async fn stay_reachable(&self) -> Result<(), End> {
        let of = |state: &State| state.servers().get(&self.server).map(|server| server.reachable);
        if self.context.store.read(of) == Some(false) {
            self.record_reachable().await?;
        }
        Ok(())
    }

    /// By the time that the members agree on, which a member that was just started has to learn first.
    async fn judge_clock(&mut self, (clock, said_at): (UnixMillis, Instant)) {
        let members = self.context.store.clock();
        if let Some(settling) = members.settling() {
            settling.await;
        }
        let offset_ms = members.now().0.abs_diff((clock + said_at.elapsed()).0);
        self.quarantine = (offset_ms > CLOCK_OFFSET_MAX_MS).then(|| {
            format!(
                "its clock is {} s off; run a time service (chrony) on it",
                offset_ms / 1000
            )
        });
    }

    /// Records what was judged where the state says otherwise. This member may not have applied yet what was recorded
    /// before, and the leader may have repeated it: so it is looked at again on the host's word, like a report.
    async fn keep_condition(&self) -> Result<(), End> {
        let differs = |state: &State| {
            let server = state.servers().get(&self.server);
            server.is_some_and(|server| server.quarantine != self.quarantine)
        };
        if self.context.store.read(differs) {
            self.record_reachable().await?;
        }
        Ok(())
    }

    async fn record_reachable(&self) -> Result<(), End> {
        self.propose(Command::RecordHostCondition {
            server: self.server.clone(),
            reachable: true,
            quarantine: self.quarantine.clone(),
        })
        .await
    }

    /// Records what is new. What was recorded already is so once more where the state says otherwise: an older report, which
    /// another member had taken and was slow to pass on, came after it. Only on the host's word, so that two sessions of
    /// one host do not contradict each other without end.
    async fn record_report(&mut self, report: WorkloadReport) -> Result<(), End> {
        let same = self.recorded.as_ref().is_some_and(|last| *last == report);
        let only_progress = self
            .recorded
            .as_ref()
            .is_some_and(|last| *last == without_progress(&report, last));
        let is_old = same || (only_progress && self.recorded_at.elapsed() < PROGRESS_EVERY);
        let holds = |state: &State| state.holds_report(&self.server, &report);
        if is_old && self.context.store.read(holds) {
            return Ok(());
        }
        let server = self.server.clone();
        self.propose(Command::RecordWorkloads {
            server,
            report: report.clone(),
        })
        .await?;
        self.recorded = Some(report);
        self.recorded_at = Instant::now();
        Ok(())
    }

    /// Proposes until there is an answer: a report that is lost would be repeated anyway.
    async fn propose(&self, command: Command) -> Result<(), End> {
        let request = self.context.store.new_request();
        let mut pause = Duration::from_millis(100);
        loop {
            match self
                .context
                .store
                .propose_as(request, None, command.clone())
                .await
            {
                Ok(_) => return Ok(()),
                Err(store::Error::Rejected(rejection)) => return Err(End::Refused(rejection.to_string())),
                Err(store::Error::Unavailable(reason) | store::Error::OutcomeUnknown(reason)) => {
                    tracing::warn!(server = %self.server, reason, "a host's message is not recorded yet");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
            }
        }
    }

    async fn send_desired(&mut self, outgoing: &mpsc::Sender<ToHost>) -> Result<(), End> {
        let fence = self.context.store.read(|state| state.fence_of(&self.server));
        if fence.is_none() || fence == self.sent {
            return Ok(());
        }
        let Some(set) = self.context.store.read(|state| state.desired(&self.server)) else {
            return Ok(());
        };
        let fence = set.fence;
        match self.open(set).await {
            Ok(message) => {
                outgoing.send(message).await.map_err(|_| End::Closed)?;
                self.sent = Some(fence);
            }
            // It stays unsent; the next change, or the host's next report, tries again.
            Err(error) => tracing::warn!(server = %self.server, %error, "launch tokens were not opened"),
        }
        Ok(())
    }

    /// Tells the host when it should change over to other authorities.
    async fn send_authorities(&mut self, outgoing: &mpsc::Sender<ToHost>) -> Result<(), End> {
        let wanted = |state: &State| state.authorities_to_tell(&self.server);
        let wanted = self.context.store.read(wanted);
        if wanted == self.told {
            return Ok(());
        }
        if let Some(wanted) = wanted.clone() {
            let told = outgoing.send(ToHost::Authorities(wanted)).await;
            told.map_err(|_| End::Closed)?;
        }
        self.told = wanted;
        Ok(())
    }

    async fn open(&self, set: DesiredSet) -> Result<ToHost, crate::signer::Error> {
        let mut workloads = Vec::with_capacity(set.workloads.len());
        for workload in set.workloads {
            let mut spec = workload.spec;
            if let Some(sealed) = workload.sealed_token {
                let token = self
                    .context
                    .signer
                    .unseal(SealedKind::LaunchToken, &sealed)
                    .await?;
                spec.launch_token = String::from_utf8(token).ok().map(Secret::new);
            }
            workloads.push(spec);
        }
        Ok(ToHost::Desired {
            fence: set.fence,
            workloads,
        })
    }
}

/// `report` with the bytes pulled of `last`, where both say "pulling".
fn without_progress(report: &WorkloadReport, last: &WorkloadReport) -> WorkloadReport {
    let mut report = report.clone();
    for status in &mut report.workloads {
        let before = last
            .workloads
            .iter()
            .find(|other| other.deployment == status.deployment);
        if let (WorkloadPhase::Pulling { .. }, Some(before)) = (&status.phase, before)
            && matches!(before.phase, WorkloadPhase::Pulling { .. })
        {
            status.phase = before.phase.clone();
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;
    use crate::signer::{Key, LocalSigner, Seed};
    use coordinator_core::state_machine::host::{NewHost, Rotation};
    use protocol::id::DeploymentId;
    use protocol::report::WorkloadStatus;
    use tokio::task::JoinHandle;

    fn context(clock: &Arc<ManualClock>, hub: &Hub) -> Context {
        let key = Key::new(&Seed::new([1; 32]));
        // A sender that is gone ends the session; these live as long as the test.
        let headers = Box::leak(Box::new(watch::channel(Vec::new())));
        let doors = Box::leak(Box::new(watch::channel(Vec::new())));
        let in_touch = Box::leak(Box::new(watch::channel(true)));
        Context {
            store: Store::in_memory(clock.clone()),
            signer: Arc::new(LocalSigner::new(key, clock.clone())),
            hub: hub.clone(),
            headers: headers.1.clone(),
            doors: doors.1.clone(),
            in_touch: in_touch.1.clone(),
            way: None,
        }
    }

    fn hello() -> FromHost {
        let facts = HostFacts {
            server: ServerId::parse("host-1").expect("valid"),
            name: "host-1".to_owned(),
            address: "192.0.2.1".to_owned(),
            proof_port: 443,
            devices: Vec::new(),
            cpu_count: 1,
            memory_gb: 1,
            disk_free_gb: 1,
            agent_version: "1".to_owned(),
        };
        FromHost::Hello {
            facts,
            fence: Fence::default(),
            clock: UnixMillis(1_000_000),
        }
    }

    /// A session whose host has said who it is: the state, both ends of what they say, and the task.
    async fn connected() -> (
        Store,
        mpsc::Sender<FromHost>,
        mpsc::Receiver<ToHost>,
        JoinHandle<Result<(), End>>,
    ) {
        let clock = Arc::new(ManualClock::at(UnixMillis(1_000_000)));
        let context = context(&clock, &Hub::default());
        let store = context.store.clone();
        let (to_session, incoming) = mpsc::channel(1);
        let (outgoing, from_session) = mpsc::channel(8);
        to_session.send(hello()).await.expect("there is room");
        let session = tokio::spawn(serve(context, |_| true, incoming, outgoing));
        (store, to_session, from_session, session)
    }

    /// Found with members in namespaces: a host that had been cut off went to another member, and the leader took it for
    /// silent once more before it was told. Nothing set that right until the host was connected anew.
    #[tokio::test]
    async fn a_connected_host_that_the_leader_took_for_silent_is_reachable_again() {
        let (store, _to_session, _from_session, session) = connected().await;
        let server = ServerId::parse("host-1").expect("valid");
        let reachable =
            |store: &Store| store.read(|state| state.servers().get(&server).map(|server| server.reachable));
        let until = async |wanted| {
            let mut changes = store.changes();
            while reachable(&store) != Some(wanted) {
                changes.changed().await;
            }
        };
        until(true).await;
        let silent = Command::RecordHostCondition {
            server: server.clone(),
            reachable: false,
            quarantine: None,
        };
        store.propose(silent).await.expect("it is known");
        assert_eq!(reachable(&store), Some(false));
        let again = timeout(Duration::from_secs(10), until(true)).await;
        assert!(again.is_ok(), "it counts as silent although it is connected");
        session.abort();
    }

    /// Found with clocks that jump in real processes: a member that was just started did not know yet that the host was
    /// quarantined, so it did not say that it is no more.
    #[tokio::test]
    async fn a_host_whose_clock_is_right_does_not_stay_quarantined() {
        let (store, to_session, _from_session, session) = connected().await;
        let server = ServerId::parse("host-1").expect("valid");
        let quarantined = |store: &Store| {
            let of = |state: &State| state.servers().get(&server).map(|it| it.quarantine.is_some());
            store.read(of)
        };
        let until = async |wanted| {
            let mut changes = store.changes();
            while quarantined(&store) != Some(wanted) {
                changes.changed().await;
            }
        };
        until(false).await;
        let late = Command::RecordHostCondition {
            server: server.clone(),
            reachable: true,
            quarantine: Some("its clock was off".to_owned()),
        };
        store.propose(late).await.expect("it is known");
        assert_eq!(quarantined(&store), Some(true));
        let report = WorkloadReport {
            fence: Fence::default(),
            workloads: Vec::new(),
        };
        to_session
            .send(FromHost::Report(report))
            .await
            .expect("it goes on");
        let again = timeout(Duration::from_secs(10), until(false)).await;
        assert!(again.is_ok(), "it stays quarantined although its clock is right");
        session.abort();
    }

    /// Found in review: a member that stood still passed a report on after the host had gone to another member, which had
    /// recorded a newer one of the same set. What runs no more stayed as a workload of nobody's, and the host got no work
    /// until it was connected anew.
    #[tokio::test]
    async fn an_older_report_that_comes_late_does_not_stay() {
        let (store, to_session, _from_session, session) = connected().await;
        let server = ServerId::parse("host-1").expect("valid");
        let strangers = |store: &Store| {
            store.read(|state| {
                let server = state.servers().get(&server)?;
                server.reported.map(|_| server.strangers.len())
            })
        };
        let until = async |wanted| {
            let mut changes = store.changes();
            while strangers(&store) != Some(wanted) {
                changes.changed().await;
            }
        };
        let newer = WorkloadReport {
            fence: Fence {
                incarnation: store.read(|state| state.settings().incarnation),
                revision: 3,
            },
            workloads: Vec::new(),
        };
        let reported = FromHost::Report(newer.clone());
        to_session.send(reported.clone()).await.expect("it goes on");
        until(0).await;
        let mut report = newer;
        report.workloads.push(WorkloadStatus {
            deployment: DeploymentId::parse("d1").expect("valid"),
            phase: WorkloadPhase::Stopping,
        });
        let server = server.clone();
        let older = Command::RecordWorkloads { server, report };
        store.propose(older).await.expect("it is known");
        assert_eq!(strangers(&store), Some(1));
        to_session.send(reported).await.expect("it goes on");
        let set_right = timeout(Duration::from_secs(10), until(0)).await;
        assert!(
            set_right.is_ok(),
            "the host reports nothing, and the older report stays"
        );
        session.abort();
    }

    #[tokio::test]
    async fn a_host_is_told_once_which_authorities_to_trust() {
        let (store, to_session, mut from_session, session) = connected().await;
        let founder = NewHost {
            server: ServerId::parse("host-1").expect("valid"),
            name: "host-1".to_owned(),
            site: String::new(),
            address: "192.0.2.1:4433".to_owned(),
            key_hash: [1; 32],
        };
        let rotation = Rotation {
            old: [1; 32],
            new: [2; 32],
            authority_pem: "new".to_owned(),
            bridge_pem: "bridge".to_owned(),
            sealed_key: vec![2],
            begun_at: UnixMillis(0),
        };
        for command in [
            Command::FoundCluster {
                authority_pem: "old".to_owned(),
                sealed_key: vec![1],
                founder,
            },
            Command::RotateAuthority { rotation },
            Command::PassTime,
        ] {
            store.propose(command).await.expect("good");
        }
        let told = loop {
            let message = from_session.recv().await;
            if let ToHost::Authorities(told) = message.expect("it goes on") {
                break told;
            }
        };
        assert_eq!(told, [[1; 32], [2; 32]]);
        drop(to_session);
        assert_eq!(session.await.expect("no panic"), Err(End::Closed));
        while let Some(message) = from_session.recv().await {
            assert!(!matches!(message, ToHost::Authorities(_)), "told twice");
        }
    }

    #[tokio::test]
    async fn a_host_whose_connection_is_lost_is_not_connected_any_more() {
        let clock = Arc::new(ManualClock::at(UnixMillis(1_000_000)));
        let hub = Hub::default();
        let context = context(&clock, &hub);
        let server = ServerId::parse("host-1").expect("valid");
        let (to_session, incoming) = mpsc::channel(1);
        let (outgoing, mut from_session) = mpsc::channel(1);
        to_session.send(hello()).await.expect("there is room");
        let mut session = Box::pin(serve(context, |_| true, incoming, outgoing));
        tokio::select! {
            end = &mut session => panic!("{end:?}"),
            told = from_session.recv() => assert!(told.is_some()),
        }
        assert!(hub.host(&server).is_some());
        // This is what a lost connection does to it.
        drop(session);
        assert!(hub.host(&server).is_none());
        assert!(hub.heard_since(0).0.is_empty());
    }
}
