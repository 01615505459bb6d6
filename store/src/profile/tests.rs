//! Merging: what is selected, in which order, and that nothing grows without bound.

use proptest::prelude::*;

use super::*;
use crate::trace::tests::trace;

fn key(layer: u16, inode: u32, piece: u32) -> PieceKey {
    PieceKey { layer, inode: InodeIndex(inode), piece }
}

/// A profile of one trace per list of inodes, each from another host.
fn merged(starts: &[&[u32]]) -> PrefetchProfile {
    let mut profile = PrefetchProfile::new(trace("h", []).chain);
    for (number, inodes) in starts.iter().enumerate() {
        let one = trace(&format!("h{number}"), inodes.iter().map(|inode| (0, *inode, 0)));
        assert_eq!(profile.merge(&one).unwrap(), Merged::New);
    }
    profile
}

fn inodes(profile: &PrefetchProfile) -> Vec<u32> {
    profile.selection().iter().map(|one| one.key.inode.0).collect()
}

#[test]
fn few_starts_select_all_and_more_select_what_a_quarter_reads() {
    assert_eq!(inodes(&merged(&[&[3, 1], &[3, 1, 2], &[3, 9]])), [3, 1, 9, 2]);
    let five = merged(&[&[3, 1], &[3, 1, 2], &[3, 2, 9], &[3], &[3]]);
    assert_eq!(inodes(&five), [3, 1, 2], "1 of 5 starts read 9");
    let weights: Vec<u8> = five.selection().iter().map(Selected::weight_number).collect();
    assert_eq!(weights, [255, 102, 102]);
}

#[test]
fn of_a_piece_those_blocks_are_selected_that_a_quarter_reads() {
    let start = |number: u32, bits: &[u8]| {
        let mut one = trace(&format!("h{number}"), bits.iter().map(|_| (0, 5, 0)));
        one.touches.iter_mut().zip(bits).for_each(|(touch, bits)| touch.blocks = Blocks::from_bits(*bits));
        one
    };
    let mut profile = merged(&[]);
    let selected = |profile: &PrefetchProfile| profile.selection()[0].blocks;
    // A piece may come twice in a trace, with other blocks.
    profile.merge(&start(0, &[0b1, 0b100])).unwrap();
    assert_eq!(selected(&profile), Blocks::from_bits(0b101));
    (1..6).for_each(|number| _ = profile.merge(&start(number, &[0b1])).unwrap());
    assert_eq!(selected(&profile), Blocks::from_bits(0b1), "one of six starts is less than a quarter");
    let decoded = PrefetchProfile::decode(&profile.encode().unwrap()).unwrap();
    assert_eq!(decoded, profile);
    // Starts that differ in every block still need the piece.
    let mut differing = merged(&[]);
    (0..8).for_each(|number| _ = differing.merge(&start(number, &[1 << number])).unwrap());
    assert_eq!(selected(&differing), Blocks::ALL);
    let text = String::from_utf8(profile.encode().unwrap()).unwrap();
    assert!(text.contains("\"blocks\":[[0,[6,0,1,0,0,0,0,0]]]"), "{text}");
    for wrong in ["[[1,[6,0,1,0,0,0,0,0]]]", "[[0,[7,0,1,0,0,0,0,0]]]"] {
        let wrong = text.replace("[[0,[6,0,1,0,0,0,0,0]]]", wrong);
        assert!(PrefetchProfile::decode(wrong.as_bytes()).is_err());
    }
}

