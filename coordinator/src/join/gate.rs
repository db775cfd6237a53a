//! The member's side: who asks is let in by a command in the log, and then gets its certificate. Every member can
//! do it, since the authority's key is in the state, sealed for holders of the seed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use coordinator_core::state_machine::host::{Entered, HostRecord, Invite, InviteId, NewHost, Standing};
use coordinator_core::state_machine::{Command, Reply};
use protocol::hotkey::Hotkey;
use protocol::time::UnixMillis;
use quinn::{Connection, ConnectionError, Endpoint};
use replica::quic::Peers;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::wire::{Answer, Enter, Granted, Join, Question, read, write};
use super::{Admission, Nodes, authority, node, reach, token};
use crate::identity::{Bearer, COORDINATOR_NAME, Identity, LIFE_MS, Names, key_hash};
use crate::signer::Sign;
use crate::store::{Error as StoreError, Store};

/// How long a question may take to arrive, and its answer to leave.
const QUESTION_MAX: Duration = Duration::from_secs(10);
/// A host whose clock is off by more is refused, in ms: certificates and signatures would not work.
const CLOCK_OFFSET_MAX_MS: u64 = 20_000;
/// How long a probe may take.
const PROBE_MAX: Duration = Duration::from_secs(4);
/// How long an invitation is good that is used in the next moment, in ms.
const AT_ONCE_MS: u64 = 60_000;
/// Bytes of a pod's token.
const TOKEN_MAX: usize = 16 * 1024;
/// Characters of a name or an address.
const WORD_MAX: usize = 255;

/// Why a host with a good certificate is turned away that the state knows nothing of. Fits into the end of a connection.
pub(crate) const STRANGER: &str = "the cluster does not know this host's key: it goes on from a snapshot of before the \
     host joined. Move the folder `host` of its data away and join with a new invitation";

/// What answers at the gate.
#[derive(Debug, Clone)]
pub struct Gate {
    /// The state.
    pub store: Store,
    /// Opens the authority's key.
    pub signer: Arc<dyn Sign>,
    /// Id of the cluster.
    pub cluster: String,
    /// Where probes leave from.
    pub endpoint: Endpoint,
    /// Folder with the certificate that they show.
    pub identity: PathBuf,
    /// The ways to other members: one that has moved is looked for there at once.
    pub peers: Peers,
    /// Limits how many join at a time.
    pub joins: Arc<Semaphore>,
    /// The Kubernetes cluster whose nodes enter by themselves.
    pub nodes: Option<Arc<dyn Nodes>>,
}

/// A limit for [`Gate::joins`].
pub const JOINS_MAX: usize = 16;

/// How a probe can end badly.
enum Dial {
    /// Somebody is there, and says no.
    Answered(String),
    /// Nobody can be heard.
    Failed(String),
}

/// Why there is no yes.
enum No {
    Refused(String),
    Unavailable(String),
}

impl From<StoreError> for No {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Rejected(rejection) => Self::Refused(rejection.to_string()),
            StoreError::Unavailable(reason) | StoreError::OutcomeUnknown(reason) => {
                // Anybody may ask here: where the members are is not for everybody.
                tracing::info!(reason, "who asks at the gate gets no answer");
                Self::Unavailable("the cluster cannot decide at this moment: try again".to_owned())
            }
        }
    }
}

impl From<authority::Error> for No {
    fn from(error: authority::Error) -> Self {
        match error {
            authority::Error::Signer(_) => Self::Unavailable(error.to_string()),
            authority::Error::Damaged | authority::Error::Identity(_) => Self::Refused(error.to_string()),
        }
    }
}

impl From<node::Error> for No {
    fn from(error: node::Error) -> Self {
        match error {
            node::Error::Refused(reason) => Self::Refused(reason),
            node::Error::Unavailable(reason) => Self::Unavailable(reason),
        }
    }
}

fn refused(reason: impl Into<String>) -> No {
    No::Refused(reason.into())
}

/// Refuses what would break a list or a log.
fn are_words(words: &[(&str, &str)]) -> Result<(), No> {
    for (what, word) in words {
        if word.len() > WORD_MAX || word.chars().any(char::is_control) {
            return Err(refused(format!(
                "the host's {what} is no word of at most {WORD_MAX} bytes"
            )));
        }
    }
    Ok(())
}

impl Gate {
    /// Answers the one question of a connection. `bearer` is what the caller's certificate says, if it has one.
    pub async fn serve(&self, connection: &Connection, bearer: Option<&Bearer>) {
        let exchange = async {
            let (mut out, mut incoming) = connection.accept_bi().await.ok()?;
            let question = read(&mut incoming).await.ok()?;
            let answer = self.answer(question, bearer).await;
            write(&mut out, &answer).await.ok()?;
            // The caller closes when it has the answer.
            connection.closed().await;
            Some(())
        };
        if timeout(QUESTION_MAX, exchange).await.ok().flatten().is_none() {
            tracing::debug!(remote = %connection.remote_address(), "a question at the gate came to nothing");
        }
    }

