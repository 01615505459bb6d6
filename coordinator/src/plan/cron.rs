//! Cron expressions as in crontab(5), brought into the form that the `croner` library reads.
//!
//! An expression has five fields (minute, hour, day of month, month, weekday), each a list of numbers, names, ranges and `*`, of which
//! ranges and `*` may have a step. Or it is one of the names that begin with `@`. Where the library differs from crontab(5), the difference
//! is settled here, so that a line from a crontab means the same. Names are accepted in their own field only, `7` is Sunday, lists have no
//! empty parts, and ranges do not wrap. Day and weekday must both match if one of them begins with a `*` (`*/2 * MON`); either is enough if
//! both are restricted (`1-31 * MON`).
//!
//! Beyond crontab(5), as in the library: `L` and `W` in days, `L` and `#` in weekdays.

/// Names for whole expressions.
const NAMES: [(&str, &str); 7] = [
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const WEEKDAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];

/// One of the five fields.
struct Field {
    name: &'static str,
    least: u32,
    most: u32,
    /// Names of its values, from `least` on.
    names: &'static [&'static str],
    /// Letters and signs of the library that the field may have.
    special: &'static str,
}

const FIELDS: [Field; 5] = [
    Field { name: "minute", least: 0, most: 59, names: &[], special: "" },
    Field { name: "hour", least: 0, most: 23, names: &[], special: "" },
    Field { name: "day of the month", least: 1, most: 31, names: &[], special: "LW?" },
    Field { name: "month", least: 1, most: 12, names: &MONTHS, special: "" },
    Field { name: "weekday", least: 0, most: 7, names: &WEEKDAYS, special: "L#?" },
];

/// `expression` in the library's form. The error says in words what is wrong.
pub(crate) fn normal(expression: &str) -> Result<String, String> {
    let expression = expression.trim();
    if expression.starts_with('@') {
        return named(expression);
    }
    let fields: Vec<&str> = expression.split_whitespace().collect();
    if fields.len() != FIELDS.len() {
        let count = fields.len();
        let has = if count == 1 { "1 field".to_owned() } else { format!("{count} fields") };
        return Err(format!("it has {has}, and there are five (minute, hour, day, month, weekday)"));
    }
    let fields = FIELDS.iter().zip(fields).map(|(field, text)| field.normal(text));
    let mut fields = fields.collect::<Result<Vec<String>, String>>()?;
    let [day, weekday] = [fields[2].as_str(), fields[4].as_str()];
    let is_free = |field: &str| field == "*" || field == "?";
    if !is_free(day) && !is_free(weekday) && (day.starts_with('*') || weekday.starts_with('*')) {
        // The library's sign for "both must match".
        fields[4].insert(0, '+');
    }
    Ok(fields.join(" "))
}

fn named(name: &str) -> Result<String, String> {
    let lower = name.to_ascii_lowercase();
    if let Some((_, fields)) = NAMES.iter().find(|(known, _)| *known == lower) {
        return Ok((*fields).to_owned());
    }
    let word = lower.split_whitespace().next().unwrap_or_default();
    if NAMES.iter().any(|(known, _)| *known == word) {
        return Err(format!("{word} is an expression of its own: nothing follows it"));
    }
    Err(match word {
        "@reboot" => "it names no time: what was missed while the coordinator was down is made up when it starts, without @reboot".to_owned(),
        "@every" => "an interval is no cron expression: use every instead, e.g. every 6h".to_owned(),
        _ => {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            format!("{word} is not one of {}", names.join(", "))
        }
    })
}

impl Field {
    /// The field with numbers in place of names.
    fn normal(&self, text: &str) -> Result<String, String> {
        if text.contains(',') && text.split(',').any(|part| part == "*") {
            // A list that contains `*` means all values, but only one that begins with `*` is as unrestricted as a `*` alone.
            text.split(',').try_for_each(|part| self.part(part, text).map(drop))?;
            let most = if self.most == 7 { 6 } else { self.most };
            return Ok(if text.starts_with('*') { "*".to_owned() } else { format!("{}-{most}", self.least) });
        }
        let parts = text.split(',').map(|part| self.part(part, text));
        Ok(parts.collect::<Result<Vec<String>, String>>()?.join(","))
    }

