//! The slots of a schedule: the instants at which it is to run.
//!
//! Cron slots follow the wall clock of their zone, as with cron(8). Times with named minutes and hours (`15 1-3 * * *`) that a spring night
//! skips are run when the night resumes; those that an autumn night repeats are run once. If minute or hour begins with a `*`, the line
//! follows the hours as they come. The slots of an interval lie at whole multiples of it from its anchor, so that runs do not drift.
//!
//! [`due`] is the whole rule for missed runs: however many slots have passed, one run stands for all of them, and none is run twice.

use std::sync::Arc;
use std::time::Duration;

use croner::Cron;
use croner::errors::CronError;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp};

use crate::plan::cron;

/// Missed slots are counted up to this number, which then means "at least this many".
pub const COUNTED: u64 = 10_000;

/// The most by which a zone's clock is put back.
const PUT_BACK: SignedDuration = SignedDuration::from_hours(25);

/// A cron expression in a zone.
#[derive(Debug, Clone)]
pub struct CronTime {
    cron: Arc<Cron>,
    zone: TimeZone,
    /// Whether its minutes and hours are named, not `*`.
    is_named: bool,
}

impl CronTime {
    /// Parses the five fields of cron, or a name such as `@daily`.
    pub fn parse(expression: &str, zone: TimeZone) -> Result<CronTime, String> {
        let wrong =
            |why: String| format!("{expression:?} is not a cron expression: {why}; write e.g. \"0 3 * * *\" or @daily");
        let normal = cron::normal(expression).map_err(wrong)?;
        let is_named = normal.split(' ').take(2).all(|field| !field.starts_with('*'));
        let cron: Cron = normal.parse().map_err(|why: CronError| wrong(why.to_string()))?;
        let time = CronTime { cron: Arc::new(cron), zone, is_named };
        match time.next(Timestamp::UNIX_EPOCH) {
            Some(_) => Ok(time),
            None => Err(format!("the cron expression {expression:?} names no time that ever comes")),
        }
    }

    /// The first slot after `after`.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        if self.is_named {
            return self.next_named(after);
        }
        let found = self.cron.find_next_occurrence(&after.to_zoned(self.zone.clone()), false).ok()?.timestamp();
        (found > after).then_some(found)
    }

    /// The last slot at or before `now`.
    fn last(&self, now: Timestamp) -> Option<Timestamp> {
        if self.is_named {
            return self.last_named(now);
        }
        Some(self.cron.find_previous_occurrence(&now.to_zoned(self.zone.clone()), true).ok()?.timestamp())
    }
}

/// Named times are first found on a wall clock that nobody sets, and then looked up in the zone. So their order stays, and a time that the
/// zone's clock passes twice, or never, has exactly one instant.
impl CronTime {
    fn next_named(&self, after: Timestamp) -> Option<Timestamp> {
        let mut civil = after.to_zoned(self.zone.clone()).datetime();
        loop {
            let found = self.cron.find_next_occurrence(&civil.to_zoned(TimeZone::UTC).ok()?, false).ok()?;
            civil = found.datetime();
            let at = self.instant(civil)?;
            if at > after {
                return Some(at);
            }
        }
    }

    fn last_named(&self, now: Timestamp) -> Option<Timestamp> {
        // The clock may have been put back since, so what it shows now may not be the latest that it has shown.
        let mut civil = now.to_zoned(self.zone.clone()).datetime().checked_add(PUT_BACK).ok()?;
        let mut is_inclusive = true;
        loop {
            let zoned = civil.to_zoned(TimeZone::UTC).ok()?;
            civil = self.cron.find_previous_occurrence(&zoned, is_inclusive).ok()?.datetime();
            is_inclusive = false;
            let at = self.instant(civil)?;
            if at <= now {
                return Some(at);
            }
        }
    }

