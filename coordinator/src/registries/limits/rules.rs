//! Limits as administrators set them, checked: numbers instead of text, and time windows that can be evaluated.

use std::collections::BTreeMap;

use coordinator_api::limits as api;
use coordinator_api::quantity::parse_size;
use jiff::civil::Time;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use store::image::{canonical_registry, parse_registry};

/// Checked limits. `None` means no limit; for `parallel_layers` and `demands_per_minute` it means the coordinator's default.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// Layers that are fetched at a time.
    pub parallel_layers: Option<usize>,
    /// Bytes a second outside all windows.
    pub bandwidth: Option<u64>,
    /// Pulls that one host may ask for in a minute.
    pub demands_per_minute: Option<u32>,
    windows: Vec<Hours>,
    /// Bytes a second at all times: the lowest bandwidth of the windows whose hours are not understood.
    cap: Option<u64>,
    registries: BTreeMap<String, RegistryRules>,
}

/// The limits of one registry.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RegistryRules {
    /// Layers that are fetched at a time.
    pub parallel_layers: Option<usize>,
    /// Bytes a second.
    pub bandwidth: Option<u64>,
    /// Requests a minute.
    pub requests_per_minute: Option<u32>,
}

#[derive(Debug, Clone, PartialEq)]
struct Hours {
    from: Time,
    to: Time,
    zone: TimeZone,
    bandwidth: Option<u64>,
}

impl Hours {
    fn parse(window: &api::Window) -> Result<Hours, String> {
        // A day ends where the next one begins.
        let end = if window.to == "24:00" { "00:00" } else { &window.to };
        let (from, to) = (time_of_day(&window.from)?, time_of_day(end)?);
        if from == to {
            let why =
                "it has no length, so it would never count: for the whole day leave windows out and set bandwidth";
            return Err(format!("window {} to {}: {why}", window.from, window.to));
        }
        Ok(Hours {
            from,
            to,
            zone: time_zone(window.time_zone.as_deref())?,
            bandwidth: bandwidth(window.bandwidth.as_deref())?,
        })
    }

    fn holds(&self, at: Timestamp) -> bool {
        self.holds_time(at.to_zoned(self.zone.clone()).time())
    }

    fn holds_time(&self, time: Time) -> bool {
        if self.from < self.to { self.from <= time && time < self.to } else { time >= self.from || time < self.to }
    }

    /// The next time after `at` at which the window begins or ends.
    fn next_change(&self, at: Timestamp) -> Option<Timestamp> {
        let today = at.to_zoned(self.zone.clone()).date();
        let days = [today.yesterday().ok(), Some(today), today.tomorrow().ok(), today.checked_add(2.days()).ok()];
        let edges = days.into_iter().flatten().flat_map(|day| [day.to_datetime(self.from), day.to_datetime(self.to)]);
        let instants = edges.filter_map(|edge| self.zone.to_ambiguous_timestamp(edge).compatible().ok());
        instants.filter(|edge| *edge > at).min()
    }
}

/// Refuses windows that never apply because earlier windows in the same zone cover every minute of them.
fn check_windows(windows: &[Hours]) -> Result<(), String> {
    let minutes = || (0..24i8).flat_map(|hour| (0..60i8).filter_map(move |minute| Time::new(hour, minute, 0, 0).ok()));
    for (at, window) in windows.iter().enumerate() {
        let earlier = || windows[..at].iter().filter(|other| other.zone == window.zone);
        let is_free = |minute: Time| window.holds_time(minute) && !earlier().any(|other| other.holds_time(minute));
        if earlier().next().is_some() && !minutes().any(is_free) {
            let (from, to) = (window.from.strftime("%H:%M"), window.to.strftime("%H:%M"));
            return Err(format!("window {from} to {to} never counts: those before it cover all of it; leave one out"));
        }
    }
    Ok(())
}

