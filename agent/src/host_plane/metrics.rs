//! What the host's other processes count, at one address, for Prometheus. No signature is asked for there: it is for
//! networks that the operator trusts.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use coordinator::api::{self, Limits};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::neighbour::Neighbour;

/// The processes with something to say, by name.
pub type Processes = Vec<(&'static str, Neighbour)>;

/// Answers `GET /metrics` until `shutdown`.
pub async fn serve(listener: TcpListener, processes: Processes, shutdown: CancellationToken) {
    let routes = Router::new()
        .route("/metrics", get(all))
        .with_state(Arc::new(processes));
    api::serve(routes, Limits::default(), listener, shutdown).await;
}

async fn all(State(processes): State<Arc<Processes>>) -> impl IntoResponse {
    let mut texts = Vec::new();
    for (name, neighbour) in processes.iter() {
        let text = neighbour.metrics().await;
        if let Err(error) = &text {
            tracing::debug!(process = name, %error, "no metrics");
        }
        texts.push((*name, text.ok()));
    }
    let form = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(CONTENT_TYPE, form)], joined(&texts))
}

/// One text of several, and which of them there were.
fn joined(texts: &[(&str, Option<String>)]) -> String {
    let mut all = String::new();
    for text in texts.iter().filter_map(|(_, text)| text.as_deref()) {
        all.push_str(text.strip_suffix("# EOF\n").unwrap_or(text));
    }
    all.push_str("# HELP chutes_process_up 1 if the process of the host answers.\n");
    all.push_str("# TYPE chutes_process_up gauge\n");
    for (name, text) in texts {
        let up = u8::from(text.is_some());
        all.push_str(&format!("chutes_process_up{{process=\"{name}\"}} {up}\n"));
    }
    all.push_str("# EOF\n");
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_does_not_answer_is_seen_and_hides_no_other() {
        let data = "# TYPE chutes_a counter\nchutes_a_total 1\n# EOF\n".to_owned();
        let text = joined(&[("data", Some(data)), ("proof", None)]);
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("# ")).collect();
        let expected = [
            "chutes_a_total 1",
            "chutes_process_up{process=\"data\"} 1",
            "chutes_process_up{process=\"proof\"} 0",
        ];
        assert_eq!(lines, expected);
        assert_eq!(text.matches("# EOF").count(), 1);
        assert!(text.ends_with("# EOF\n"));
    }
}
