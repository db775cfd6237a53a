//! The validator itself: settings, state, ledger, sockets and faults under one roof. Every change goes
//! through [`Validator::change`]: state to disk, then the ledger, then the events to the sockets, so that
//! an answer is only given for what would survive `kill -9`.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use protocol::hotkey::{Hotkey, Signer};
use protocol::time::UnixMillis;
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::event::Event;
use crate::faults::{EventAction, Planted};
use crate::gpu::GpuTable;
use crate::image::Images;
use crate::ledger::{Ledger, Record};
use crate::scenario::Scenario;
use crate::sites::Site;
use crate::socket::Hub;
use crate::state::State;
use crate::token::TokenKey;

#[derive(Debug)]
pub(crate) struct Validator {
    pub(crate) scenario: Scenario,
    pub(crate) signer: Signer,
    pub(crate) tokens: TokenKey,
    pub(crate) gpus: GpuTable,
    pub(crate) hub: Hub,
    pub(crate) images: Images,
    pub(crate) sites: Vec<Site>,
    /// `http://address:port` under which miners and containers reach this.
    pub(crate) api_url: String,
    pub(crate) client: reqwest::Client,
    pub(crate) shutdown: CancellationToken,
    planted: Mutex<Planted>,
    inner: Mutex<Inner>,
    state_path: PathBuf,
}

#[derive(Debug)]
struct Inner {
    state: State,
    ledger: Ledger,
}

/// What a change leads to besides the new state.
#[derive(Debug)]
pub(crate) struct Out {
    pub(crate) now: UnixMillis,
    entries: Vec<Entry>,
    changed: bool,
}

#[derive(Debug)]
enum Entry {
    Record(Record),
    Event(Event),
}

impl Out {
    pub(crate) fn record(&mut self, record: Record) {
        self.entries.push(Entry::Record(record));
    }

    pub(crate) fn publish(&mut self, event: Event) {
        self.entries.push(Entry::Event(event));
    }

    /// The state was not touched: do not write it.
    pub(crate) fn untouched(&mut self) {
        self.changed = false;
    }
}

/// What a validator is made of.
pub(crate) struct Parts {
    pub(crate) scenario: Scenario,
    pub(crate) signer: Signer,
    pub(crate) api_url: String,
    pub(crate) data: PathBuf,
    pub(crate) images: Images,
    pub(crate) sites: Vec<Site>,
    pub(crate) extra_hotkeys: Vec<Hotkey>,
    pub(crate) shutdown: CancellationToken,
}

impl Validator {
    /// Opens or begins the state and the ledger.
    pub(crate) fn open(parts: Parts) -> io::Result<Arc<Self>> {
        let state_path = parts.data.join("state.json");
        let ledger = Ledger::open(&parts.data.join("ledger.jsonl"))?;
        let fresh = || State {
            started_at: clock::now(),
            hotkeys: parts.scenario.hotkeys.iter().cloned().collect(),
            ..State::default()
        };
        let mut state = State::load(&state_path)?.unwrap_or_else(fresh);
        state.hotkeys.extend(parts.extra_hotkeys);
        let Parts { scenario, signer, .. } = parts;
        let secret = [b"launch tokens ", scenario.validator_seed.reveal().as_bytes()].concat();
        let client = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(std::time::Duration::from_secs(5))
            .build()
            .map_err(io::Error::other)?;
        let validator = Arc::new(Self {
            tokens: TokenKey::from_secret(&secret),
            gpus: GpuTable::new(&scenario.relaxed.gpu_types),
            hub: Hub::new(scenario.socket.clone()),
            planted: Mutex::new(Planted::new(scenario.faults.clone(), scenario.fault_seed)),
            inner: Mutex::new(Inner { state, ledger }),
            images: parts.images,
            sites: parts.sites,
            api_url: parts.api_url,
            shutdown: parts.shutdown,
            client,
            state_path,
            scenario,
            signer,
        });
        validator.change(|_, out| {
            out.record(Record::Started {
                scenario: validator.scenario.name.clone(),
                hotkey: validator.signer.hotkey().clone(),
            });
        });
        Ok(validator)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no holder of the lock panics")
    }

    pub(crate) fn planted(&self) -> MutexGuard<'_, Planted> {
        self.planted.lock().expect("no holder of the lock panics")
    }

    /// The clock by which this validator judges nonces; the scenario may set it wrong.
    pub(crate) fn nonce_clock(&self) -> UnixMillis {
        let skew = self.planted().faults.clock_skew_seconds;
        let ms = skew.unsigned_abs().saturating_mul(1000);
        if skew < 0 {
            clock::now() - ms
        } else {
            clock::now() + ms
        }
    }

    /// Looks at the state.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&State, UnixMillis) -> T) -> T {
        look(&self.inner().state, clock::now())
    }

    /// Looks at the ledger.
    pub(crate) fn ledger<T>(&self, look: impl FnOnce(&Ledger) -> T) -> T {
        look(&self.inner().ledger)
    }

    /// Changes the state; see the file's description for the order of what follows.
    pub(crate) fn change<T>(self: &Arc<Self>, change: impl FnOnce(&mut State, &mut Out) -> T) -> T {
        let mut guard = self.inner();
        let inner = &mut *guard;
        let mut out = Out {
            now: clock::now(),
            entries: vec![],
            changed: true,
        };
        let result = change(&mut inner.state, &mut out);
        if out.changed
            && let Err(error) = inner.state.save(&self.state_path)
        {
            tracing::error!(%error, "the state cannot be written");
        }
        for entry in out.entries {
            let record = match entry {
                Entry::Record(record) => record,
                Entry::Event(event) => self.send(event),
            };
            inner.ledger.append(out.now, record);
        }
        result
    }

    /// Adds to the ledger only.
    pub(crate) fn record(self: &Arc<Self>, record: Record) {
        self.inner().ledger.append(clock::now(), record);
    }

    fn send(self: &Arc<Self>, event: Event) -> Record {
        let fault = self.planted().of_event(&event.reason);
        let sent_to = match fault {
            Some(EventAction::Lose) => 0,
            Some(EventAction::Duplicate) => {
                self.hub.broadcast(&event);
                self.hub.broadcast(&event)
            }
            Some(EventAction::Delay { ms }) => {
                let (validator, event) = (self.clone(), event.clone());
                tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(ms)).await;
                    validator.hub.broadcast(&event);
                });
                0
            }
            None => self.hub.broadcast(&event),
        };
        Record::EventPublished {
            event,
            sent_to,
            fault: fault.map(|fault| format!("{fault:?}")),
        }
    }
}