    /// When the zone's clock shows `civil` for the first time. If it never does, when it jumps over it.
    fn instant(&self, civil: DateTime) -> Option<Timestamp> {
        let ambiguous = self.zone.to_ambiguous_timestamp(civil);
        if let AmbiguousOffset::Gap { .. } = ambiguous.offset() {
            let before = ambiguous.earlier().ok()?;
            return self.zone.following(before).next().map(|jump| jump.timestamp());
        }
        ambiguous.earlier().ok()
    }
}

/// When a schedule runs on its own.
#[derive(Debug, Clone)]
pub enum Slots {
    /// By the wall clock.
    Cron(CronTime),
    /// At an interval.
    Every {
        /// The zeroth slot, which is not run.
        anchor: Timestamp,
        /// The interval, at least a second.
        every: Duration,
    },
    /// Once.
    Once(Timestamp),
    /// Never: something else makes it run.
    Never,
}

/// A run that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Due {
    /// The newest slot that has come.
    pub slot: Timestamp,
    /// Earlier slots since the last run, which this run makes up for; counted up to [`COUNTED`].
    pub missed: u64,
}

impl Slots {
    /// The first slot after `after`.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        match self {
            Slots::Cron(cron) => cron.next(after),
            Slots::Every { anchor, every } => {
                let every = SignedDuration::try_from(*every).ok()?;
                let passed = after.duration_since(*anchor).as_nanos().div_euclid(every.as_nanos().max(1));
                let offset = every.as_nanos().checked_mul(passed.max(0) + 1)?;
                let at = anchor.as_nanosecond().checked_add(offset)?;
                Timestamp::from_nanosecond(at).ok()
            }
            Slots::Once(at) => (*at > after).then_some(*at),
            Slots::Never => None,
        }
    }

    /// The last slot at or before `now`, given that `first` is one of them.
    fn last(&self, first: Timestamp, now: Timestamp) -> Timestamp {
        let last = match self {
            Slots::Cron(cron) => cron.last(now),
            Slots::Every { anchor, every } => {
                let every = every.as_nanos().max(1) as i128;
                let passed = now.duration_since(*anchor).as_nanos().div_euclid(every);
                Timestamp::from_nanosecond(anchor.as_nanosecond() + passed * every).ok()
            }
            Slots::Once(_) | Slots::Never => None,
        };
        last.filter(|last| *last >= first && *last <= now).unwrap_or(first)
    }
}