    async fn answer(&self, question: Question, bearer: Option<&Bearer>) -> Answer {
        let signs = matches!(question, Question::Join(_) | Question::Renew | Question::Rejoin);
        if let Some(miner) = self.store.other_miner(self.signer.hotkey()).filter(|_| signs) {
            // Only a member with that one's seed can open the authority's key.
            return Answer::Unavailable(format!(
                "this member runs with the seed of {}, and the cluster belongs to the miner {miner} by now",
                self.signer.hotkey()
            ));
        }
        let granted = match question {
            Question::Join(join) => self.join(*join).await,
            Question::Enter(enter) => self.enter(*enter).await,
            Question::Renew => self.renew(bearer).await,
            Question::Rejoin => self.rejoin(bearer).await,
            Question::Probe => match self.known(bearer).await {
                Ok((record, _)) => return self.probe(record.host.address).await,
                Err(no) => Err(no),
            },
            Question::Moved(address) => match self.moved(bearer, address).await {
                Ok(()) => return Answer::Noted,
                Err(no) => Err(no),
            },
            Question::Trusts(trusted) => match self.note(bearer, trusted).await {
                Ok(()) => return Answer::Noted,
                Err(no) => Err(no),
            },
        };
        match granted {
            Ok(granted) => Answer::Granted(Box::new(granted)),
            Err(No::Refused(reason)) => {
                tracing::warn!(reason, "a host is not let in");
                Answer::Refused(reason)
            }
            Err(No::Unavailable(reason)) => Answer::Unavailable(reason),
        }
    }

    async fn join(&self, join: Join) -> Result<Granted, No> {
        let now = self.clocks_agree(join.clock)?;
        are_words(&[
            ("name", &join.name),
            ("site", &join.site),
            ("address", &join.address),
        ])?;
        let few = self.joins.try_acquire();
        let _few = few.map_err(|_| No::Unavailable("too many hosts join at this moment".to_owned()))?;
        self.store.linearizable().await?;
        let (invite, secret_hash) = (InviteId(join.invite), token::secret_hash(&join.secret));
        // A stranger without an invitation writes nothing into the log.
        let known = self.store.read(|state| {
            state
                .invitation(invite, &secret_hash, now)
                .map(|invite| invite.eligible)
        });
        let eligible = known.map_err(|rejection| refused(rejection.to_string()))?;
        self.is_one_miner(join.hotkey.as_ref())?;
        if eligible && join.hotkey.is_none() {
            return Err(refused(
                "the invitation makes the host a member, which needs the miner's seed: set miner.seed_file and \
                 coordinator.enabled = true, or invite it without --eligible",
            ));
        }
        let command = Command::JoinHost {
            id: invite,
            secret_hash,
            host: NewHost {
                server: join.server.clone(),
                name: join.name,
                site: join.site,
                address: join.address,
                key_hash: key_hash(&join.public_key),
            },
        };
        let member = self.joined(command).await?;
        tracing::info!(server = %join.server, ?member, "a host has joined");
        let names = Names {
            server: join.server,
            member,
        };
        self.grant(names, &join.public_key).await
    }

    /// Lets a node in that shows the token of its agent's pod.
    async fn enter(&self, enter: Enter) -> Result<Granted, No> {
        let nodes = self.nodes.as_ref().ok_or_else(|| {
            refused(
                "this member knows of no Kubernetes cluster whose nodes enter by themselves: set nodes.config_map on \
                 it, or join with a token of `chutes-miner host invite`",
            )
        })?;
        let now = self.clocks_agree(enter.clock)?;
        are_words(&[("site", &enter.site), ("address", &enter.address)])?;
        if enter.token.len() > TOKEN_MAX {
            return Err(refused(format!(
                "the token of a pod has at most {TOKEN_MAX} bytes"
            )));
        }
        let few = self.joins.try_acquire();
        let _few = few.map_err(|_| No::Unavailable("too many hosts join at this moment".to_owned()))?;
        // First: nothing else is told to a stranger.
        let node = nodes.review(&enter.token).await?;
        self.is_one_miner(enter.hotkey.as_ref())?;
        if node.member && enter.hotkey.is_none() {
            return Err(refused(format!(
                "the pod on the node {} has the account of members, which need the miner's seed: set miner.seed_file \
                 and coordinator.enabled = true there",
                node.name
            )));
        }
        self.store.linearizable().await?;
        let server = node.server();
        let host = NewHost {
            server: server.clone(),
            name: node.name.clone(),
            site: enter.site,
            address: enter.address,
            key_hash: key_hash(&enter.public_key),
        };
        let member = match self.store.read(|state| state.entered(&host)) {
            Entered::Before { member } => member,
            Entered::OtherKey => {
                return Err(refused(format!(
                    "the node {0} has entered before, with a key that it has lost: remove what it was with \
                     `chutes-miner host remove {0}`, then it enters by itself",
                    node.name
                )));
            }
            Entered::NameTaken(other) => {
                return Err(refused(format!(
                    "the name {0} belongs to the host {other}, which is not this node: if the node was deleted and \
                     made again, remove what it was with `chutes-miner host remove {0}`, then it enters by itself",
                    node.name
                )));
            }
            Entered::NotYet => {
                let (invite, secret_hash) = self.invite_at_once(node.member, now).await?;
                let command = Command::JoinHost {
                    id: invite,
                    secret_hash,
                    host,
                };
                self.joined(command).await?
            }
        };
        tracing::info!(%server, node = node.name, uid = node.uid, ?member, "a node has entered");
        self.grant(Names { server, member }, &enter.public_key).await
    }

