//! The signer process: the only one that holds the miner's seed.
//!
//! It reads the seed file, gives up what it does not need (privileges, core dumps, new files and sockets,
//! new processes), and then answers requests on one datagram socket: signatures over the enumerated kinds of
//! message at its own clock, and sealing. Each kind has a limit and a count. It has no network and never
//! learns of any; when it dies, the supervisor starts another one on the same socket.

use std::fs;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use coordinator::clock::Clock;
use coordinator::signer::key::{Key, Seed};
use coordinator::signer::wire::{Answer, Ask, DATAGRAM_BYTES_MAX, KindCount, Unreadable, decode, encode};
use coordinator::signer::{self, BodyRoute, MESSAGE_KIND_ROWS, MessageKind};
use protocol::hotkey::InvalidKey;
use protocol::time::UnixMillis;
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};
use rustix::thread::{Gid, Uid};

/// The longest seed file, in bytes; a wallet's hotkey file has a few hundred.
const SEED_FILE_BYTES_MAX: u64 = 16 * 1024;

/// Settings of the signer process.
#[derive(Debug, Clone)]
pub struct Config {
    /// File with the seed: hexadecimal, or a wallet's hotkey JSON.
    pub seed_file: PathBuf,
    /// User and group to become, when started as root. `nobody` is 65534.
    pub become_user: Option<(u32, u32)>,
}

/// Why the signer does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("seed file {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Others than the owner may access the file.
    #[error("seed file {path} has mode {mode:04o}: only its owner may have access, run chmod 600 {path}")]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Neither root nor the user of this process owns the file.
    #[error("seed file {path} belongs to user {owner}: it must belong to root or to the user of the signer")]
    ForeignOwner {
        /// The file.
        path: PathBuf,
        /// Who owns it.
        owner: u32,
    },
    /// Not a plain file, or too large for one.
    #[error("seed file {0} is not a plain file of at most {SEED_FILE_BYTES_MAX} bytes")]
    NotAFile(PathBuf),
    /// The content is no seed.
    #[error("seed file {path}: {error}")]
    Seed {
        /// The file.
        path: PathBuf,
        /// What is wrong. Repeats nothing of the content.
        error: InvalidKey,
    },
    /// Privileges could not be given up.
    #[error("{step}: {error}")]
    Confine {
        /// What was tried.
        step: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// The socket is unusable.
    #[error("the socket to the coordinator")]
    Socket(#[source] io::Error),
}

/// Runs the signer on standard input, which the supervisor has made one end of a datagram socket pair.
/// Call it before any thread is started. Returns only on error.
///
/// # Errors
/// [`Error`].
pub fn run_on_stdin(config: &Config, clock: &dyn Clock) -> Result<(), Error> {
    let stdin = io::stdin().as_fd().try_clone_to_owned().map_err(Error::Socket)?;
    let socket = UnixDatagram::from(stdin);
    // A terminal or a file would fail at the first request; say it at the start.
    socket.local_addr().map_err(Error::Socket)?;
    // The other end may have made the shared description non-blocking.
    socket.set_nonblocking(false).map_err(Error::Socket)?;
    let key = Key::new(&read_seed(&config.seed_file)?);
    confine(config)?;
    tracing::info!(hotkey = key.hotkey().as_str(), "signer ready");
    serve(&socket, &mut Desk::new(key, Limits::default()), clock)
}

/// Answers requests for as long as the socket works.
///
/// # Errors
/// [`Error::Socket`].
pub fn serve(socket: &UnixDatagram, desk: &mut Desk, clock: &dyn Clock) -> Result<(), Error> {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX + 1];
    loop {
        let length = match socket.recv(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::Socket(error)),
        };
        let answer = desk.answer(&buffer[..length], clock.now());
        // A request may have held a secret.
        buffer[..length].fill(0);
        let Some(answer) = answer else { continue };
        match socket.send(&answer) {
            Ok(_) => {}
            // Nobody waits for this answer any more.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                tracing::debug!("nobody waits for the answer");
            }
            Err(error) => return Err(Error::Socket(error)),
        }
    }
}

