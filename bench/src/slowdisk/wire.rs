//! The disk's current latency, bandwidth and fault, and counts of the requests to it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use super::queue::Queue;
use super::timeline::Timeline;

/// A kind of request that costs a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    Lookup,
    Attributes,
    ReadLink,
    Open,
    OpenForWriting,
    Read,
    List,
    Statistics,
    Write,
    Sync,
    Create,
    SetAttributes,
    Remove,
    Rename,
}

impl Operation {
    /// All operations, with the names that statistics use.
    const NAMES: [(Operation, &str); 14] = [
        (Operation::Lookup, "lookup"),
        (Operation::Attributes, "getattr"),
        (Operation::ReadLink, "readlink"),
        (Operation::Open, "open"),
        (Operation::OpenForWriting, "open_for_writing"),
        (Operation::Read, "read"),
        (Operation::List, "readdir"),
        (Operation::Statistics, "statfs"),
        (Operation::Write, "write"),
        (Operation::Sync, "fsync"),
        (Operation::Create, "create"),
        (Operation::SetAttributes, "setattr"),
        (Operation::Remove, "remove"),
        (Operation::Rename, "rename"),
    ];

    /// Its name in statistics.
    pub(super) fn name(self) -> &'static str {
        Operation::NAMES.iter().find(|(operation, _)| *operation == self).map_or("", |(_, name)| name)
    }

    fn changes(self) -> bool {
        use Operation::{Create, OpenForWriting, Remove, Rename, SetAttributes, Write};
        matches!(self, OpenForWriting | Write | Create | SetAttributes | Remove | Rename)
    }

    fn needs_room(self) -> bool {
        matches!(self, Operation::Write | Operation::Create)
    }
}

/// What is wrong with the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// Every request fails with EIO.
    Io,
    /// Every request fails with ESTALE, as after the server's file system was created anew.
    Stale,
    /// No request is answered until the fault ends.
    Hang,
    /// Changes fail with EROFS.
    ReadOnly,
    /// Requests that need space fail with ENOSPC.
    Full,
}

struct Character {
    latency: Duration,
    /// Bytes a second.
    bandwidth: Option<u64>,
    fault: Fault,
    /// When the wire will have carried everything that was put on it.
    free_at: Instant,
}

/// The connection to the disk.
pub(super) struct Wire {
    /// Guards latency, bandwidth and fault.
    character: Mutex<Character>,
    queue: Queue,
    pub(super) timeline: Timeline,
    requests: [AtomicU64; Operation::NAMES.len()],
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

impl Wire {
    pub(super) fn new(latency: Duration, bandwidth: Option<u64>) -> Wire {
        Wire {
            character: Mutex::new(Character { latency, bandwidth, fault: Fault::None, free_at: Instant::now() }),
            queue: Queue::new(),
            timeline: Timeline::default(),
            requests: Default::default(),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
        }
    }

    /// Counts a request and does `work` after the latency.
    pub(super) fn request(&self, operation: Operation, work: impl FnOnce() + Send + 'static) {
        if let Some(count) = self.requests.get(operation as usize) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        let latency = self.character.lock().latency;
        self.queue.push(Instant::now() + latency, work);
    }

    /// Fails with the errno of the current fault if that fault forbids the operation.
    pub(super) fn admit(&self, operation: Operation) -> io::Result<()> {
        let errno = match self.character.lock().fault {
            Fault::Io => Errno::EIO,
            Fault::Stale => Errno::ESTALE,
            Fault::ReadOnly if operation.changes() => Errno::EROFS,
            Fault::Full if operation.needs_room() => Errno::ENOSPC,
            _ => return Ok(()),
        };
        Err(errno.into())
    }

