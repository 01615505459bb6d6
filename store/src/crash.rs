//! Crash points: the places where a test ends this process for real, to see what is left.
//!
//! Every step that must survive a crash calls [`crash_point`] with its name. In a build with debug assertions one point
//! can be armed; the process then kills itself there (SIGKILL: nothing is flushed, dropped or logged). A release build
//! has none of this. [`CrashPoint::ALL`] is the only list of points. The test `crashes` goes through all of them, so
//! that a point which no test reaches is a failing test.

/// Whether this build has crash points.
pub const ENABLED: bool = cfg!(debug_assertions);

macro_rules! points {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A place where the process can be made to die.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum CrashPoint {
            $($(#[$doc])* $variant,)*
        }

        impl CrashPoint {
            /// All points, roughly in the order in which a coordinator first reaches them.
            pub const ALL: &[CrashPoint] = &[$(CrashPoint::$variant,)*];

            /// The name by which the point is armed: the operation, and how far it is.
            pub fn name(self) -> &'static str {
                match self {
                    $(CrashPoint::$variant => $name,)*
                }
            }
        }
    };
}

points! {
    /// A file that must appear whole is written under its temporary name.
    FileWritten = "file.written",
    /// It has its real name, and still the temporary one.
    FileLinked = "file.linked",
    /// An epoch is taken; the old leader is not fenced yet.
    EpochTaken = "lead.epoch_taken",
    /// A new leader has made its trash; what older leaders left is still there.
    TrashMade = "lead.trash_made",
    /// Everything that older leaders left is removed; they are not fenced yet.
    Swept = "lead.swept",
    /// The first generation of the epoch is committed; nobody knows yet who leads.
    Fenced = "lead.fenced",
    /// The handover log has an entry; the database has not.
    HandoverLogWritten = "lead.handover_log_written",
    /// Some bytes of an uploaded archive are here.
    UploadArriving = "load.arriving",
    /// All of an uploaded archive is on the coordinator's own disk; it is not opened yet.
    UploadSpooled = "load.spooled",
    /// An uploaded archive can be read; it has no job.
    UploadOpened = "load.opened",
    /// A job is written down; its request is not answered.
    JobWritten = "job.written",
    /// An archive's jobs are written down; the archive would still be removed with its request.
    UploadSubmitted = "load.submitted",
    /// A job has opened its archive; nothing of its image is read.
    ArchiveOpened = "load.job_opened",
    /// A name is resolved; nothing is fetched.
    Resolved = "pull.resolved",
    /// The first bytes of a layer are here.
    LayerArriving = "pull.layer_arriving",
    /// A layer's staging directory is made.
    Staged = "unpack.staged",
    /// A blob has arrived and has its digest; the unpacker has not seen its end.
    BlobVerified = "pull.blob_verified",
    /// A layer's pack is written and synced.
    PackWritten = "unpack.pack_written",
    /// A layer's recipe and index are written and synced.
    IndexWritten = "unpack.index_written",
    /// A staged layer was read back and is right.
    LayerVerified = "publish.layer_verified",
    /// A whole pack has taken a thinned one's place; the record of the thinning is still there.
    PackReplaced = "refill.pack_replaced",
    /// A pack has its name; the layer that refers to it has not.
    PackRenamed = "publish.pack_renamed",
    /// A layer has its name; the database does not know where its pieces lie.
    LayerRenamed = "publish.layer_renamed",
    /// The database knows where the pieces of a layer lie; the pull does not know yet that the layer is published.
    PiecesRemembered = "unpack.pieces_remembered",
    /// The database knows which layer a blob is.
    BlobRemembered = "pull.blob_remembered",
    /// A manifest or config is in the store; the catalogue does not know it.
    DocumentPut = "publish.document_put",
    /// A generation is on disk; the leader has not applied it.
    Committed = "publish.committed",
    /// A trace is in its image's profile; its host has no answer.
    TraceMerged = "startup.trace_merged",
    /// A startup pack's staging directory is made.
    StartupStaged = "startup.staged",
    /// A startup pack's chunks are in a file of their own; there is no pack.
    StartupGathered = "startup.gathered",
    /// A startup pack is written and synced.
    StartupWritten = "startup.written",
    /// A startup pack was read back and is right.
    StartupVerified = "startup.verified",
    /// A startup pack has its name; the catalogue does not name it.
    StartupRenamed = "startup.renamed",
    /// The catalogue names a startup pack; the caller does not know yet.
    StartupCommitted = "startup.committed",
    /// A damaged object has a second name in quarantine, and is still in its place.
    SuspectKept = "repair.suspect_kept",
    /// A damaged object is out of its place, and in staging.
    SuspectHeld = "repair.suspect_held",
    /// A damaged object is in quarantine; nobody fetches it again yet.
    Quarantined = "repair.quarantined",
    /// A damaged file has its old name back, and still the one in quarantine.
    PutBackLinked = "put_back.linked",
    /// A damaged object is back in its place; others are not.
    PutBack = "put_back.done",
    /// Images have left the catalogue by rule or quota; nothing is marked.
    Departed = "collect.departed",
    /// Unneeded objects are marked; none is gone.
    Marked = "collect.marked",
    /// An object is in the trash; its bytes are not freed.
    Trashed = "collect.trashed",
    /// The bytes of one object of the trash are freed.
    Freed = "collect.freed",
    /// The leader's database has forgotten where pieces lie; other databases do not know that they must.
    Forgotten = "collect.forgotten",
    /// The number of collections is raised; the database does not know it, and the packs are as they were.
    Announced = "collect.announced",
    /// The database knows the number of collections; the packs are as they were.
    NumberKept = "collect.number_kept",
    /// The record of a thinned pack is in place; the pack is not.
    RecordRenamed = "collect.record_renamed",
    /// A thinned pack is in place.
    Thinned = "collect.thinned",
    /// A job has ended; its end is not written down.
    JobEnding = "job.ending",
    /// The end of an archive's last job is written down; the archive is still there.
    ArchiveDone = "load.job_ended",
}