/// Reads the seed from a file that only its owner may access.
///
/// # Errors
/// [`Error`], naming the file and what to do.
pub fn read_seed(path: &Path) -> Result<Seed, Error> {
    let failed = |error| Error::Read {
        path: path.to_owned(),
        error,
    };
    // Not waiting: the path may be a pipe, which would block for ever.
    let nonblock = rustix::fs::OFlags::NONBLOCK.bits();
    let flags = i32::try_from(nonblock).unwrap_or(0);
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > SEED_FILE_BYTES_MAX {
        return Err(Error::NotAFile(path.to_owned()));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o177 != 0 {
        return Err(Error::OpenToOthers {
            path: path.to_owned(),
            mode,
        });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(Error::ForeignOwner {
            path: path.to_owned(),
            owner,
        });
    }
    let mut text = String::with_capacity(usize::try_from(metadata.len()).unwrap_or(0) + 1);
    file.take(SEED_FILE_BYTES_MAX)
        .read_to_string(&mut text)
        .map_err(failed)?;
    let seed = Seed::parse(&text).map_err(|error| Error::Seed {
        path: path.to_owned(),
        error,
    });
    let mut bytes = text.into_bytes();
    bytes.fill(0);
    std::hint::black_box(&bytes);
    seed
}

/// Gives up what a signer does not need. No file, socket or process can be opened afterwards.
fn confine(config: &Config) -> Result<(), Error> {
    let failed = |step| {
        move |error: rustix::io::Errno| Error::Confine {
            step,
            error: error.into(),
        }
    };
    if let Some((user, group)) = config
        .become_user
        .filter(|_| rustix::process::geteuid().is_root())
    {
        // The calls below act on one thread; another one would keep root.
        let threads = fs::read_dir("/proc/self/task").map_or(1, Iterator::count);
        if threads != 1 {
            return Err(Error::Confine {
                step: "become another user",
                error: io::Error::other(format!("{threads} threads are running")),
            });
        }
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        rustix::thread::set_thread_groups(&[]).map_err(failed("give up supplementary groups"))?;
        rustix::thread::set_thread_res_gid(group, group, group).map_err(failed("become another group"))?;
        rustix::thread::set_thread_res_uid(user, user, user).map_err(failed("become another user"))?;
    }
    rustix::thread::set_no_new_privs(true).map_err(failed("no new privileges"))?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("no dumps"))?;
    // Without its supervisor it serves nobody.
    rustix::process::set_parent_process_death_signal(Some(Signal::TERM))
        .map_err(failed("end with parent"))?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    for (resource, step) in [
        (Resource::Core, "no core dumps"),
        (Resource::Nproc, "no new processes"),
        // Last: from here on nothing can be opened, what is open stays usable.
        (Resource::Nofile, "no new files and sockets"),
    ] {
        rustix::process::setrlimit(resource, none).map_err(failed(step))?;
    }
    Ok(())
}

/// How many requests of a kind are granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// At once.
    pub burst: u32,
    /// Per minute, in the long run.
    pub per_minute: u32,
}

/// Limits for each kind of message, and for sealing and opening together.
#[derive(Debug, Clone)]
pub struct Limits {
    kinds: [Rate; MESSAGE_KIND_ROWS],
    sealing: Rate,
}

impl Limits {
    /// The same limit for everything; for tests.
    #[must_use]
    pub fn all(rate: Rate) -> Self {
        Self {
            kinds: [rate; MESSAGE_KIND_ROWS],
            sealing: rate,
        }
    }
}

impl Default for Limits {
    /// Well above what a busy miner of a thousand servers needs, well below what a thief would like.
    fn default() -> Self {
        let rate = |burst, per_minute| Rate { burst, per_minute };
        let mut limits = Self::all(rate(100, 600));
        let body = |route| MessageKind::Body {
            route,
            sha256: [0; 32],
        };
        for (kind, rate) in [
            // Several validators, and fast reconnects.
            (MessageKind::SocketAuth, rate(30, 60)),
            // A header set serves a host for a minute or more.
            (MessageKind::Registry, rate(2_000, 6_000)),
            (MessageKind::MinerRead, rate(300, 1_200)),
            (MessageKind::VerificationStatus, rate(300, 3_000)),
            (MessageKind::OwnDevices, rate(1_000, 3_000)),
            (body(BodyRoute::UploadAudit), rate(10, 10)),
        ] {
            limits.kinds[kind.row()] = rate;
        }
        limits.sealing = rate(5_000, 30_000);
        limits
    }
}

/// A token bucket. Tokens are counted in thousandths, so that slow rates work between quick requests.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: Rate,
    milli_tokens: u64,
    filled_at: UnixMillis,
}

impl Bucket {
    fn new(rate: Rate) -> Self {
        Self {
            rate,
            milli_tokens: u64::from(rate.burst) * 1000,
            filled_at: UnixMillis(0),
        }
    }

