//! One piece of work for each of many things, on several threads.

use std::sync::atomic::{AtomicUsize, Ordering};

/// There may be more threads than processors: they wait for the shared disk.
const THREADS: usize = 8;

/// What `work` returns for each item, in the items' order; nothing where it panicked, and for what that thread did before.
pub(super) fn each<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<Option<R>> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut done = Vec::new();
        loop {
            let position = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(position) else { return done };
            done.push((position, work(item)));
        }
    };
    let mut results: Vec<Option<R>> = items.iter().map(|_| None).collect();
    let done: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS.min(items.len())).map(|_| scope.spawn(run)).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).flatten().collect()
    });
    for (position, result) in done {
        results[position] = Some(result);
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_a_panic_costs_no_place() {
        let items: Vec<u32> = (0..100).collect();
        assert_eq!(each(&items, |item| item * 2), items.iter().map(|item| Some(item * 2)).collect::<Vec<_>>());
        assert_eq!(each(&[] as &[u32], |item| *item), []);
        let results = each(&[1, 2, 3], |item| {
            assert!(*item != 2, "this panic is part of the test");
            *item
        });
        assert_eq!((results.len(), results[1]), (3, None));
    }
}
