//! Retention rules. Each applies to the images that its pattern matches; of several, the first one counts.

use coordinator_api::retention::RetentionRule;
use store::image::ImageRecord;

use crate::identity::image_pattern::{BadPattern, ImagePattern};

/// Rules with their compiled patterns.
pub(super) struct Rules(Vec<(ImagePattern, RetentionRule)>);

impl Rules {
    /// Compiles the rules' patterns.
    pub(super) fn compile(rules: &[RetentionRule]) -> Result<Rules, BadPattern> {
        let rule = |rule: &RetentionRule| Ok((ImagePattern::parse(&rule.pattern)?, rule.clone()));
        rules.iter().map(rule).collect::<Result<_, _>>().map(Rules)
    }

    /// The position of the first rule that matches an image.
    pub(super) fn first(&self, image: &ImageRecord) -> Option<usize> {
        self.0.iter().position(|(pattern, _)| pattern.matches_record(image))
    }

    /// The rule at a position.
    pub(super) fn get(&self, position: usize) -> &RetentionRule {
        &self.0[position].1
    }
}