/// Parses a time of day, `HH:MM`.
pub fn time_of_day(text: &str) -> Result<Time, String> {
    let wrong = || format!("{text:?} is not a time of day: write 08:00");
    let (hour, minute) = text.split_once(':').ok_or_else(wrong)?;
    if hour.len() > 2 || minute.len() != 2 {
        return Err(wrong());
    }
    Time::new(hour.parse().map_err(|_| wrong())?, minute.parse().map_err(|_| wrong())?, 0, 0).map_err(|_| wrong())
}

/// Finds a time zone by its IANA name; `None` means UTC.
pub fn time_zone(name: Option<&str>) -> Result<TimeZone, String> {
    match name {
        None => Ok(TimeZone::UTC),
        Some(name) => TimeZone::get(name)
            .map_err(|_| format!("{name:?} is not a time zone that this machine knows: write e.g. Europe/Berlin, or install its time zones (tzdata)")),
    }
}

fn bandwidth(text: Option<&str>) -> Result<Option<u64>, String> {
    match text.map(parse_size).transpose()? {
        Some(0) => Err("a bandwidth of 0 would stop everything: leave it out, or pause schedules".to_owned()),
        other => Ok(other),
    }
}

fn at_least_one<T: PartialEq + From<u8> + Copy>(name: &str, value: Option<T>) -> Result<Option<T>, String> {
    match value {
        Some(value) if value == T::from(0) => Err(format!("{name} must be at least 1")),
        other => Ok(other),
    }
}

/// Checks the limits of one registry. Returns them with the registry's canonical name.
fn registry(host: &str, limits: &api::RegistryLimits) -> Result<(String, RegistryRules), String> {
    let said = |why: String| format!("registry {host}: {why}");
    let name = parse_registry(host).map_err(|error| error.to_string())?;
    let rules = RegistryRules {
        parallel_layers: at_least_one("parallel_layers", limits.parallel_layers).map_err(said)?,
        bandwidth: bandwidth(limits.bandwidth.as_deref()).map_err(said)?,
        requests_per_minute: at_least_one("requests_per_minute", limits.requests_per_minute).map_err(said)?,
    };
    Ok((name, rules))
}

impl Rules {
    /// Checks limits as the API received them. Errors are sentences.
    pub fn parse(limits: &api::Limits) -> Result<Rules, String> {
        let mut registries = BTreeMap::new();
        for (host, limits) in &limits.registries {
            let (name, rules) = registry(host, limits)?;
            if registries.insert(name.clone(), rules).is_some() {
                return Err(format!("registry {name} is named twice, by two of its names: leave one out"));
            }
        }
        let windows = limits.windows.iter().map(Hours::parse).collect::<Result<Vec<_>, _>>()?;
        check_windows(&windows)?;
        Ok(Rules {
            parallel_layers: at_least_one("parallel_layers", limits.parallel_layers)?,
            bandwidth: bandwidth(limits.bandwidth.as_deref())?,
            demands_per_minute: at_least_one("demands_per_minute", limits.demands_per_minute)?,
            windows,
            cap: None,
            registries,
        })
    }

    /// Takes limits that were accepted earlier. What this machine does not understand, such as a time zone, is reported in a sentence and
    /// leaves all other limits in force. If the hours of a window are not understood, its bandwidth applies at all times.
    pub fn kept(limits: &api::Limits) -> (Rules, Vec<String>) {
        if let Ok(rules) = Rules::parse(limits) {
            return (rules, Vec::new());
        }
        let (mut rules, mut troubles) = (Rules::default(), Vec::new());
        rules.parallel_layers = at_least_one("parallel_layers", limits.parallel_layers).unwrap_or_default();
        rules.bandwidth = bandwidth(limits.bandwidth.as_deref()).unwrap_or_else(|why| {
            troubles.push(format!("the bandwidth is not limited: {why}"));
            None
        });
        for window in &limits.windows {
            match Hours::parse(window) {
                Ok(hours) => rules.windows.push(hours),
                Err(why) => {
                    let slower = bandwidth(window.bandwidth.as_deref()).ok().flatten();
                    let text = window.bandwidth.as_deref().filter(|_| slower.is_some());
                    let instead = text
                        .map_or_else(|| "does not count".to_owned(), |text| format!("holds its {text} at all times"));
                    rules.cap = slower.into_iter().chain(rules.cap).min();
                    troubles.push(format!("the window {} to {} {instead}: {why}", window.from, window.to));
                }
            }
        }
        for (host, limits) in &limits.registries {
            match registry(host, limits) {
                Ok((name, own)) => drop(rules.registries.insert(name, own)),
                Err(why) => troubles.push(format!("the limits of registry {host} do not hold: {why}")),
            }
        }
        (rules, troubles)
    }

