//! Parses `WWW-Authenticate` headers (RFC 9110, section 11.6.1).
//!
//! One header may hold several challenges and several headers may be sent; the parameters are quoted strings or tokens. Whatever cannot be
//! parsed is skipped: a registry's strange header must not hide the challenge that is understood.

/// One challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// The scheme in lower case, e.g. `bearer`.
    pub scheme: String,
    /// Parameters in the order given, names in lower case.
    pub parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The value of parameter `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// All challenges of one header value.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut rest = Cursor { text: header };
    let mut challenges: Vec<Challenge> = Vec::new();
    loop {
        rest.skip(|c| c == ',' || c.is_ascii_whitespace());
        let Some(word) = rest.token() else {
            match rest.text.chars().next() {
                None => return challenges,
                // Not a token: skip it and continue.
                Some(c) => rest.text = &rest.text[c.len_utf8()..],
            }
            continue;
        };
        match rest.parameter_value() {
            Some(value) => {
                if let Some(challenge) = challenges.last_mut() {
                    challenge.parameters.push((word.to_ascii_lowercase(), value));
                }
            }
            None => challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() }),
        }
    }
}

/// The text that is still to be parsed.
struct Cursor<'a> {
    text: &'a str,
}

impl<'a> Cursor<'a> {
    /// Skips characters that are `unwanted`.
    fn skip(&mut self, unwanted: impl Fn(char) -> bool) {
        self.text = self.text.trim_start_matches(unwanted);
    }

    /// A run of RFC 9110 token characters (and of `/` and `:`).
    fn token(&mut self) -> Option<&'a str> {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/:".contains(c);
        let end = self.text.find(|c| !is_token(c)).unwrap_or(self.text.len());
        let (token, rest) = self.text.split_at(end);
        self.text = rest;
        (!token.is_empty()).then_some(token)
    }

    /// `= value`, if that is what follows; otherwise nothing is consumed.
    fn parameter_value(&mut self) -> Option<String> {
        let after = self.text.trim_start().strip_prefix('=')?;
        self.text = after.trim_start();
        match self.text.strip_prefix('"') {
            Some(rest) => {
                self.text = rest;
                Some(self.quoted())
            }
            None => Some(self.bare().to_owned()),
        }
    }

    /// A value without quotes, which may even be a URL: up to a comma, a semicolon or a space.
    fn bare(&mut self) -> &'a str {
        let end = self.text.find(|c: char| c == ',' || c == ';' || c.is_ascii_whitespace()).unwrap_or(self.text.len());
        let (value, rest) = self.text.split_at(end);
        self.text = rest;
        value
    }

    /// The rest of a quoted string, whose opening quote is consumed. A missing closing quote ends with the text.
    fn quoted(&mut self) -> String {
        let mut value = String::new();
        let mut characters = self.text.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.text = &self.text[at + 1..];
                    return value;
                }
                '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                _ => value.push(c),
            }
        }
        self.text = "";
        value
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn docker_hubs_challenge() {
        let header = r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/a:pull,push""#;
        let found = parse(header);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].scheme, "bearer");
        assert_eq!(found[0].get("realm"), Some("https://auth.docker.io/token"));
        assert_eq!(found[0].get("scope"), Some("repository:library/a:pull,push"));
    }

    #[test]
    fn several_challenges_and_loose_spelling() {
        let found = parse(r#"Negotiate, BASIC Realm = "a \"b\"" , Bearer realm=https://x/token,service=s"#);
        let schemes: Vec<_> = found.iter().map(|c| c.scheme.as_str()).collect();
        assert_eq!(schemes, ["negotiate", "basic", "bearer"]);
        assert_eq!(found[1].get("realm"), Some(r#"a "b""#));
        assert_eq!(found[2].get("realm"), Some("https://x/token"));
    }

    #[test]
    fn values_without_quotes_and_other_separators() {
        let found =
            parse("bearer realm=https://x/token?a=b&c=d; service=s scope=repository:a:pull,Negotiate abc==, Basic");
        let schemes: Vec<_> = found.iter().map(|c| c.scheme.as_str()).collect();
        assert_eq!(schemes, ["bearer", "negotiate", "basic"]);
        assert_eq!(found[0].get("realm"), Some("https://x/token?a=b&c=d"));
        assert_eq!(found[0].get("service"), Some("s"));
        assert_eq!(found[0].get("scope"), Some("repository:a:pull"));
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*") {
            let _ = parse(&text);
        }

        #[test]
        fn quoted_values_come_back(realm in "[ -~]{0,40}", service in "[ -~]{0,40}") {
            let quote = |value: &str| value.replace('\\', "\\\\").replace('"', "\\\"");
            let header = format!("Bearer realm=\"{}\",service=\"{}\"", quote(&realm), quote(&service));
            let found = parse(&header);
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(found[0].get("realm"), Some(realm.as_str()));
            prop_assert_eq!(found[0].get("service"), Some(service.as_str()));
        }
    }
}
