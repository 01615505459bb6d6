//! Pure decisions about time and order: what a schedule means, when it is due, what it promises, which job goes next.
//!
//! - `cron`: cron expressions as in crontab(5). [`super::times`]: slots by cron, by interval, or once; what is due and what was missed.
//! - [`super::pattern`]: which images are meant. [`super::deadlines`]: deadlines, backwards and forwards. [`crate::jobs::queue_order`]: which job
//!   goes next.
//!
//! Nothing here asks for the time, the disk or the network: `crate::plan::scheduler` does, and obeys these decisions. A schedule is parsed
//! once, from the text that people wrote ([`ScheduleSpec`]). That text is also what is kept.

use std::time::Duration;

use coordinator_api::quantity::parse_duration;
use coordinator_api::schedule::ScheduleSpec;
use jiff::Timestamp;
use store::image::{ImageRef, Platform};

use crate::plan::pattern::{Choice, Pattern};
use crate::plan::times::{CronTime, Slots};
use crate::plan::versions::Range;
use crate::registries::image::platform;
use crate::registries::limits::rules::{time_of_day, time_zone};

/// How often tags are checked by default.
pub const DEFAULT_POLL: Duration = Duration::from_secs(300);
/// The shortest interval: anything more frequent would only be a burden.
pub const LEAST_INTERVAL: Duration = Duration::from_secs(10);

/// Why a schedule is not valid, in one sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("schedule {name}: {why}")]
pub struct BadSchedule {
    /// Its name, as far as it has one.
    pub name: String,
    /// What is wrong, and what to write instead.
    pub why: String,
}

/// What makes a schedule run.
#[derive(Debug, Clone)]
pub enum Trigger {
    /// The wall clock.
    Cron(CronTime),
    /// An interval.
    Every(Duration),
    /// A registry's notification.
    OnPush,
    /// A tag that moves; checked at this interval.
    TagMove(Duration),
    /// A deadline.
    ReadyBy(Deadline),
    /// Nothing. The schedule was understood once, but this machine cannot understand it; the text says why.
    Broken(String),
}

/// When images must be there.
#[derive(Debug, Clone)]
pub enum Deadline {
    /// Once.
    Once(Timestamp),
    /// Again and again, by a cron expression.
    Cron(CronTime),
}

/// A standing order, checked.
#[derive(Debug, Clone)]
pub struct Schedule {
    /// The schedule as it was written.
    pub spec: ScheduleSpec,
    /// The images.
    pub images: Vec<Pattern>,
    /// Which of the tags that match are chosen.
    pub choice: Choice,
    /// The platform.
    pub platform: Option<Platform>,
    /// When.
    pub trigger: Trigger,
}

impl Schedule {
    /// Checks a schedule as it was written.
    pub fn parse(spec: ScheduleSpec) -> Result<Schedule, BadSchedule> {
        let said = |why: String| BadSchedule { name: spec.name.clone(), why };
        check_name(&spec.name).map_err(said)?;
        let versions = spec.semver.as_deref().map(Range::parse).transpose().map_err(said)?;
        if spec.newest == Some(0) {
            return Err(said("newest must be at least 1".to_owned()));
        }
        let choice = Choice { newest: spec.newest, versions };
        let images = spec.images.iter().map(|image| Pattern::parse(image, &choice));
        let images = images.collect::<Result<Vec<_>, _>>().map_err(said)?;
        if images.is_empty() {
            return Err(said("it names no image: give at least one".to_owned()));
        }
        let platform = spec.platform.as_deref().map(platform::parse).transpose();
        let platform = platform.map_err(|error| said(error.to_string()))?;
        let trigger = parse_trigger(&spec).map_err(said)?;
        if matches!(trigger, Trigger::OnPush) && choice.newest.is_some() {
            return Err(said("newest has no meaning with on_push: every push that matches is pulled".to_owned()));
        }
        Ok(Schedule { images, choice, platform, trigger, spec })
    }

    /// A schedule that was accepted once and is no longer understood, such as one in a time zone that this machine has no rules for. It is
    /// kept, and makes no jobs.
    pub fn broken(spec: ScheduleSpec, why: String) -> Schedule {
        let choice = Choice::default();
        let images = spec.images.iter().filter_map(|image| Pattern::parse(image, &choice).ok()).collect();
        Schedule { images, choice, platform: None, trigger: Trigger::Broken(why), spec }
    }

    /// Why it makes no jobs, if this machine does not understand it.
    pub fn why_broken(&self) -> Option<&str> {
        match &self.trigger {
            Trigger::Broken(why) => Some(why),
            _ => None,
        }
    }

    /// Refuses a deadline that has passed.
    pub fn check_future(&self, now: Timestamp) -> Result<(), BadSchedule> {
        match &self.trigger {
            Trigger::ReadyBy(Deadline::Once(at)) if *at <= now => {
                let why = format!("ready_by {at} has passed: name a time to come");
                Err(BadSchedule { name: self.spec.name.clone(), why })
            }
            _ => Ok(()),
        }
    }

