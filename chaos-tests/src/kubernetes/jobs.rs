//! The Jobs of a namespace, and when each was first seen.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use coordinator::clock::{Clock as _, WallClock};
use futures_util::StreamExt as _;
use k8s_openapi::api::batch::v1::Job;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use protocol::time::UnixMillis;
use runtime::manifest::CHUTE_LABEL;
use tokio::sync::Notify;
use tokio::time::sleep;

use super::pods::ASK_AGAIN;

/// Watches Jobs.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// By the chute.
    first: Mutex<BTreeMap<String, UnixMillis>>,
    news: Notify,
}

impl Jobs {
    /// Watches until it is dropped.
    pub(super) async fn watch(self: Arc<Self>, client: Client, namespace: String) {
        let jobs: Api<Job> = Api::namespaced(client, &namespace);
        let mut events = Box::pin(watcher(jobs, watcher::Config::default()));
        while let Some(event) = events.next().await {
            match event {
                Ok(watcher::Event::Apply(job) | watcher::Event::InitApply(job)) => {
                    if let Some(chute) = job.labels().get(CHUTE_LABEL) {
                        let now = WallClock.now();
                        self.lock().entry(chute.clone()).or_insert(now);
                        self.news.notify_waiters();
                    }
                }
                Ok(_) => {}
                Err(_) => sleep(ASK_AGAIN).await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, UnixMillis>> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// When the first Job of a chute was seen, once there is one.
    pub(super) async fn first_of(&self, chute: &str) -> UnixMillis {
        loop {
            let news = self.news.notified();
            if let Some(at) = self.lock().get(chute) {
                return *at;
            }
            news.await;
        }
    }
}
