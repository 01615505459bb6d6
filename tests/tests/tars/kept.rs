//! Intentional differences from Docker, each with its reason. The test also fails for a row that no archive needs.

use crate::engines::Verdict;

/// An intentional difference.
pub(crate) struct Kept {
    /// What differs, and why that is correct here.
    pub(crate) why: &'static str,
    /// Whether it explains that only one of the two refuses the archive.
    pub(crate) refusal: fn(ours: &Verdict, docker: &Verdict) -> bool,
    /// Whether it explains a line of the comparison, in which this project's tree is on the left.
    pub(crate) line: fn(&str) -> bool,
}

fn ours_says(ours: &Verdict, word: &str) -> bool {
    matches!(ours, Verdict::Refused(why) if why.contains(word))
}

/// All intentional differences.
pub(crate) const KEPT: &[Kept] = &[
    Kept {
        why: "A relative path that climbs above the root is refused. Docker takes it below the root, other tools elsewhere or not at all, \
              and nobody writes one without meaning harm.",
        refusal: |ours, _| ours_says(ours, "climbs out"),
        line: |_| false,
    },
    Kept {
        why: "A mark of an opaque directory below a file or a whiteout is refused. Docker hangs the attribute on the file, where it means \
              nothing to overlayfs.",
        refusal: |ours, _| ours_says(ours, "/.wh..wh..opq\" lies below something that is not a directory"),
        line: |_| false,
    },
    Kept {
        why: "A directory that a later entry of another spelling replaces (`/a` after `a/`) is taken, with all that was in it gone. Docker makes \
              the same files, and then fails as it sets the times of the directories that it remembers.",
        refusal: |_, docker| matches!(docker, Verdict::Refused(why) if why.contains("): chtimes ") || why.contains("\\nchtimes ")),
        line: |_| false,
    },
    Kept {
        why: "A layer's own attributes for overlayfs are left out: they would steer the kernel (redirects, metadata copies) on every host.",
        refusal: |_, _| false,
        line: |line| line.contains(": xattr trusted.overlay.") || line.contains(": xattr user.overlay."),
    },
];