    /// The slots at which it runs on its own; for a deadline, the deadlines. `created_at` anchors intervals.
    pub fn slots(&self, created_at: Timestamp) -> Slots {
        match &self.trigger {
            Trigger::Cron(cron) | Trigger::ReadyBy(Deadline::Cron(cron)) => Slots::Cron(cron.clone()),
            Trigger::Every(every) | Trigger::TagMove(every) => Slots::Every { anchor: created_at, every: *every },
            Trigger::ReadyBy(Deadline::Once(at)) => Slots::Once(*at),
            Trigger::OnPush | Trigger::Broken(_) => Slots::Never,
        }
    }

    /// Whether it means a push of `image`.
    pub fn means(&self, image: &ImageRef) -> bool {
        self.images.iter().any(|pattern| pattern.means(image, &self.choice))
    }

    /// Its trigger in words.
    pub fn words(&self) -> String {
        let spec = &self.spec;
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let zone = spec.time_zone.as_ref().map(|zone| format!(" ({zone})")).unwrap_or_default();
        match &self.trigger {
            Trigger::Cron(_) => format!("cron {}{zone}", text(&spec.cron)),
            Trigger::Every(_) => format!("every {}", text(&spec.every)),
            Trigger::OnPush => "on push".to_owned(),
            Trigger::TagMove(_) => format!("when a tag moves, every {}", spec.every.as_deref().unwrap_or("5m")),
            Trigger::ReadyBy(_) => format!("ready by {}{zone}", text(&spec.ready_by)),
            Trigger::Broken(_) => {
                let texts = [("cron ", &spec.cron), ("every ", &spec.every), ("ready by ", &spec.ready_by)];
                let said =
                    texts.iter().find_map(|(word, text)| text.as_ref().map(|text| format!("{word}{text}{zone}")));
                said.unwrap_or_else(|| "on push".to_owned())
            }
        }
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty() && name.len() <= 100 && name.chars().all(good) && name.starts_with(char::is_alphanumeric) {
        Ok(())
    } else {
        Err("a name is letters, digits, '.', '_' and '-', 100 at most, and begins with a letter or digit".into())
    }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        interval if interval < LEAST_INTERVAL => {
            Err(format!("every {text} is too often: 10s is the shortest interval"))
        }
        interval => Ok(interval),
    }
}

fn parse_trigger(spec: &ScheduleSpec) -> Result<Trigger, String> {
    let zone = time_zone(spec.time_zone.as_deref())?;
    if spec.time_zone.is_some() && spec.cron.is_none() && spec.ready_by.is_none() {
        return Err("time_zone has a meaning with cron and ready_by only".to_owned());
    }
    let every = spec.every.as_deref().map(parse_interval).transpose()?;
    match (&spec.cron, every, spec.on_push, spec.tag_move, &spec.ready_by) {
        (Some(cron), None, false, false, None) => Ok(Trigger::Cron(CronTime::parse(cron, zone)?)),
        (None, Some(every), false, false, None) => Ok(Trigger::Every(every)),
        (None, None, true, false, None) => Ok(Trigger::OnPush),
        (None, every, false, true, None) => Ok(Trigger::TagMove(every.unwrap_or(DEFAULT_POLL))),
        (None, None, false, false, Some(ready_by)) => Ok(Trigger::ReadyBy(parse_deadline(ready_by, zone)?)),
        (None, None, false, false, None) => {
            Err("it does not say when: give one of cron, every, on_push, tag_move, ready_by".to_owned())
        }
        _ => Err("give only one of cron, every, on_push, tag_move, ready_by (every goes with tag_move)".to_owned()),
    }
}