    fn take(&mut self, now: UnixMillis) -> bool {
        let full = u64::from(self.rate.burst) * 1000;
        // A clock that jumps back gives nothing, one that jumps ahead at most a full bucket.
        let gained = now
            .since(self.filled_at)
            .saturating_mul(u64::from(self.rate.per_minute))
            / 60;
        if gained > 0 || now < self.filled_at {
            self.milli_tokens = self.milli_tokens.saturating_add(gained).min(full);
            self.filled_at = now;
        }
        let granted = self.milli_tokens >= 1000;
        if granted {
            self.milli_tokens -= 1000;
        }
        granted
    }
}

#[derive(Debug, Clone, Copy)]
struct Row {
    label: &'static str,
    bucket: Bucket,
    granted: u64,
    limited: u64,
}

/// Takes requests apart, applies the limits, answers.
#[derive(Debug)]
pub struct Desk {
    key: Key,
    kinds: [Row; MESSAGE_KIND_ROWS],
    sealing: Row,
    unreadable: u64,
}

impl Desk {
    /// A desk with full buckets.
    #[must_use]
    pub fn new(key: Key, limits: Limits) -> Self {
        let row = |label, rate| Row {
            label,
            bucket: Bucket::new(rate),
            granted: 0,
            limited: 0,
        };
        Self {
            key,
            kinds: limits.kinds.map(|rate| row("", rate)),
            sealing: row("sealing", limits.sealing),
            unreadable: 0,
        }
    }

    /// The answer to a datagram. `None`: it has not even an id, so nothing can be answered.
    pub fn answer(&mut self, datagram: &[u8], now: UnixMillis) -> Option<Vec<u8>> {
        let (id, answer) = match decode::<Ask>(datagram) {
            Ok((id, ask)) => (id, self.answer_to(ask, now)),
            Err(error) => {
                self.unreadable += 1;
                tracing::warn!(%error, "request refused");
                let Unreadable::Unknown { id, .. } = error else {
                    return None;
                };
                (
                    id,
                    Answer::Refused("unknown version or kind of request".to_owned()),
                )
            }
        };
        encode(id, &answer).ok()
    }

    fn answer_to(&mut self, ask: Ask, now: UnixMillis) -> Answer {
        match ask {
            Ask::Hotkey => Answer::Hotkey(self.key.hotkey().to_string()),
            Ask::Counts => Answer::Counts(self.counts()),
            Ask::Sign(kind) => {
                let row = &mut self.kinds[kind.row()];
                row.label = kind.label();
                if !granted(row, now) {
                    return Answer::Limited(kind.label().to_owned());
                }
                Answer::Signed(self.key.sign(&kind, now))
            }
            Ask::Seal(..) | Ask::Unseal(..) if !granted(&mut self.sealing, now) => {
                Answer::Limited(self.sealing.label.to_owned())
            }
            Ask::Seal(kind, plaintext) => bytes(self.key.seal(kind, &plaintext)),
            Ask::Unseal(kind, sealed) => bytes(self.key.unseal(kind, &sealed)),
        }
    }

    /// Counts of all that was asked for.
    fn counts(&self) -> Vec<KindCount> {
        let asked = |row: &&Row| row.granted + row.limited > 0;
        let mut counts: Vec<KindCount> = self
            .kinds
            .iter()
            .chain([&self.sealing])
            .filter(asked)
            .map(|row| KindCount {
                kind: row.label.to_owned(),
                granted: row.granted,
                limited: row.limited,
            })
            .collect();
        if self.unreadable > 0 {
            counts.push(KindCount {
                kind: "unreadable".to_owned(),
                granted: 0,
                limited: self.unreadable,
            });
        }
        counts
    }
}

fn granted(row: &mut Row, now: UnixMillis) -> bool {
    let granted = row.bucket.take(now);
    if granted {
        row.granted += 1;
    } else {
        row.limited += 1;
        tracing::warn!(kind = row.label, limited = row.limited, "limit reached");
    }
    granted
}

fn bytes(result: signer::Result<Vec<u8>>) -> Answer {
    match result {
        Ok(bytes) => Answer::Bytes(bytes),
        Err(signer::Error::NotOpened(_)) => Answer::NotOpened,
        Err(signer::Error::TooLong(length)) => Answer::TooLong(length as u64),
        Err(error) => Answer::Refused(error.to_string()),
    }
}
