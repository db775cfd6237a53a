//! What a process says of itself: lines on standard error, as text or JSON, each with the name of the
//! process; and panics, which become lines too.

use std::fmt;

use replica::QUIET_LOG_DIRECTIVE;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::fmt::format::{DefaultFields, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, format};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::{SubscriberInitExt as _, TryInitError};
use tracing_subscriber::{Layer, Registry};

use crate::config::written::{Log, LogFormat};

/// Why nothing can be logged.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Directives.
    #[error("log.level, or RUST_LOG: {0}")]
    Level(#[from] BadDirective),
    /// Somebody else logs already.
    #[error("{0}")]
    Taken(#[from] TryInitError),
}

/// A directive that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("`{directive}`: {why}; write a level (off, error, warn, info, debug, trace) or target=level")]
pub struct BadDirective {
    directive: String,
    why: ParseError,
}

/// The filter of a level or of directives (`info,coordinator=debug`); libraries that chatter are kept quiet unless
/// named.
///
/// # Errors
/// [`BadDirective`], the first one.
pub fn filter(level: &str) -> Result<Targets, BadDirective> {
    let written = level.split(',').map(str::trim);
    let mut said = vec![QUIET_LOG_DIRECTIVE, runtime::kubernetes::QUIET_LOG_DIRECTIVE];
    // An empty one would be read as `error`, and would win over a level before it.
    for directive in written.filter(|directive| !directive.is_empty()) {
        directive.parse::<Targets>().map_err(|why| BadDirective {
            directive: directive.to_owned(),
            why,
        })?;
        said.push(directive);
    }
    Ok(said.join(",").parse().expect("each one was read"))
}

/// Makes this process log, and log its panics.
///
/// # Errors
/// [`Error`].
pub fn init(process: &'static str, log: &Log) -> Result<(), Error> {
    let more = std::env::var("RUST_LOG").unwrap_or_default();
    let filter = filter(&format!("{},{more}", log.level))?;
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false);
    let lines: Box<dyn Layer<Registry> + Send + Sync> = match log.format {
        LogFormat::Text => Box::new(lines.fmt_fields(DefaultFields::new()).event_format(Named {
            process,
            inner: format(),
        })),
        LogFormat::Json => Box::new(lines.fmt_fields(JsonFields::new()).event_format(Named {
            process,
            inner: format().json().flatten_event(true),
        })),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .try_init()?;
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string);
        let message = panic.payload_as_str().unwrap_or("no message");
        tracing::error!(place, message, "panic");
    }));
    Ok(())
}

/// Writes a line of `inner` with the process's name in it.
struct Named<F> {
    process: &'static str,
    inner: F,
}

impl<S, N, F> FormatEvent<S, N> for Named<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        match line.strip_prefix('{') {
            Some(rest) => write!(writer, "{{\"process\":\"{}\",{rest}", self.process),
            None => write!(writer, "{:<11} {line}", self.process),
        }
    }
}

/// An error with its causes, each said once: some errors repeat their cause in their own text, others leave
/// it to their source.
#[must_use]
pub fn chain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.ends_with(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_and_directives_are_read_and_chatter_is_not() {
        for info in ["info", "info,", " info , "] {
            let said = filter(info).expect("valid").to_string();
            assert_eq!(said, "kube_client=off,openraft=error,info");
        }
        assert!(filter("info,coordinator=debug").is_ok());
        let error = filter("info,loud=shouting").expect_err("no level").to_string();
        assert!(error.starts_with("`loud=shouting`: "), "{error}");
    }

    #[test]
    fn a_cause_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("open the state: {0}")]
        struct Repeating(#[source] std::io::Error);
        let cause = || std::io::Error::other("the disk is gone");
        let error = anyhow::Error::new(Repeating(cause())).context("start");
        assert_eq!(chain(&error), "start: open the state: the disk is gone");
        assert_eq!(
            chain(&anyhow::Error::new(cause()).context("start")),
            "start: the disk is gone"
        );
    }
}
