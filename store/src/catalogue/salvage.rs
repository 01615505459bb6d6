//! Whole states under any number, and the replay of a damaged catalogue over its gaps.

use super::{Catalogue, Generation};

impl Catalogue {
    /// The generation that holds this whole state as `generation`, whatever that number is.
    pub(crate) fn whole(&self, generation: u64, epoch: u64) -> Generation {
        Generation { generation, snapshot: generation, ..self.next_whole(epoch, Vec::new()) }
    }

    /// Applies a generation's file although files between this state and it are lost.
    pub(crate) fn apply_over_gap(&mut self, next: Generation) {
        self.generation = next.generation.saturating_sub(1);
        // `apply` can only fail if the numbers are out of order, which they are not.
        let _ = self.apply(next);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Change;
    use super::super::tests::image;
    use super::*;

    #[test]
    fn a_whole_state_can_be_written_at_any_number() {
        // Not a number after which a whole state is due anyway.
        const AT: u64 = (1 << 40) + 2;
        let mut state = Catalogue::default();
        for n in 0..3 {
            let file = state.next(1, vec![Change::Set(image("r/a", Some(&format!("t{n}")), n))]);
            state.apply(file).unwrap();
        }
        let file = Generation::decode(&state.whole(AT, 7).encode().unwrap()).unwrap();
        assert_eq!((file.generation, file.snapshot, file.epoch), (AT, AT, 7));
        let mut reader = Catalogue::default();
        reader.apply(file).unwrap();
        assert_eq!(reader.tags().collect::<Vec<_>>(), state.tags().collect::<Vec<_>>());
        let next = reader.next(7, vec![Change::Set(image("r/b", None, 9))]);
        assert_eq!((next.generation, next.snapshot), (AT + 1, AT));
        reader.apply_over_gap(Generation { generation: AT + 5, ..next });
        assert_eq!((reader.generation(), reader.images().count()), (AT + 5, 4));
    }
}
