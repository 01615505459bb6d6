//! The settings document: schedules, limits, pins, retention, and whether images are pulled on demand.
//!
//! The document states what is wanted. [`SettingsStore::apply`] compares it with the present settings, describes the differences
//! in words, and applies them. The whole document is checked before anything is changed, and applying it twice has the same
//! effect as applying it once.
//!
//! Documents are applied one after the other: the last one that was answered is in force. `applying` guards that and is held
//! across the whole of one document, its I/O included; nothing else takes it. Schedules, pins and the other parts of a document
//! each change atomically, so that a single change of one of them falls either before or after all of that part.
//!
//! `present` and `troubles` guard what is kept here. The scheduler keeps schedules; the garbage collector keeps pins and
//! retention.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use coordinator_api::event::Severity;
use coordinator_api::limits::Limits as LimitsSpec;
use coordinator_api::settings::{ChangeKind, Difference, Settings};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use store::catalogue::Pin;
use store::image::ImageRef;
use store::publisher::Publisher;
use tokio_util::sync::CancellationToken;

use crate::admin::gc::{GarbageCollector, GarbageError, check_policy};
use crate::plan::scheduler::{ScheduleError, Scheduler};
use crate::registries::limits::Limits;
use crate::registries::limits::rules::Rules;
use crate::state::events::{Events, NewEvent};
use crate::state::state_db::{Durability, StateDb, StateError, Table};

/// The prefix of troubles that concern limits.
const LIMITS: &str = "limits: ";
/// How often settings that could not be interpreted are tried again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// The key of the settings' one record.
const KEY: &[u8] = b"settings";

/// Why settings cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A schedule is invalid.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// Two schedules have the same name.
    #[error("schedule {0} is named twice: give each its own name")]
    Twice(String),
    /// The limits are invalid.
    #[error("limits: {0}")]
    Limits(String),
    /// A pin's name is invalid.
    #[error("pins: {0}")]
    Pin(store::Error),
    /// The retention policy is invalid, or pins and retention could not be changed.
    #[error(transparent)]
    Garbage(#[from] GarbageError),
    /// The state database failed.
    #[error(transparent)]
    StateDb(#[from] StateError),
}

/// The settings that are kept here, not by the scheduler or the garbage collector.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Present {
    #[serde(default)]
    limits: LimitsSpec,
    #[serde(default)]
    pull_on_demand: bool,
}

/// The components that settings are applied to.
pub struct SettingsParts {
    /// The state database.
    pub state_db: Arc<dyn StateDb>,
    /// Enforces the limits.
    pub limits: Arc<Limits>,
    /// Keeps the schedules.
    pub scheduler: Arc<Scheduler>,
    /// Keeps pins and retention.
    pub garbage: Arc<GarbageCollector>,
    /// Knows the present pins.
    pub publisher: Arc<Publisher>,
    /// Records what happened.
    pub events: Arc<Events>,
}

/// The settings of one coordinator.
pub struct SettingsStore {
    parts: SettingsParts,
    applying: Mutex<()>,
    present: Mutex<Present>,
    troubles: Mutex<Vec<String>>,
}

