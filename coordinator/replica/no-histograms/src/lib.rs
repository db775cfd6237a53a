//! What the Raft library calls of the crate `base2histogram`, doing nothing. The library counts for statistics that can
//! only be read with its feature `runtime-stats`, and the original makes tables of 18 MiB at the first count.

use std::fmt;
use std::marker::PhantomData;

/// Counts nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram<T = ()>(PhantomData<T>);

impl<T> Histogram<T> {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self(PhantomData)
    }

    /// Forgets the value.
    pub fn record(&mut self, _: u64) {}

    /// Forgets the value.
    pub fn record_n(&mut self, _: u64, _: u64) {}

    /// Those of no values.
    #[must_use]
    pub fn percentile_stats(&self) -> PercentileStats {
        PercentileStats::default()
    }
}

impl<T> Default for Histogram<T> {
    fn default() -> Self {
        Self::new()
    }
}

/// All 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PercentileStats {
    pub samples: u64,
    pub p0_1: u64,
    pub p1: u64,
    pub p5: u64,
    pub p10: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
}

impl fmt::Display for PercentileStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not counted")
    }
}

/// Shows nothing.
#[derive(Debug, Clone, Default)]
pub struct AsciiChart;

impl AsciiChart {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self
    }

    /// Leaves the histogram out.
    #[must_use]
    pub fn add(self, _: &str, _: Histogram) -> Self {
        self
    }
}

impl fmt::Display for AsciiChart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("not counted")
    }
}
