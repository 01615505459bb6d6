//! Names of the links to layers that overlay drivers give to the kernel, short enough for mount options of many layers.

use store::Digest;

/// Length of a name: with 128 of them and their separators, mount options fit into a page.
pub(super) const SHORT_LEN: usize = 26;
/// RFC 4648 base32, as in the engines' own names.
const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";

/// Candidate number `attempt` for the name of a layer's directory; the first one is practically always free.
pub(super) fn short_name(directory: &str, attempt: u32) -> String {
    let digest = Digest::of(format!("cachefs {attempt} {directory}").as_bytes());
    let digit = |byte: &u8| char::from(ALPHABET[usize::from(byte & 31)]);
    digest.as_bytes()[..SHORT_LEN].iter().map(digit).collect()
}
