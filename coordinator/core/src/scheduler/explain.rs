//! Why a chute is not on a server, for people who ask.
//!
//! It says what the rules say of each server as it is now; what a strategy thinks of the chute is in the
//! reasons of its decisions.

use super::view::{ChuteView, DISK_GB_DEFAULT, View};

/// One server, from a chute's point of view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opinion {
    /// Its name.
    pub server: String,
    /// What is in the way; none if the chute could be placed there at once.
    pub obstacle: Option<String>,
}

/// What stands between a chute and each enrolled server.
#[must_use]
pub fn servers_for(view: &View<'_>, chute: &ChuteView<'_, '_>) -> Vec<Opinion> {
    let obstacle = |index: usize| {
        let server = &view.servers()[index];
        if *server.validator != chute.key().validator {
            return Some("it works for another validator".to_owned());
        }
        if let Some(why) = chute.other_kind(server) {
            return Some(why.to_owned());
        }
        if let Some(why) = &server.unavailable {
            return Some(why.clone());
        }
        let mut obstacles = Vec::new();
        for pool in view.pools().iter().filter(|pool| pool.server == index) {
            let short_ref = view.short_ref(pool.class);
            let needed = usize::try_from(chute.gpu_count()).unwrap_or(usize::MAX);
            if !chute.supported_gpus().contains(short_ref) {
                obstacles.push(format!("the chute does not run on {short_ref}"));
            } else if let Some(why) = chute.kept_off(short_ref) {
                obstacles.push(why);
            } else if pool.free.len() < needed {
                let (free, total) = (pool.free.len(), pool.total);
                obstacles.push(format!(
                    "{free} of {total} {short_ref} are free, {needed} are needed"
                ));
            } else if server.disk_left_gb < DISK_GB_DEFAULT {
                let left = server.disk_left_gb;
                obstacles.push(format!(
                    "{left} GB of disk are left, {DISK_GB_DEFAULT} are needed"
                ));
            } else {
                return None;
            }
        }
        if obstacles.is_empty() {
            obstacles.push("it has no GPUs".to_owned());
        }
        Some(obstacles.join("; "))
    };
    view.servers()
        .iter()
        .enumerate()
        .map(|(index, server)| Opinion {
            server: server.name.to_owned(),
            obstacle: obstacle(index),
        })
        .collect()
}
