//! What a cold start asks of the shared disk, and how many of its requests had to wait for each other.

use std::fmt::Write as _;

use ::tests::slowdisk::Asked;

/// Round trips one after the other until the first bytes of content arrived: each request on the way was asked after the
/// one before it was answered. Nothing if no content was read.
pub(super) fn trips_to_content(timeline: &[Asked]) -> Option<usize> {
    let mut depths: Vec<(f64, usize)> = Vec::new();
    let mut to_content: Option<(f64, usize)> = None;
    for asked in timeline {
        let before = depths.iter().filter(|(answered, _)| *answered <= asked.at_ms).map(|(_, depth)| *depth);
        let depth = before.max().unwrap_or(0) + 1;
        let Some(wait) = asked.wait_ms else { continue };
        let answered = asked.at_ms + wait;
        depths.push((answered, depth));
        let is_content = asked.kind == "read" && asked.bytes > 0 && asked.object.contains("packs/");
        if is_content && to_content.is_none_or(|(first, _)| answered < first) {
            to_content = Some((answered, depth));
        }
    }
    to_content.map(|(_, depth)| depth)
}

/// The timeline as a table.
pub(super) fn table(timeline: &[Asked]) -> String {
    let mut table = "       at ms    wait ms      bytes  request\n".to_owned();
    for Asked { at_ms, wait_ms, kind, object, bytes } in timeline {
        let wait = wait_ms.map_or("-".to_owned(), |wait| format!("{wait:.1}"));
        let _ = writeln!(table, "{at_ms:>12.1} {wait:>10} {bytes:>10}  {kind} {object}");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(at_ms: f64, wait_ms: f64, kind: &str, object: &str, bytes: u64) -> Asked {
        Asked { at_ms, wait_ms: Some(wait_ms), kind: kind.into(), object: object.into(), bytes }
    }

    #[test]
    fn requests_beside_each_other_are_one_trip() {
        let timeline = [
            asked(0.0, 5.0, "lookup", "store/packs/ab", 0),
            asked(0.1, 5.0, "lookup", "store/layers/cd", 0),
            asked(5.2, 5.0, "open", "store/packs/ab", 0),
            asked(5.3, 5.0, "read", "store/layers/cd", 900),
            asked(10.4, 9.0, "read", "store/packs/ab +0", 4096),
            asked(10.5, 6.0, "read", "store/packs/ab +4096", 4096),
            asked(30.0, 6.0, "read", "store/packs/ab +8192", 4096),
        ];
        assert_eq!(trips_to_content(&timeline), Some(3));
        assert_eq!(trips_to_content(&timeline[..4]), None);
        assert_eq!(table(&timeline).lines().count(), 8);
    }
}