    /// One part of a list.
    fn part(&self, part: &str, text: &str) -> Result<String, String> {
        let name = self.name;
        if part.is_empty() {
            return Err(format!("the {name} {text:?} is a list with an empty part"));
        }
        let upper = part.to_ascii_uppercase();
        let plain = |c: char| c.is_ascii_digit() || self.special.contains(c);
        if upper.contains(|c| self.special.contains(c)) && upper.chars().all(plain) {
            return Ok(upper);
        }
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => (range, Some(self.step(step)?)),
            None => (part, None),
        };
        let range = match range.split_once('-') {
            _ if range == "*" => range.to_owned(),
            Some((first, last)) => self.range(first, last)?,
            None if step.is_some() => {
                return Err(format!(
                    "the {name} {part:?} has a step without a range: write */{0} or {range}-{1}/{0}",
                    step.unwrap_or(1),
                    self.most
                ));
            }
            None => self.value(range)?.to_string(),
        };
        Ok(step.map_or_else(|| range.clone(), |step| format!("{range}/{step}")))
    }

    fn step(&self, text: &str) -> Result<u32, String> {
        // A step longer than the range of values selects only the first, as in crontab(5).
        match text.parse::<u32>() {
            Ok(step) if step > 0 => Ok(step.min(self.most - self.least + 1)),
            _ => Err(format!("the {} has the step {text:?}, which is no number from 1 on", self.name)),
        }
    }

    fn range(&self, first: &str, last: &str) -> Result<String, String> {
        let (from, mut to) = (self.value(first)?, self.value(last)?);
        if to == 0 && from > 0 && self.most == 7 {
            // The Sunday at the end of a week.
            to = 7;
        }
        if from <= to {
            Ok(format!("{from}-{to}"))
        } else {
            Err(format!("the {} {first}-{last} ends before it begins: write two ranges", self.name))
        }
    }

    /// A number, or a name of this field.
    fn value(&self, text: &str) -> Result<u32, String> {
        let lower = text.to_ascii_lowercase();
        if let Some(place) = self.names.iter().position(|known| *known == lower) {
            return Ok(self.least + place as u32);
        }
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = text.parse::<u32>().ok().filter(|number| digits && (self.least..=self.most).contains(number));
        number.ok_or_else(|| {
            let names = match self.names {
                [first, .., last] => format!(" or {first} to {last}"),
                _ => String::new(),
            };
            format!("the {} {text:?} is not {} to {}{names}", self.name, self.least, self.most)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_crontab_mean_the_same_here() {
        for (written, read) in [
            ("0 3 * * *", "0 3 * * *"),
            ("  */15\t0 1,15 * 1-5 ", "*/15 0 1,15 * 1-5"),
            ("0 0 * jan-mar,DEC Mon,wed-FRI", "0 0 * 1-3,12 1,3-5"),
            ("0 0 * * 7", "0 0 * * 7"),
            ("*,5 * * * *", "* * * * *"),
            ("0 0 * * 1,*", "0 0 * * 0-6"),
            ("0 0 13 * *,1", "0 0 13 * *"),
            ("0 0 * * fri-sun", "0 0 * * 5-7"),
            ("0 0 * * sun-tue", "0 0 * * 0-2"),
            ("05 08 01 01 *", "5 8 1 1 *"),
            ("0-59/7 * * * *", "0-59/7 * * * *"),
            ("*/90 * * * *", "*/60 * * * *"),
            ("0 0 */2 * MON", "0 0 */2 * +1"),
            ("0 0 13 * */2", "0 0 13 * +*/2"),
            ("0 0 13 * FRI", "0 0 13 * 5"),
            ("0 0 1-31 * MON", "0 0 1-31 * 1"),
            ("0 0 l * *", "0 0 L * *"),
            ("0 0 15w * 5#2", "0 0 15W * 5#2"),
            ("@midnight", "0 0 * * *"),
            ("@Daily", "0 0 * * *"),
            ("@hourly", "0 * * * *"),
            ("@weekly", "0 0 * * 0"),
            ("@monthly", "0 0 1 * *"),
            ("@yearly", "0 0 1 1 *"),
            (" @annually ", "0 0 1 1 *"),
        ] {
            assert_eq!(normal(written).as_deref(), Ok(read), "{written}");
        }
    }

    #[test]
    fn what_crontab_refuses_is_refused_in_words() {
        for (written, why) in [
            ("", "it has 0 fields"),
            ("5", "it has 1 field,"),
            ("* * * * * *", "it has 6 fields"),
            ("60 * * * *", "the minute \"60\" is not 0 to 59"),
            ("* 24 * * *", "the hour \"24\" is not 0 to 23"),
            ("* * 0 * *", "the day of the month \"0\" is not 1 to 31"),
            ("* * * 13 *", "the month \"13\" is not 1 to 12 or jan to dec"),
            ("* * * * 8", "the weekday \"8\" is not 0 to 7 or sun to sat"),
            ("mon * * * *", "the minute \"mon\""),
            ("* * * mon *", "the month \"mon\""),
            ("* * * * jan", "the weekday \"jan\""),
            ("* * * * montue", "the weekday \"montue\""),
            ("* * * * monday", "the weekday \"monday\""),
            ("0,,5 * * * *", "a list with an empty part"),
            ("0, * * * *", "a list with an empty part"),
            ("30-10 * * * *", "ends before it begins"),
            ("* * * * fri-mon", "ends before it begins"),
            ("*/0 * * * *", "the step \"0\""),
            ("*/x * * * *", "the step \"x\""),
            ("5/15 * * * *", "a step without a range: write */15 or 5-59/15"),
            ("1-2-3 * * * *", "the minute \"2-3\""),
            ("+5 * * * *", "the minute \"+5\""),
            ("0~30 * * * *", "the minute \"0~30\""),
            ("99999999999 * * * *", "the minute"),
            ("@reboot", "it names no time"),
            ("@every 5m", "every 6h"),
            ("@fortnightly", "@fortnightly is not one of @yearly, @annually"),
            ("@daily extra", "nothing follows it"),
        ] {
            let error = normal(written).unwrap_err();
            assert!(error.contains(why), "{written}: {error}");
        }
    }
}
