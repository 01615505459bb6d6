//! Bars of a plot, and the bounds that their values are compared with.

use std::fmt;

use serde::Serialize;

/// The bound that a value is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Bound {
    /// The value should not be larger.
    AtMost(f64),
    /// The value should not be smaller.
    AtLeast(f64),
}

impl Bound {
    /// The number that the value is compared with.
    pub(crate) fn limit(self) -> f64 {
        match self {
            Bound::AtMost(limit) | Bound::AtLeast(limit) => limit,
        }
    }

    /// Whether `value` keeps to the bound. A value that was not measured (NaN) never does.
    pub(crate) fn holds(self, value: f64) -> bool {
        match self {
            Bound::AtMost(limit) => value <= limit,
            Bound::AtLeast(limit) => value >= limit,
        }
    }
}

/// One bar of the plot.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Bar {
    pub(super) label: String,
    pub(super) value: f64,
    pub(super) p95: Option<f64>,
    pub(super) bound: Option<Bound>,
    pub(super) group: String,
}

impl Bar {
    /// A bar as long as `value`. Bars of one group share a scale, so the group's name ends with its unit:
    /// `python start, s`.
    pub(crate) fn new(group: impl Into<String>, label: impl Into<String>, value: f64) -> Bar {
        Bar { group: group.into(), label: label.into(), value, p95: None, bound: None }
    }

    /// Adds a whisker that ends at `p95`, in the value's unit.
    pub(crate) fn p95(mut self, p95: f64) -> Bar {
        self.p95 = Some(p95);
        self
    }

    /// Adds a line at `bound`. A bar that misses it is drawn in another colour.
    pub(crate) fn bound(mut self, bound: Bound) -> Bar {
        self.bound = Some(bound);
        self
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::AtMost(limit) => write!(f, "<= {limit}"),
            Bound::AtLeast(limit) => write!(f, ">= {limit}"),
        }
    }
}