impl SettingsStore {
    /// Reads the database and puts the limits into force, as far as this machine can interpret them. Limits that it cannot
    /// interpret are recorded as an event, and are returned by [`SettingsStore::troubles`] for as long as that lasts.
    pub fn open(parts: SettingsParts) -> Result<SettingsStore, StateError> {
        let mut unread = None;
        let present: Present = match parts.state_db.record(Table::Settings, KEY)? {
            Some(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                unread = Some(format!("the settings in the database cannot be read, none are in force: {error}"));
                Present::default()
            }),
            None => Present::default(),
        };
        let (rules, troubles) = Rules::kept(&present.limits);
        parts.limits.set(rules);
        let troubles: Vec<String> =
            unread.into_iter().chain(troubles.into_iter().map(|why| format!("{LIMITS}{why}"))).collect();
        for trouble in &troubles {
            parts.events.record(NewEvent::new(Severity::Error, "limits.broken", "limits", trouble));
        }
        let (applying, present, troubles) = (Mutex::new(()), Mutex::new(present), Mutex::new(troubles));
        Ok(SettingsStore { parts, applying, present, troubles })
    }

    /// Settings that are kept but cannot be interpreted, one sentence each.
    pub fn troubles(&self) -> Vec<String> {
        self.troubles.lock().clone()
    }

    /// Tries again, until `stop`, to interpret what could not be interpreted: a missing time zone may have been installed.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
            let settings = Arc::clone(&self);
            let _ = tokio::task::spawn_blocking(move || settings.look_again()).await;
        }
    }

    /// Puts into force what can be interpreted by now.
    fn look_again(&self) {
        let has_broken_limits = self.troubles.lock().iter().any(|trouble| trouble.starts_with(LIMITS));
        if !has_broken_limits && self.parts.scheduler.broken().is_empty() {
            return;
        }
        // Otherwise jiff remembers for minutes that the time zone was missing.
        jiff::tz::db().reset();
        self.parts.scheduler.look_again();
        let _applying = self.applying.lock();
        let limits = self.present.lock().limits.clone();
        if let Ok(rules) = Rules::parse(&limits)
            && has_broken_limits
        {
            self.parts.limits.set(rules);
            self.troubles.lock().retain(|trouble| !trouble.starts_with(LIMITS));
            let message = "all limits are understood again, and hold";
            self.parts.events.record(NewEvent::new(Severity::Info, "limits.mended", "limits", message));
        }
    }

    /// Whether an image that a host lacks is pulled without anybody ordering it.
    pub fn pull_on_demand(&self) -> bool {
        self.present.lock().pull_on_demand
    }

    /// The present settings, as a document to which [`SettingsStore::apply`] finds no difference.
    pub fn present(&self) -> Result<Settings, StateError> {
        let present = self.present.lock().clone();
        let mut pins: Vec<String> = self.parts.publisher.catalogue().pins().map(Pin::familiar_name).collect();
        pins.sort();
        Ok(Settings {
            schedules: Some(self.parts.scheduler.specs()),
            limits: Some(present.limits),
            pins: Some(pins),
            retention: Some(self.parts.garbage.policy()?),
            pull_on_demand: Some(present.pull_on_demand),
        })
    }

    /// What applying `wish` would change. Refuses an invalid document.
    pub fn differences(&self, wish: &Settings) -> Result<Vec<Difference>, SettingsError> {
        let present = self.present()?;
        let mut differences = Vec::new();
        if let Some(wished) = &wish.schedules {
            let mut names = BTreeMap::new();
            for spec in wished {
                self.parts.scheduler.check(spec)?;
                if names.insert(spec.name.clone(), json(spec)).is_some() {
                    return Err(SettingsError::Twice(spec.name.clone()));
                }
            }
            let old = present.schedules.iter().flatten().map(|spec| (spec.name.clone(), json(spec))).collect();
            compare_objects("schedule ", &old, &names, &mut differences);
        }
        if let Some(limits) = &wish.limits {
            checked_rules(limits, &present.limits.clone().unwrap_or_default())?;
            let old = json(&present.limits.clone().unwrap_or_default());
            compare_fields("limits: ", &old, &json(limits), &mut differences);
        }
        if let Some(wished) = &wish.pins {
            let old = present.pins.iter().flatten().map(|name| (name.clone(), Value::Bool(true))).collect();
            let new = pin_names(wished)?.into_keys().map(|name| (name, Value::Bool(true))).collect();
            compare_objects("pin ", &old, &new, &mut differences);
        }
        if let Some(policy) = &wish.retention {
            check_policy(policy)?;
            let old = json(&present.retention.clone().unwrap_or_default());
            compare_fields("retention: ", &old, &json(policy), &mut differences);
        }
        if let Some(wished) = wish.pull_on_demand {
            let old = present.pull_on_demand.unwrap_or_default();
            compare_values("pull_on_demand", Some(&Value::Bool(old)), Some(&Value::Bool(wished)), &mut differences);
        }
        Ok(differences)
    }

    /// Parts of `wish` that are valid but have no effect: deadlines that have passed, as in a document that was kept.
    pub fn warnings(&self, wish: &Settings) -> Vec<String> {
        wish.schedules.iter().flatten().filter_map(|spec| self.parts.scheduler.passed(spec)).collect()
    }

    /// Applies `wish` and returns what was changed. Blocks on the database.
    pub fn apply(&self, wish: &Settings) -> Result<Vec<Difference>, SettingsError> {
        let _applying = self.applying.lock();
        let differences = self.differences(wish)?;
        let present = self.present.lock().clone();
        let next = Present {
            limits: wish.limits.clone().unwrap_or_else(|| present.limits.clone()),
            pull_on_demand: wish.pull_on_demand.unwrap_or(present.pull_on_demand),
        };
        let (rules, troubles) = checked_rules(&next.limits, &present.limits)?;
        let bytes = serde_json::to_vec(&next).unwrap_or_default();
        self.parts.state_db.change_records(Table::Settings, &[(KEY, Some(&bytes))], Durability::Synced)?;
        self.parts.limits.set(rules);
        *self.troubles.lock() = troubles.into_iter().map(|why| format!("{LIMITS}{why}")).collect();
        *self.present.lock() = next;
        if let Some(wished) = &wish.schedules {
            self.parts.scheduler.replace(wished)?;
        }
        if let Some(wished) = &wish.pins {
            self.parts.garbage.set_pins(pin_names(wished)?.values())?;
        }
        if let Some(policy) = &wish.retention
            && self.parts.garbage.policy()? != *policy
        {
            self.parts.garbage.set_policy(policy)?;
        }
        Ok(differences)
    }
}