    /// Puts the bytes of a read or a write on the wire, and calls `answer` when the wire has carried them.
    pub(super) fn carry(&self, operation: Operation, bytes: u64, answer: impl FnOnce() + Send + 'static) {
        let sum = if operation == Operation::Write { &self.bytes_written } else { &self.bytes_read };
        sum.fetch_add(bytes, Ordering::Relaxed);
        let mut character = self.character.lock();
        let Some(bandwidth) = character.bandwidth else {
            drop(character);
            return answer();
        };
        let took = Duration::from_secs_f64(bytes as f64 / bandwidth as f64);
        character.free_at = character.free_at.max(Instant::now()) + took;
        let at = character.free_at;
        drop(character);
        self.queue.push(at, answer);
    }

    pub(super) fn set_latency(&self, latency: Duration) {
        self.character.lock().latency = latency;
    }

    /// Sets the bandwidth in bytes a second; `None` means no limit.
    pub(super) fn set_bandwidth(&self, bandwidth: Option<u64>) {
        self.character.lock().bandwidth = bandwidth;
    }

    pub(super) fn set_fault(&self, fault: Fault) {
        self.character.lock().fault = fault;
        self.queue.hold(fault == Fault::Hang);
    }

    /// Whether the disk currently has no space left.
    pub(super) fn is_full(&self) -> bool {
        self.character.lock().fault == Fault::Full
    }

    /// Resets all counts to zero.
    pub(super) fn reset(&self) {
        let all = self.requests.iter().chain([&self.bytes_read, &self.bytes_written]);
        all.for_each(|count| count.store(0, Ordering::Relaxed));
    }

    /// Requests of each kind and bytes, since the start or [`Wire::reset`].
    pub(super) fn statistics(&self) -> Value {
        let count = |operation: Operation| self.requests[operation as usize].load(Ordering::Relaxed);
        let operations: Map<String, Value> =
            Operation::NAMES.iter().map(|(operation, name)| ((*name).to_owned(), json!(count(*operation)))).collect();
        json!({
            "operations": operations,
            "requests": Operation::NAMES.iter().map(|(operation, _)| count(*operation)).sum::<u64>(),
            "bytes_read": self.bytes_read.load(Ordering::Relaxed),
            "bytes_written": self.bytes_written.load(Ordering::Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stand_in_the_order_of_operations() {
        for (index, (operation, _)) in Operation::NAMES.iter().enumerate() {
            assert_eq!(*operation as usize, index);
        }
    }

    #[test]
    fn faults_concern_what_they_should() {
        let wire = Wire::new(Duration::ZERO, None);
        let errno = |fault, operation| {
            wire.set_fault(fault);
            wire.admit(operation).err().and_then(|error| error.raw_os_error()).map(Errno::from_raw)
        };
        assert_eq!(errno(Fault::Io, Operation::Lookup), Some(Errno::EIO));
        assert_eq!(errno(Fault::Stale, Operation::Read), Some(Errno::ESTALE));
        assert_eq!((errno(Fault::ReadOnly, Operation::Read), errno(Fault::Full, Operation::Remove)), (None, None));
        assert_eq!(errno(Fault::ReadOnly, Operation::Rename), Some(Errno::EROFS));
        assert_eq!(errno(Fault::Full, Operation::Write), Some(Errno::ENOSPC));
        assert_eq!(errno(Fault::None, Operation::Write), None);
    }

    #[test]
    fn what_was_asked_is_counted_until_the_reset() {
        let wire = Wire::new(Duration::ZERO, None);
        wire.request(Operation::Open, || {});
        wire.carry(Operation::Read, 7, || {});
        wire.carry(Operation::Write, 5, || {});
        let statistics = wire.statistics();
        assert_eq!((&statistics["operations"]["open"], &statistics["requests"]), (&json!(1), &json!(1)));
        assert_eq!((&statistics["bytes_read"], &statistics["bytes_written"]), (&json!(7), &json!(5)));
        wire.reset();
        assert_eq!((&wire.statistics()["requests"], &wire.statistics()["bytes_read"]), (&json!(0), &json!(0)));
    }
}
