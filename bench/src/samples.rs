//! Repeated measurements of one quantity.

use serde::Serialize;

/// Values in the order in which they were measured.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    /// Adds a value.
    pub(crate) fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// The value that a fraction `share` (0 to 1) of the samples do not exceed, by the nearest rank.
    pub(crate) fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let rank = (share * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }

    /// The median, by the nearest rank.
    pub(crate) fn median(&self) -> f64 {
        self.quantile(0.5)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_nearest_ranks() {
        let mut samples = Samples::default();
        [5.0, 1.0, 4.0, 2.0, 3.0].into_iter().for_each(|v| samples.add(v));
        assert_eq!((samples.median(), samples.quantile(0.95), samples.quantile(0.0)), (3.0, 5.0, 1.0));
        assert!(Samples::default().median().is_nan());
    }
}