/// The rules for the wanted limits. If they equal the present limits, they are kept even if this machine can no longer interpret
/// them.
fn checked_rules(wished: &LimitsSpec, present: &LimitsSpec) -> Result<(Rules, Vec<String>), SettingsError> {
    if wished == present {
        Ok(Rules::kept(wished))
    } else {
        Rules::parse(wished).map(|rules| (rules, Vec::new())).map_err(SettingsError::Limits)
    }
}

/// Parsed names, by the form in which pins show them.
fn pin_names(names: &[String]) -> Result<BTreeMap<String, ImageRef>, SettingsError> {
    let parse = |name: &String| {
        let reference: ImageRef = name.parse()?;
        Ok((Pin::of(&reference, 0)?.familiar_name(), reference))
    };
    names.iter().map(parse).collect::<Result<_, store::Error>>().map_err(SettingsError::Pin)
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// Differences in one line, for events: `limits: bandwidth 10M -> 20M, pin debian:12 added`.
pub fn in_words(differences: &[Difference]) -> String {
    let word = |Difference { kind, object, old, new }: &Difference| match (kind, old, new) {
        (ChangeKind::Changed, Some(old), Some(new)) => format!("{object} {old} -> {new}"),
        (ChangeKind::Removed, ..) => format!("{object} removed"),
        (_, _, Some(new)) if new != "true" => format!("{object} added ({new})"),
        _ => format!("{object} added"),
    };
    differences.iter().map(word).collect::<Vec<_>>().join(", ")
}

/// A value for people: text without quotes.
fn words(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::Array(values) if values.is_empty() => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(words).collect::<Vec<_>>().join(", "),
        Value::Object(fields) => {
            fields.iter().map(|(name, value)| format!("{name} {}", words(value))).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// Compares objects by name: adds those that are new, removed, or have a changed field.
fn compare_objects(
    prefix: &str,
    old: &BTreeMap<String, Value>,
    new: &BTreeMap<String, Value>,
    found: &mut Vec<Difference>,
) {
    for (name, wished) in new {
        match old.get(name) {
            Some(present) => compare_fields(&format!("{prefix}{name}: "), present, wished, found),
            None => compare_values(&format!("{prefix}{name}"), None, Some(&without_name(wished)), found),
        }
    }
    for (name, present) in old.iter().filter(|(name, _)| !new.contains_key(*name)) {
        compare_values(&format!("{prefix}{name}"), Some(&without_name(present)), None, found);
    }
}

fn without_name(value: &Value) -> Value {
    let mut value = value.clone();
    if let Some(fields) = value.as_object_mut() {
        fields.remove("name");
    }
    value
}

/// Compares the fields of one object.
fn compare_fields(prefix: &str, old: &Value, new: &Value, found: &mut Vec<Difference>) {
    let none = serde_json::Map::new();
    let (old, new) = (old.as_object().unwrap_or(&none), new.as_object().unwrap_or(&none));
    let names: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for name in names {
        compare_values(&format!("{prefix}{name}"), old.get(name), new.get(name), found);
    }
}

fn compare_values(object: &str, old: Option<&Value>, new: Option<&Value>, found: &mut Vec<Difference>) {
    // A null value means that the field was not there, or is removed.
    let is_something = |value: &&Value| !value.is_null();
    let (old, new) = (old.filter(is_something), new.filter(is_something));
    let kind = match (old, new) {
        (old, new) if old == new => return,
        (None, _) => ChangeKind::Added,
        (_, None) => ChangeKind::Removed,
        _ => ChangeKind::Changed,
    };
    found.push(Difference { kind, object: object.to_owned(), old: old.map(words), new: new.map(words) });
}