#[test]
fn what_is_inherited_holds_until_own_starts_outweigh_it() {
    let old = merged(&[&[3, 1], &[3, 1], &[3, 2], &[3]]);
    let (chain, from) = (trace("h", []).chain, Digest::of(b"predecessor"));
    let needed: Vec<_> = old.selection().iter().map(|one| (one.key, one.blocks, one.weight)).collect();
    let mut profile = PrefetchProfile::inherited(chain, from, needed);
    assert_eq!((inodes(&profile), profile.starts()), (inodes(&old), 0));
    assert_eq!(PrefetchProfile::decode(&profile.encode().unwrap()).unwrap(), profile);
    for start in 0..7 {
        assert_eq!(profile.origin(), Origin::Inherited { from }, "after {start} starts");
        assert!(inodes(&profile).contains(&3), "half of the starts and more, or as good as a quarter");
        profile.merge(&trace(&format!("n{start}"), [(0, 7, 0)])).unwrap();
    }
    assert_eq!((inodes(&profile), profile.origin()), (vec![7], Origin::Traced));
    assert_eq!(PrefetchProfile::decode(&profile.encode().unwrap()).unwrap(), profile);
    let all = (0..ENTRIES_MAX as u32 + 9).map(|inode| (key(0, inode, 0), Blocks::ALL, 1.0));
    assert_eq!(PrefetchProfile::inherited(chain, from, all).selection().len(), ENTRIES_MAX, "a profile is bounded");
}

#[test]
fn the_first_trace_replaces_a_guess() {
    let chain = trace("h", []).chain;
    let mut profile = PrefetchProfile::guessed(chain, [9, 4, 5].map(|inode| (key(0, inode, 0), Blocks::ALL)));
    assert_eq!((inodes(&profile), profile.starts(), profile.origin()), (vec![9, 4, 5], 0, Origin::Guessed));
    assert_eq!(PrefetchProfile::decode(&profile.encode().unwrap()).unwrap(), profile);
    profile.merge(&trace("h", [(0, 5, 0), (0, 7, 0)])).unwrap();
    assert_eq!((inodes(&profile), profile.starts(), profile.origin()), (vec![5, 7], 1, Origin::Traced));
    assert_eq!(profile.selection()[0].weight_number(), 255, "the guess counts no more");
}

#[test]
fn repeated_touches_and_repeated_traces_count_once() {
    let mut profile = merged(&[]);
    let one = trace("h", [(0, 5, 0), (0, 6, 0), (0, 5, 0), (0, 7, 0)]);
    assert_eq!(profile.merge(&one).unwrap(), Merged::New);
    assert_eq!(profile.merge(&one).unwrap(), Merged::Again);
    assert_eq!(profile.starts(), 1);
    let ranks: Vec<f64> = profile.selection().iter().map(|one| one.rank).collect();
    assert_eq!(ranks, [0.0, 1.0, 2.0]);
    let mut other = trace("h", []);
    other.chain = Digest::of(b"other");
    assert!(profile.merge(&other).is_err());
}

#[test]
fn traces_of_one_token_do_not_outweigh_all_others() {
    let mut profile = PrefetchProfile::new(trace("h", []).chain);
    let mut send = |sender: &str, host: String, inodes: &[u32]| {
        let one = trace(&host, inodes.iter().map(|inode| (0, *inode, 0)));
        profile.merge_sent(&one, Sent { by: sender, at: 1000 }).unwrap()
    };
    // While it is the only sender, all its traces count; once others send too, they no longer do.
    (0..50).for_each(|n| _ = send("liar", format!("l{n}"), &[66]));
    for number in 0..10 {
        assert_eq!(send("honest", format!("h{number}"), &[1, 2]), Merged::New);
        (0..20).for_each(|n| _ = send("liar", format!("m{number}.{n}"), &[66]));
    }
    assert_eq!(send("liar", "again".to_owned(), &[66]), Merged::Outweighs);
    let weights: Vec<(u32, bool)> =
        profile.selection().iter().map(|one| (one.key.inode.0, one.weight >= 0.45)).collect();
    assert_eq!(weights.iter().filter(|(_, heavy)| *heavy).count(), 3, "{weights:?}");
    let decoded = PrefetchProfile::decode(&profile.encode().unwrap()).unwrap();
    assert_eq!(decoded, profile, "it is remembered");
}

#[test]
fn old_habits_fade() {
    let mut starts = vec![&[1, 2][..]; STARTS_MAX as usize];
    starts.extend(vec![&[1, 3][..]; STARTS_MAX as usize]);
    let profile = merged(&starts);
    assert_eq!(profile.starts(), 2 * u64::from(STARTS_MAX));
    assert_eq!(inodes(&profile), [1, 2, 3]);
    starts.extend(vec![&[1, 3][..]; STARTS_MAX as usize]);
    assert_eq!(inodes(&merged(&starts)), [1, 3]);
}