#[cfg(debug_assertions)]
mod armed {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::CrashPoint;

    /// The armed point, and how often it is passed until the process dies there.
    static ARMED: OnceLock<(CrashPoint, AtomicU32)> = OnceLock::new();

    pub(super) fn arm(point: CrashPoint, nth: u32) {
        let _ = ARMED.set((point, AtomicU32::new(nth)));
    }

    pub(super) fn pass(point: CrashPoint) {
        if let Some((armed, left)) = ARMED.get()
            && *armed == point
            && left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
            std::process::abort();
        }
    }
}

/// Makes the process die when it reaches `point` for the `nth` time, counted from 1. Only the first call takes effect;
/// in a build without crash points none does.
pub fn arm(point: CrashPoint, nth: u32) {
    #[cfg(debug_assertions)]
    armed::arm(point, nth);
    #[cfg(not(debug_assertions))]
    let _ = (point, nth);
}

/// Kills the process if this point is armed and due.
#[inline]
pub fn crash_point(point: CrashPoint) {
    #[cfg(debug_assertions)]
    armed::pass(point);
    #[cfg(not(debug_assertions))]
    let _ = point;
}

/// Reads `NAME` or `NAME:NTH`.
pub fn parse(text: &str) -> Option<(CrashPoint, u32)> {
    let (name, nth) = text.split_once(':').unwrap_or((text, "1"));
    let point = CrashPoint::ALL.iter().find(|point| point.name() == name)?;
    Some((*point, nth.parse().ok().filter(|nth| *nth > 0)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_are_read_back() {
        for (number, point) in (1..).zip(CrashPoint::ALL) {
            assert_eq!(parse(&format!("{}:{number}", point.name())), Some((*point, number)));
        }
        assert_eq!(parse("file.linked"), Some((CrashPoint::FileLinked, 1)));
        for bad in ["", "nowhere", "file.linked:0", "file.linked:x", "file.linked:1:2"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }
}