    /// The limits of one registry.
    pub fn registry(&self, host: &str) -> RegistryRules {
        self.registries.get(canonical_registry(host)).copied().unwrap_or_default()
    }

    /// Bytes a second for all registries together at the time `at`.
    pub fn bandwidth_at(&self, at: Timestamp) -> Option<u64> {
        let ordinary = match self.windows.iter().find(|window| window.holds(at)) {
            Some(window) => window.bandwidth,
            None => self.bandwidth,
        };
        ordinary.into_iter().chain(self.cap).min()
    }

    /// When [`Rules::bandwidth_at`] may next change.
    pub fn next_change(&self, at: Timestamp) -> Option<Timestamp> {
        self.windows.iter().filter_map(|window| window.next_change(at)).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn bandwidth_follows_the_time_of_day_in_its_zone() {
        let window = |from: &str, to: &str, bandwidth: Option<&str>| api::Window {
            from: from.to_owned(),
            to: to.to_owned(),
            time_zone: Some("Europe/Berlin".to_owned()),
            bandwidth: bandwidth.map(str::to_owned),
        };
        let limits = api::Limits {
            bandwidth: Some("10M".to_owned()),
            windows: vec![window("08:00", "18:00", Some("1M")), window("22:00", "06:00", None)],
            ..api::Limits::default()
        };
        let rules = Rules::parse(&limits).unwrap();
        assert_eq!(rules.bandwidth_at(time("2026-11-21T08:00:00Z")), Some(1_000_000), "09:00 in Berlin");
        assert_eq!(rules.bandwidth_at(time("2026-11-21T18:00:00Z")), Some(10_000_000));
        assert_eq!(rules.bandwidth_at(time("2026-11-21T23:30:00Z")), None, "00:30, across midnight");
        assert_eq!(rules.next_change(time("2026-11-21T08:00:00Z")), Some(time("2026-11-21T17:00:00Z")));
        assert_eq!(rules.next_change(time("2026-11-21T17:00:00Z")), Some(time("2026-11-21T21:00:00Z")));
        assert_eq!(rules.next_change(time("2026-11-21T21:00:00Z")), Some(time("2026-11-22T05:00:00Z")));
        let evening = api::Limits { windows: vec![window("20:00", "24:00", Some("1M"))], ..api::Limits::default() };
        let rules = Rules::parse(&evening).unwrap();
        assert_eq!(rules.bandwidth_at(time("2026-11-21T22:59:00Z")), Some(1_000_000), "23:59 in Berlin");
        assert_eq!(rules.bandwidth_at(time("2026-11-21T23:00:00Z")), None, "midnight");
    }

    #[test]
    fn what_is_not_understood_any_more_switches_no_limit_off() {
        let window = |zone: &str, bandwidth: Option<&str>| api::Window {
            from: "08:00".to_owned(),
            to: "18:00".to_owned(),
            time_zone: Some(zone.to_owned()),
            bandwidth: bandwidth.map(str::to_owned),
        };
        let own = api::RegistryLimits { requests_per_minute: Some(7), ..api::RegistryLimits::default() };
        let mut limits = api::Limits {
            demands_per_minute: None,
            parallel_layers: Some(2),
            bandwidth: Some("50M".to_owned()),
            windows: vec![window("Mars/Olympus", Some("1M")), window("UTC", Some("20M"))],
            registries: [("r.io".to_owned(), own)].into_iter().collect(),
        };
        assert!(Rules::parse(&limits).is_err());
        let (rules, troubles) = Rules::kept(&limits);
        assert_eq!((rules.parallel_layers, rules.registry("r.io").requests_per_minute), (Some(2), Some(7)));
        for at in ["2026-11-21T09:00:00Z", "2026-11-21T20:00:00Z"] {
            assert_eq!(rules.bandwidth_at(time(at)), Some(1_000_000), "{at}");
        }
        assert_eq!(troubles.len(), 1);
        assert!(
            troubles[0].contains("08:00 to 18:00 holds its 1M at all times: \"Mars/Olympus\" is not a time zone"),
            "{troubles:?}"
        );
        limits.windows[0].bandwidth = None;
        let (rules, troubles) = Rules::kept(&limits);
        assert_eq!(rules.bandwidth_at(time("2026-11-21T09:00:00Z")), Some(20_000_000));
        assert_eq!(rules.bandwidth_at(time("2026-11-21T20:00:00Z")), Some(50_000_000));
        assert!(troubles[0].contains("does not count"), "{troubles:?}");
        limits.windows.remove(0);
        assert_eq!(Rules::kept(&limits), (Rules::parse(&limits).unwrap(), Vec::new()));
    }

    #[test]
    fn limits_that_can_never_match_are_refused_in_words() {
        let with = |hosts: &[&str]| {
            let registries = hosts.iter().map(|host| ((*host).to_owned(), api::RegistryLimits::default())).collect();
            Rules::parse(&api::Limits { registries, ..api::Limits::default() })
        };
        for never in ["https://r.io/", "https://r.io", "r.io/app", "r.io:0", "*.r.io", "", "10.0.0.0/8"] {
            let error = with(&[never]).unwrap_err();
            assert!(error.contains("HOST:PORT"), "{never}: {error}");
        }
        assert!(with(&["docker.io", "registry-1.docker.io"]).unwrap_err().contains("named twice"));
        let windows = |times: &[(&str, &str)]| {
            let window = |(from, to): &(&str, &str)| api::Window {
                from: (*from).to_owned(),
                to: (*to).to_owned(),
                ..api::Window::default()
            };
            Rules::parse(&api::Limits { windows: times.iter().map(window).collect(), ..api::Limits::default() })
        };
        assert!(windows(&[("08:00", "08:00")]).unwrap_err().contains("no length"));
        assert!(windows(&[("08:00", "12:00"), ("12:00", "18:00")]).is_ok());
        assert!(windows(&[("08:00", "12:00"), ("11:00", "13:00")]).is_ok());
        let error = windows(&[("22:00", "06:00"), ("08:00", "12:00"), ("23:00", "05:00")]).unwrap_err();
        assert!(error.contains("window 23:00 to 05:00 never counts"), "{error}");
    }

    #[test]
    fn docker_hubs_limits_hold_whatever_it_is_called() {
        let own = api::RegistryLimits { requests_per_minute: Some(7), ..api::RegistryLimits::default() };
        for name in ["docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com"] {
            let registries = [(name.to_owned(), own.clone())].into_iter().collect();
            let rules = Rules::parse(&api::Limits { registries, ..api::Limits::default() }).unwrap();
            for asked in ["docker.io", "index.docker.io", "registry-1.docker.io"] {
                assert_eq!(rules.registry(asked).requests_per_minute, Some(7), "{name} {asked}");
            }
            assert_eq!(rules.registry("r.io"), RegistryRules::default());
        }
    }

    #[test]
    fn nonsense_is_refused_in_words() {
        let bandwidth = |text: &str| api::Limits { bandwidth: Some(text.to_owned()), ..api::Limits::default() };
        assert!(Rules::parse(&bandwidth("0")).unwrap_err().contains("stop everything"));
        assert!(Rules::parse(&bandwidth("fast")).is_err());
        let zero = api::Limits { parallel_layers: Some(0), ..api::Limits::default() };
        assert!(Rules::parse(&zero).unwrap_err().contains("parallel_layers"));
        for bad in ["24:00", "8", "08:60", "8:5", "-1:00", ""] {
            assert!(time_of_day(bad).is_err(), "{bad}");
        }
        assert!(time_zone(Some("Mars/Olympus")).is_err());
    }
}