#[test]
fn precision_and_recall_are_those_of_the_last_starts_with_a_pack() {
    let mut profile = merged(&[]);
    assert_eq!((profile.precision(), profile.recall()), (None, None));
    let mut cold = trace("cold", []);
    cold.profile = None;
    profile.merge(&cold).unwrap();
    assert_eq!(profile.outcome(), None);
    // The later starts arrive first: the times at which they began decide.
    for began in (0..40).rev() {
        let mut one = trace("h", []);
        one.started_at = began;
        if began < 24 {
            one.outcome = Outcome::default();
        }
        profile.merge(&one).unwrap();
    }
    assert_eq!(profile.outcomes.len(), OUTCOMES_MAX);
    assert_eq!(profile.precision(), Some(0.75));
    assert_eq!(profile.recall(), Some(6.0 / 9.0));
}

#[test]
fn a_profile_is_bounded_and_what_was_read_often_stays() {
    let mut profile = merged(&[]);
    for host in 0..4u32 {
        let mine = (0..AccessTrace::TOUCHES_MAX as u32 - 1).map(|n| (1, 1 + host, n));
        profile.merge(&trace(&host.to_string(), std::iter::once((0, 7, 0)).chain(mine))).unwrap();
    }
    assert_eq!(profile.reads.len(), ENTRIES_MAX);
    assert_eq!(profile.reads[&key(0, 7, 0)].starts, 4);
    assert_eq!(PrefetchProfile::decode(&profile.encode().unwrap()).unwrap(), profile);
}

#[test]
fn room_goes_to_the_heaviest() {
    let profile = merged(&[&[1, 2, 3, 4], &[2, 3, 4], &[3, 4]]);
    let room = |most| -> Vec<u32> {
        let len = |one: &Selected| if one.key.inode.0 == 4 { 0 } else { 10 };
        heaviest(profile.selection(), len, most).iter().map(|one| one.key.inode.0).collect()
    };
    assert_eq!(room(9), inodes(&profile).into_iter().filter(|inode| *inode != 4).collect::<Vec<_>>());
    assert_eq!(room(2), inodes(&profile).into_iter().filter(|inode| [2, 3].contains(inode)).collect::<Vec<_>>());
    assert_eq!(room(1), [3]);
    assert_eq!(room(0), [0u32; 0]);
}

fn starts() -> impl Strategy<Value = Vec<Vec<(u16, u32, u32)>>> {
    let touch = (0..2u16, 0..6u32, 0..3u32);
    proptest::collection::vec(proptest::collection::vec(touch, 0..12), 1..STARTS_MAX as usize)
}

proptest! {
    #[test]
    fn the_order_of_traces_does_not_matter(starts in starts(), seed in any::<u64>()) {
        let traces: Vec<_> = starts.iter().enumerate().map(|(n, touches)| {
            let mut one = trace(&n.to_string(), touches.iter().copied());
            one.started_at = n as u64;
            one
        }).collect();
        let mut order: Vec<usize> = (0..traces.len()).collect();
        order.sort_by_key(|n| (*n as u64 + 1).wrapping_mul(seed | 1));
        let mut profiles = [PrefetchProfile::new(traces[0].chain), PrefetchProfile::new(traces[0].chain)];
        for (forward, other) in (0..).zip(order) {
            let at: usize = forward;
            profiles[0].merge(&traces[at]).unwrap();
            profiles[1].merge(&traces[other]).unwrap();
        }
        prop_assert_eq!(profiles[0].selection(), profiles[1].selection());
        prop_assert_eq!(&profiles[0].outcomes, &profiles[1].outcomes);
        prop_assert_eq!(&PrefetchProfile::decode(&profiles[0].encode().unwrap()).unwrap(), &profiles[0]);
    }

    #[test]
    fn damaged_bytes_never_panic(at in any::<prop::sample::Index>(), to in any::<u8>()) {
        let mut bytes = merged(&[&[1, 2], &[2, 3]]).encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] = to;
        if let Ok(profile) = PrefetchProfile::decode(&bytes) {
            profile.selection();
        }
    }
}
