//! The supervisor's own door: a Unix socket that only its owner can open, which answers even when no
//! coordinator does.
//!
//! ```text
//! <data dir>/run/agent.sock (0600)   GET /status   the processes; marked stale, since nobody else was asked
//!                                    GET /ping
//! ```

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use axum::extract::State;
use axum::routing::get;
use axum::{Json, Router};
use protocol::time::UnixMillis;
use serde::Serialize;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

use crate::processes::child::{ChildStatus, Children};

/// The answer to `GET /status`.
#[derive(Debug, Serialize)]
struct Status {
    /// Always true: this is what one machine knows of itself, confirmed by nobody.
    stale: bool,
    /// When this was so.
    as_of: UnixMillis,
    /// Process id of the supervisor.
    pid: u32,
    version: &'static str,
    children: Vec<ChildStatus>,
}

/// The door, open but not served yet.
#[derive(Debug)]
pub struct Door {
    listener: UnixListener,
    path: PathBuf,
}

impl Door {
    /// Listens in a folder that is ours; replaces what a dead process left.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Mode first, name second.
        let unnamed = path.with_extension("new");
        match fs::remove_file(&unnamed) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&unnamed)?;
        fs::set_permissions(&unnamed, fs::Permissions::from_mode(0o600))?;
        fs::rename(&unnamed, path)?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }

    /// Answers until `shutdown`.
    pub async fn serve(self, children: Children, shutdown: CancellationToken) {
        let routes = Router::new()
            .route("/ping", get(|| std::future::ready("pong")))
            .route("/status", get(status))
            .with_state(children);
        // Not gracefully: an open connection must not hold up the agent's end.
        let served = axum::serve(self.listener, routes);
        if let Some(Err(error)) = shutdown.run_until_cancelled(served.into_future()).await {
            tracing::error!(%error, "the local door closed");
        }
        let _ = fs::remove_file(&self.path);
    }
}

async fn status(State(children): State<Children>) -> Json<Status> {
    let (as_of, children) = children.look();
    Json(Status {
        stale: true,
        as_of,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION"),
        children,
    })
}