/// The run that is due at `now`, if everything up to and including `covered` is done. The caller then counts its slot as covered.
pub fn due(slots: &Slots, covered: Timestamp, now: Timestamp) -> Option<Due> {
    let first = slots.next(covered).filter(|first| *first <= now)?;
    let (mut slot, mut missed) = (first, 0);
    while let Some(next) = slots.next(slot).filter(|next| *next <= now) {
        slot = next;
        missed += 1;
        if missed == COUNTED {
            return Some(Due { slot: slots.last(slot, now), missed });
        }
    }
    Some(Due { slot, missed })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn cron(expression: &str, zone: &str) -> Slots {
        Slots::Cron(CronTime::parse(expression, TimeZone::get(zone).unwrap()).unwrap())
    }

    fn slots(slots: &Slots, from: &str, to: &str) -> Vec<String> {
        let (mut at, to) = (time(from), time(to));
        std::iter::from_fn(|| {
            at = slots.next(at).filter(|next| *next <= to)?;
            Some(at.to_string())
        })
        .collect()
    }

    #[test]
    fn a_time_that_a_spring_night_skips_is_run_when_the_night_resumes() {
        let found = slots(&cron("30 2 * * *", "Europe/Berlin"), "2026-03-28T00:00:00Z", "2026-03-30T23:00:00Z");
        assert_eq!(found, ["2026-03-28T01:30:00Z", "2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
        let found = slots(&cron("30 * * * *", "Europe/Berlin"), "2026-03-29T00:00:00Z", "2026-03-29T02:00:00Z");
        assert_eq!(found, ["2026-03-29T00:30:00Z", "2026-03-29T01:30:00Z"], "hours as they come");
    }

    #[test]
    fn a_midnight_that_does_not_exist_is_run_when_the_day_begins() {
        // In Santiago the sixth of September 2026 begins at one o'clock.
        let found = slots(&cron("@midnight", "America/Santiago"), "2026-09-05T05:00:00Z", "2026-09-07T12:00:00Z");
        assert_eq!(found, ["2026-09-06T04:00:00Z", "2026-09-07T03:00:00Z"]);
    }

    #[test]
    fn a_time_that_an_autumn_night_repeats_is_run_once() {
        let found = slots(&cron("30 2 * * *", "Europe/Berlin"), "2026-10-24T12:00:00Z", "2026-10-26T12:00:00Z");
        assert_eq!(found, ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
        let found = slots(&cron("30 * * * *", "Europe/Berlin"), "2026-10-25T00:00:00Z", "2026-10-25T02:00:00Z");
        assert_eq!(found, ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"], "both hours");
    }

    #[test]
    fn lists_and_ranges_of_hours_follow_the_clock_as_single_ones_do() {
        let autumn = |line| slots(&cron(line, "Europe/Berlin"), "2026-10-24T22:00:00Z", "2026-10-25T04:00:00Z");
        let spring = |line| slots(&cron(line, "Europe/Berlin"), "2026-03-28T23:00:00Z", "2026-03-29T03:00:00Z");
        let utc = |times: &[&str], day: &str| times.iter().map(|time| format!("{day}T{time}:00Z")).collect::<Vec<_>>();
        // In autumn, 03:00 of summer becomes 02:00 of winter, at 01:00 UTC. In spring, 02:00 becomes 03:00, at 01:00 UTC, too.
        assert_eq!(
            autumn("15 1,2,3 * * *"),
            [utc(&["23:15"], "2026-10-24"), utc(&["00:15", "02:15"], "2026-10-25")].concat()
        );
        assert_eq!(
            autumn("0 1-3 * * *"),
            [utc(&["23:00"], "2026-10-24"), utc(&["00:00", "02:00"], "2026-10-25")].concat()
        );
        assert_eq!(
            autumn("*/30 2 * * *"),
            utc(&["00:00", "00:30", "01:00", "01:30"], "2026-10-25"),
            "hours as they come"
        );
        assert_eq!(spring("15 1,2,3 * * *"), utc(&["00:15", "01:00", "01:15"], "2026-03-29"));
        assert_eq!(spring("0 1-3 * * *"), utc(&["00:00", "01:00"], "2026-03-29"), "two that meet are one");
        let (covered, now) = (time("2026-10-25T00:15:00Z"), time("2026-10-25T01:20:00Z"));
        assert_eq!(due(&cron("15 1,2,3 * * *", "Europe/Berlin"), covered, now), None, "the night's second 02:15");
    }

    #[test]
    fn ten_years_of_nights_are_one_run_each() {
        let nightly = cron("15 2 * * *", "Europe/Berlin");
        let (mut covered, end) = (time("2026-01-01T00:00:00Z"), time("2036-01-01T00:00:00Z"));
        let (mut now, mut runs) = (covered, 0);
        while now < end {
            now += SignedDuration::from_mins(7);
            if let Some(due) = due(&nightly, covered, now) {
                assert_eq!(due.missed, 0);
                assert!(due.slot > covered && due.slot <= now);
                covered = due.slot;
                runs += 1;
            }
        }
        assert_eq!(runs, 3652, "ten years with two leap days");
    }

    #[test]
    fn a_long_pause_is_made_up_once() {
        let minutely = cron("* * * * *", "UTC");
        let long = due(&minutely, time("2026-01-01T00:00:00Z"), time("2026-12-31T23:59:30Z")).unwrap();
        assert_eq!(long, Due { slot: time("2026-12-31T23:59:00Z"), missed: COUNTED });
        assert_eq!(due(&minutely, long.slot, time("2026-12-31T23:59:59Z")), None);
        let once = Slots::Once(time("2026-02-01T00:00:00Z"));
        let late = due(&once, time("2026-01-01T00:00:00Z"), time("2026-05-01T00:00:00Z")).unwrap();
        assert_eq!(late, Due { slot: time("2026-02-01T00:00:00Z"), missed: 0 });
        assert_eq!(due(&once, late.slot, time("2027-01-01T00:00:00Z")), None);
    }

    #[test]
    fn days_and_weekdays_are_combined_as_crontab_says() {
        let first = |expression: &str| slots(&cron(expression, "UTC"), "2026-11-01T00:00:00Z", "2026-11-14T00:00:00Z");
        let days = |expression: &str| first(expression).iter().map(|slot| slot[8..10].to_owned()).collect::<Vec<_>>();
        // The first of November 2026 is a Sunday.
        assert_eq!(days("0 12 13 * FRI"), ["06", "13"], "either, if both are restricted");
        assert_eq!(days("0 12 5 * FRI"), ["05", "06", "13"]);
        assert_eq!(days("0 12 */2 * MON"), ["09"], "both, if one holds a star: the odd days that are Mondays");
        assert_eq!(days("0 12 1-31 * MON").len(), 13, "every day is either");
        assert_eq!(days("0 12 * * 7"), ["01", "08"]);
        assert_eq!(days("0 12 * * SAT-SUN"), ["01", "07", "08"]);
        assert_eq!(first("@weekly"), ["2026-11-08T00:00:00Z"]);
        assert_eq!(first("@midnight").len(), 13);
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        for bad in ["", "x", "61 * * * *", "* * *", "0 0 30 2 *"] {
            assert!(CronTime::parse(bad, TimeZone::UTC).is_err(), "{bad}");
        }
    }

    fn any_slots() -> impl Strategy<Value = Slots> {
        let zone = prop_oneof![
            Just("UTC"),
            Just("Europe/Berlin"),
            Just("America/New_York"),
            Just("Australia/Lord_Howe"),
            Just("Asia/Kolkata")
        ];
        let expression = prop_oneof![
            Just("30 2 * * *"),
            Just("*/20 * * * *"),
            Just("0 1-3 * * *"),
            Just("5,35 0,1,2,23 * * *"),
            Just("45 1 * * SUN"),
            Just("0 0 1 * *"),
            Just("15 */5 * * *")
        ];
        prop_oneof![
            (expression, zone).prop_map(|(expression, zone)| cron(expression, zone)),
            // No more slots between two looks than are counted.
            (0i64..2_000_000_000, LOOK_MAX / COUNTED + 1..200_000).prop_map(|(anchor, every)| Slots::Every {
                anchor: Timestamp::from_second(anchor).unwrap(),
                every: Duration::from_secs(every),
            }),
        ]
    }

    /// The longest time between two looks, in seconds.
    const LOOK_MAX: u64 = 400_000;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// At whatever times they are checked, slots come in order, each is run or made up exactly once, and none is lost.
        #[test]
        fn no_slot_is_run_twice_and_none_is_lost(
            slots in any_slots(),
            begin in 1_760_000_000i64..1_900_000_000,
            looks in prop::collection::vec(1..LOOK_MAX as i64, 1..60),
        ) {
            let begin = Timestamp::from_second(begin).unwrap();
            let (mut covered, mut now, mut run, mut missed) = (begin, begin, 0u64, 0u64);
            for look in looks {
                now += SignedDuration::from_secs(look);
                if let Some(due) = due(&slots, covered, now) {
                    prop_assert!(due.slot > covered && due.slot <= now);
                    prop_assert!(due.missed < COUNTED);
                    covered = due.slot;
                    run += 1;
                    missed += due.missed;
                }
                prop_assert!(slots.next(covered).is_none_or(|next| next > now), "all that has come is covered");
            }
            let (mut all, mut at) = (0u64, begin);
            while let Some(next) = slots.next(at).filter(|next| *next <= now) {
                prop_assert!(next > at);
                at = next;
                all += 1;
            }
            prop_assert_eq!(run + missed, all);
        }
    }
}