/// Parses RFC 3339, a time of day, or cron fields.
fn parse_deadline(text: &str, zone: jiff::tz::TimeZone) -> Result<Deadline, String> {
    if let Ok(at) = text.parse::<Timestamp>() {
        return Ok(Deadline::Once(at));
    }
    if let Ok(civil) = text.parse::<jiff::civil::DateTime>()
        && text.contains(':')
    {
        // A time without an offset is one of the given zone.
        let at = civil.to_zoned(zone).map_err(|why| format!("ready_by {text:?} is no time of its zone: {why}"))?;
        return Ok(Deadline::Once(at.timestamp()));
    }
    if let Ok(time) = time_of_day(text) {
        let daily = format!("{} {} * * *", time.minute(), time.hour());
        return Ok(Deadline::Cron(CronTime::parse(&daily, zone)?));
    }
    CronTime::parse(text, zone).map(Deadline::Cron).map_err(|why| {
        if text.trim_start().starts_with('@') || text.split_whitespace().nth(2).is_some() {
            return why;
        }
        format!("ready_by {text:?} is no time: write 2026-12-24T08:00:00+01:00, 08:00, or cron fields like \"0 8 * * MON-FRI\"")
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn spec(name: &str, images: &[&str]) -> ScheduleSpec {
        let images = images.iter().map(|image| (*image).to_owned()).collect();
        ScheduleSpec { name: name.to_owned(), images, ..ScheduleSpec::default() }
    }

    fn why(spec: ScheduleSpec) -> String {
        Schedule::parse(spec).unwrap_err().to_string()
    }

    #[test]
    fn each_trigger_is_read_and_said() {
        let text = |text: &str| Some(text.to_owned());
        let own = || spec("s", &["r.io/app:1"]);
        let berlin = text("Europe/Berlin");
        let cases = [
            (
                ScheduleSpec { cron: text("0 3 * * *"), time_zone: berlin.clone(), ..own() },
                "cron 0 3 * * * (Europe/Berlin)",
            ),
            (ScheduleSpec { every: text("6h"), ..own() }, "every 6h"),
            (ScheduleSpec { on_push: true, ..own() }, "on push"),
            (ScheduleSpec { tag_move: true, ..own() }, "when a tag moves, every 5m"),
            (ScheduleSpec { tag_move: true, every: text("1m"), ..own() }, "when a tag moves, every 1m"),
            (ScheduleSpec { ready_by: text("08:00"), time_zone: berlin, ..own() }, "ready by 08:00 (Europe/Berlin)"),
            (ScheduleSpec { ready_by: text("2026-12-24T08:00:00Z"), ..own() }, "ready by 2026-12-24T08:00:00Z"),
            (ScheduleSpec { ready_by: text("2026-12-24T08:00"), ..own() }, "ready by 2026-12-24T08:00"),
            (ScheduleSpec { ready_by: text("0 8 * * MON-FRI"), ..own() }, "ready by 0 8 * * MON-FRI"),
        ];
        for (spec, words) in cases {
            assert_eq!(Schedule::parse(spec).unwrap().words(), words);
        }
    }

    #[test]
    fn a_deadline_without_an_offset_is_a_time_of_its_zone() {
        let deadline = |time: &str, zone: &str| {
            let zone = time_zone(Some(zone)).unwrap();
            match parse_deadline(time, zone).unwrap() {
                Deadline::Once(at) => at.to_string(),
                Deadline::Cron(_) => panic!("{time} is one time"),
            }
        };
        assert_eq!(deadline("2030-12-24T08:00:00", "Europe/Berlin"), "2030-12-24T07:00:00Z");
        assert_eq!(deadline("2030-12-24 08:00", "Europe/Berlin"), "2030-12-24T07:00:00Z");
        assert_eq!(deadline("2030-12-24T08:00:00+03:00", "Europe/Berlin"), "2030-12-24T05:00:00Z");
        assert!(parse_deadline("2030-12-24", time_zone(None).unwrap()).is_err(), "a day is no deadline");
    }

    #[test]
    fn what_is_not_understood_any_more_says_when_it_would_run() {
        let cron = Some("0 3 * * *".to_owned());
        let spec = ScheduleSpec { cron, time_zone: Some("Mars/Olympus".to_owned()), ..spec("s", &["r.io/app:1"]) };
        let why = Schedule::parse(spec.clone()).unwrap_err().why;
        assert!(why.contains("\"Mars/Olympus\" is not a time zone that this machine knows"), "{why}");
        let broken = Schedule::broken(spec, why);
        assert_eq!(broken.words(), "cron 0 3 * * * (Mars/Olympus)");
        assert_eq!(broken.slots(Timestamp::UNIX_EPOCH).next(Timestamp::UNIX_EPOCH), None);
        assert!(broken.why_broken().is_some() && broken.images.len() == 1);
    }

    #[test]
    fn contradictions_are_refused_in_words() {
        let text = |text: &str| Some(text.to_owned());
        let own = || spec("s", &["r.io/app:1"]);
        assert!(why(own()).contains("does not say when"));
        assert!(why(ScheduleSpec { cron: text("0 3 * * *"), on_push: true, ..own() }).contains("only one of"));
        assert!(why(ScheduleSpec { every: text("1s"), ..own() }).contains("too often"));
        assert!(why(ScheduleSpec { cron: text("* * * * * *"), ..own() }).contains("it has 6 fields"));
        let past = Schedule::parse(ScheduleSpec { ready_by: text("2026-01-01T00:00:00Z"), ..own() }).unwrap();
        let new_year: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        assert!(past.check_future(new_year).unwrap_err().to_string().contains("has passed"));
        assert!(past.check_future(new_year - jiff::SignedDuration::from_secs(1)).is_ok());
        assert!(why(ScheduleSpec { every: text("1h"), time_zone: text("UTC"), ..own() }).contains("time_zone"));
        assert!(why(ScheduleSpec { on_push: true, ..spec("s", &[]) }).contains("names no image"));
        assert!(why(ScheduleSpec { on_push: true, ..spec("a/b", &["x"]) }).starts_with("schedule a/b: a name is"));
        assert!(why(ScheduleSpec { ready_by: text("soon"), ..own() }).contains("is no time"));
        assert!(why(ScheduleSpec { on_push: true, newest: Some(2), ..spec("s", &["r.io/app"]) }).contains("on_push"));
        assert!(why(ScheduleSpec { on_push: true, semver: text("x y"), ..spec("s", &["a"]) }).contains("range"));
        assert!(why(ScheduleSpec { on_push: true, platform: text("one/two/three/four"), ..own() }).contains("one/two"));
    }
}
