//! Whether the cluster may give a chute a port on which the agent itself listens.
//!
//! No object says which node ports there are, and a trial (`dryRun`) takes any. So the API server is asked for a Service
//! that cannot be, with a port below all ranges: it refuses, and says which are the valid ones.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, PostParams};

use super::Config;
use super::trouble::Pauses;
use crate::manifest::NODE_LABEL;

const NAME: &str = "chutes-agent-node-ports";

/// The cluster's node ports.
///
/// # Errors
/// What the API server said instead, in words.
pub async fn range(services: &Api<Service>, config: &Config) -> Result<RangeInclusive<u16>, String> {
    match services.create(&PostParams::default(), &impossible(config)).await {
        Err(kube::Error::Api(status)) => {
            read(&status.message).ok_or_else(|| format!("{} ({})", status.message, status.code))
        }
        Err(error) => Err(error.to_string()),
        Ok(_) => {
            let deleted = services.delete(NAME, &DeleteParams::default()).await;
            Err(deleted.map_or_else(|error| error.to_string(), |_| "it has port 1".to_owned()))
        }
    }
}

/// The range that a refusal names.
fn read(refusal: &str) -> Option<RangeInclusive<u16>> {
    let (_, range) = refusal.split_once("range of valid ports is ")?;
    let digits = |text: &str| text.chars().take_while(char::is_ascii_digit).collect::<String>();
    let (first, last) = range.split_once('-')?;
    Some(first.parse().ok()?..=digits(last).parse().ok()?)
}

/// Asks until there is an answer, and warns.
pub(super) async fn look(services: Api<Service>, config: Config) {
    let mut pauses = Pauses::new();
    let range = loop {
        match range(&services, &config).await {
            Ok(range) => break range,
            Err(why) => tracing::debug!(why, "which node ports there are is not known yet"),
        }
        pauses.pause().await;
    };
    let ours = config.reserved_ports.iter().filter(|port| range.contains(port));
    let ours: Vec<&u16> = ours.collect();
    if !ours.is_empty() {
        tracing::warn!(
            ports = ?ours,
            ?range,
            "the cluster may give chutes ports on which this agent listens: their Services are made anew until they have \
             others, which fails when no others are left. Give the API server a range without them, such as \
             --service-node-port-range=31000-31999"
        );
    }
}

fn impossible(config: &Config) -> Service {
    let labels = BTreeMap::from([(NODE_LABEL.to_owned(), config.settings.node_name.clone())]);
    Service {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            labels: Some(labels),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            type_: Some("NodePort".to_owned()),
            ports: Some(vec![ServicePort {
                port: 1,
                node_port: Some(1),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_range() {
        let refusal = "Service \"x\" is invalid: spec.ports[0].nodePort: Invalid value: 1: provided port is not in the \
                       valid range. The range of valid ports is 31000-31999";
        assert_eq!(read(refusal), Some(31000..=31999));
        assert_eq!(read(&format!("{refusal}, or so")), Some(31000..=31999));
        for other in [
            "",
            "The range of valid ports is ",
            "The range of valid ports is 1-99999",
            "forbidden",
        ] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