    /// An invitation that is used in the next moment, and that nobody else learns of.
    async fn invite_at_once(&self, eligible: bool, now: UnixMillis) -> Result<(InviteId, [u8; 32]), No> {
        let mut random = [0; 48];
        let none = |_| No::Unavailable("this machine has no random numbers".to_owned());
        SystemRandom::new().fill(&mut random).map_err(none)?;
        let (secret, id) = random.split_at(32);
        let id = InviteId(u128::from_be_bytes(id.try_into().expect("48 bytes less 32")));
        let secret_hash = token::secret_hash(secret.try_into().expect("the first 32 bytes"));
        let invite = Invite {
            secret_hash,
            expires_at: now + AT_ONCE_MS,
            eligible,
            site: None,
            used_by: None,
        };
        self.store.propose(Command::InviteHost { id, invite }).await?;
        Ok((id, secret_hash))
    }

    async fn joined(&self, command: Command) -> Result<Option<u64>, No> {
        match self.store.propose(command).await? {
            Reply::Joined { member } => Ok(member),
            other => Err(refused(format!("unexpected reply {other:?}"))),
        }
    }

    /// The time, if the host's clock shows about the same.
    fn clocks_agree(&self, clock: UnixMillis) -> Result<UnixMillis, No> {
        let now = self.store.clock().now();
        let offset_ms = now.0.abs_diff(clock.0);
        if offset_ms > CLOCK_OFFSET_MAX_MS {
            return Err(refused(format!(
                "the host's clock is {} s off: run a time service (chrony) on it, then join again",
                offset_ms / 1000
            )));
        }
        Ok(now)
    }

    /// Refuses a host that has another miner's seed.
    fn is_one_miner(&self, hotkey: Option<&Hotkey>) -> Result<(), No> {
        let own = self.signer.hotkey();
        match hotkey {
            Some(hotkey) if hotkey != own => Err(refused(format!(
                "this cluster belongs to the miner {own}, and the host is configured for {hotkey}: one cluster is \
                 one hotkey"
            ))),
            Some(_) | None => Ok(()),
        }
    }

    async fn renew(&self, bearer: Option<&Bearer>) -> Result<Granted, No> {
        let (record, bearer) = self.known(bearer).await?;
        let names = Names {
            server: record.host.server,
            member: record.member,
        };
        self.grant(names, &bearer.public_key).await
    }

    async fn rejoin(&self, bearer: Option<&Bearer>) -> Result<Granted, No> {
        let (record, bearer) = self.known(bearer).await?;
        if record.member.is_none() {
            return Err(refused(
                "this host is no member: it has no store that could be lost",
            ));
        }
        let server = record.host.server;
        let command = Command::RejoinHost {
            server: server.clone(),
        };
        let member = self.joined(command).await?;
        tracing::info!(%server, ?member, "a member comes back without its store");
        self.grant(Names { server, member }, &bearer.public_key).await
    }

    /// Records what a host trusts, once that is what it should.
    async fn note(&self, bearer: Option<&Bearer>, trusted: Vec<[u8; 32]>) -> Result<(), No> {
        let (record, _) = self.known(bearer).await?;
        let server = record.host.server;
        match self.store.read(|state| state.authorities_to_tell(&server)) {
            // It has said so before, and the answer was lost.
            None => Ok(()),
            Some(wanted) if wanted == trusted => {
                let command = Command::RecordAuthorities { server, trusted };
                self.store.propose(command).await?;
                Ok(())
            }
            Some(_) => Err(refused(
                "the cluster's authorities are others by now: renew the certificate once more",
            )),
        }
    }

    /// Records where a host is to be found. A member is looked for there before that is recorded, too: without it there
    /// may be no majority that could record anything.
    async fn moved(&self, bearer: Option<&Bearer>, address: String) -> Result<(), No> {
        are_words(&[("address", &address)])?;
        let member = bearer.and_then(|bearer| {
            self.store.read(|state| match state.standing(&bearer.key_hash) {
                Standing::In(record) => record.member,
                Standing::Removed(_) | Standing::Unknown => None,
            })
        });
        if let Some(member) = member {
            self.peers.note_moved(member, address.clone());
        }
        let (record, _) = self.known(bearer).await?;
        let server = record.host.server;
        tracing::info!(%server, before = record.host.address, address, "a host has moved");
        self.store
            .propose(Command::RecordAddress { server, address })
            .await?;
        Ok(())
    }

    /// Dials a host at the address that it told. Any answer shows that UDP goes there and back, be it a refusal.
    async fn probe(&self, address: String) -> Answer {
        // Beside each other: the host does not wait for long.
        let (dialled, reach) = tokio::join!(timeout(PROBE_MAX, self.dial(&address)), reach::udp(&address));
        let (reached, detail) = match dialled {
            Ok(Ok(())) => (true, "it answers".to_owned()),
            Ok(Err(Dial::Answered(refusal))) => (true, refusal),
            Ok(Err(Dial::Failed(reason))) => (false, reason),
            Err(_) => (false, format!("no answer within {PROBE_MAX:?}")),
        };
        let detail = match reach {
            Ok(reach) if !reached => format!("{reach}; {detail}"),
            _ => detail,
        };
        Answer::Probed {
            address,
            reached,
            detail,
        }
    }

    async fn dial(&self, address: &str) -> Result<(), Dial> {
        let failed = |error: &dyn std::fmt::Display| Dial::Failed(error.to_string());
        let identity = Identity::of_host(&self.identity).map_err(|error| failed(&error))?;
        let tls = identity
            .quic_client(super::wire::ALPN)
            .map_err(|error| failed(&error))?;
        let config = quinn::ClientConfig::new(Arc::new(tls));
        let mut found = tokio::net::lookup_host(address)
            .await
            .map_err(|error| failed(&error))?;
        let target = found.next().ok_or_else(|| failed(&"the name has no address"))?;
        let connecting = self
            .endpoint
            .connect_with(config, target, COORDINATOR_NAME)
            .map_err(|error| failed(&error))?;
        match connecting.await {
            Ok(connection) => {
                connection.close(0_u8.into(), b"only a probe");
                Ok(())
            }
            Err(ConnectionError::TimedOut) => Err(failed(&"no answer")),
            Err(answered) => Err(Dial::Answered(format!("it answers: {answered}"))),
        }
    }

    /// The host that asks with a certificate, as the state knows it now.
    async fn known<'a>(&self, bearer: Option<&'a Bearer>) -> Result<(HostRecord, &'a Bearer), No> {
        let bearer = bearer.ok_or_else(|| refused("this needs the certificate of a host"))?;
        self.store.linearizable().await?;
        self.store.read(|state| match state.standing(&bearer.key_hash) {
            Standing::In(record) => Ok((record.clone(), bearer)),
            Standing::Removed(record) => Err(refused(format!(
                "host {} was removed: to come back, delete its data folder and join with a new invitation",
                record.host.name
            ))),
            Standing::Unknown => Err(refused(STRANGER)),
        })
    }

    /// A certificate for a host that is in, of the newest authority.
    async fn grant(&self, names: Names, public_key: &[u8]) -> Result<Granted, No> {
        // A new authority must not be missed: those who joined after it count as carrying its certificate.
        self.store.linearizable().await?;
        let (cluster, rotation, doors) = self.store.read(|state| {
            let doors: Vec<String> = state
                .members()
                .map(|(_, host)| host.host.address.clone())
                .collect();
            (state.cluster().cloned(), state.rotation().cloned(), doors)
        });
        let cluster = cluster.ok_or_else(|| No::Unavailable("the cluster is not founded yet".to_owned()))?;
        let mut authorities = cluster.authority_pem.clone();
        let (pem, sealed_key, bridge) = match rotation {
            None => (cluster.authority_pem, cluster.sealed_key, String::new()),
            Some(rotation) => {
                authorities.push_str(&rotation.authority_pem);
                (rotation.authority_pem, rotation.sealed_key, rotation.bridge_pem)
            }
        };
        let authority = authority::open(self.signer.as_ref(), pem, &sealed_key).await?;
        let now = self.store.clock().now();
        let certificate = authority.issue(&names, public_key, now);
        let certificate = certificate.map_err(|error| refused(error.to_string()))?;
        Ok(Granted {
            admission: Admission {
                cluster: self.cluster.clone(),
                server: names.server,
                member: names.member,
                doors,
                certificate_until: now + LIFE_MS,
                opened: false,
            },
            certificate_pem: certificate + &bridge,
            authority_pem: authorities,
        })
    }
}
