//! The filter language of containerd's listings.
//!
//! A filter is a list of selectors between commas, all of which must hold; a listing takes several filters, one of which must
//! hold. A selector is a field path (`name`, `parent`, `kind`, `labels."any.name"`), alone (the field is there) or with an
//! operator and a value: `==`, `!=`, or `~=` with a regular expression. Values and parts of paths may be quoted as in Go; a
//! value for `~=` may also stand between `/` or `|`. A field that is not there equals nothing and differs from every value
//! but the empty one; an expression that is none matches nothing.
//!
//! Source: the package `filters` of containerd, whose answers the tests compare.

use regex::Regex;

/// Why a filter cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("filter {filter:?} is wrong at byte {position}: {problem}")]
pub struct FilterError {
    filter: String,
    position: usize,
    problem: &'static str,
}

/// What a listing asks for.
#[derive(Debug)]
pub struct Filters {
    /// One of them must match; none stands for all snapshots.
    any: Vec<Vec<Selector>>,
}

#[derive(Debug)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug)]
enum Test {
    Present,
    Equal(String),
    Unequal(String),
    /// `None` for an expression that is none.
    Matches(Option<Regex>),
}

/// Something with fields.
pub trait Fields {
    /// The value of the field at `path`, if it is there.
    fn field(&self, path: &[String]) -> Option<&str>;
}

impl Filters {
    /// Reads the filters of one request.
    pub fn parse(filters: &[String]) -> Result<Filters, FilterError> {
        // An empty filter matches everything.
        let selectors =
            |filter: &String| if filter.is_empty() { Ok(Vec::new()) } else { Parser::new(filter).selectors() };
        Ok(Filters { any: filters.iter().map(selectors).collect::<Result<_, _>>()? })
    }

    /// Whether `subject` is asked for.
    pub fn matches(&self, subject: &impl Fields) -> bool {
        let all = |selectors: &Vec<Selector>| selectors.iter().all(|selector| selector.holds(subject));
        self.any.is_empty() || self.any.iter().any(all)
    }
}

impl Selector {
    fn holds(&self, subject: &impl Fields) -> bool {
        let value = subject.field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value == Some(wanted),
            Test::Unequal(unwanted) => value.unwrap_or_default() != unwanted,
            Test::Matches(expression) => {
                expression.as_ref().is_some_and(|expression| expression.is_match(value.unwrap_or_default()))
            }
        }
    }
}

/// What the parser sees next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    /// A name, or a value that looks like one.
    Word(&'a str),
    /// A value that is no name.
    Value(&'a str),
    /// Text between quotes, with them.
    Quoted(&'a str),
    /// One or more of `=`, `!` and `~`.
    Operator(&'a str),
    /// A comma or a full stop.
    Separator(char),
    End,
}

struct Parser<'a> {
    filter: &'a str,
    position: usize,
    /// An operator came last: what follows is a value.
    wants_value: bool,
}

fn is_word(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

fn is_operator(c: char) -> bool {
    matches!(c, '=' | '!' | '~')
}

/// Values end at a comma, at white space and at what cannot be shown.
fn is_value(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}

impl<'a> Parser<'a> {
    fn new(filter: &'a str) -> Parser<'a> {
        Parser { filter, position: 0, wants_value: false }
    }

    fn wrong(&self, problem: &'static str) -> FilterError {
        FilterError { filter: self.filter.to_owned(), position: self.position, problem }
    }

    fn rest(&self) -> &'a str {
        &self.filter[self.position..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    /// Takes the characters from here on for which `belongs` holds.
    fn run(&mut self, belongs: fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c| !belongs(c)).unwrap_or(rest.len());
        self.position += end;
        &rest[..end]
    }

    fn next(&mut self) -> Result<Token<'a>, FilterError> {
        self.run(char::is_whitespace);
        let Some(first) = self.peek() else { return Ok(Token::End) };
        match first {
            '"' | '/' | '|' => self.quoted(first).map(Token::Quoted),
            ',' | '.' => {
                self.wants_value = false;
                self.position += 1;
                Ok(Token::Separator(first))
            }
            _ if is_operator(first) => {
                self.wants_value = true;
                Ok(Token::Operator(self.run(is_operator)))
            }
            _ if self.wants_value && is_value(first) => {
                self.wants_value = false;
                Ok(Token::Value(self.run(is_value)))
            }
            _ if is_word(first) => Ok(Token::Word(self.run(is_word))),
            _ => Err(self.wrong("a name, a value or a quote should stand here")),
        }
    }

    /// Takes text up to the closing `quote`.
    fn quoted(&mut self, quote: char) -> Result<&'a str, FilterError> {
        let rest = self.rest();
        let mut escaped = false;
        for (at, c) in rest.char_indices().skip(1) {
            match c {
                '\n' => break,
                _ if escaped => escaped = false,
                '\\' => escaped = true,
                _ if c == quote => {
                    self.position += at + 1;
                    return Ok(&rest[..=at]);
                }
                _ => {}
            }
        }
        Err(self.wrong("the quote does not end"))
    }

    fn selectors(&mut self) -> Result<Vec<Selector>, FilterError> {
        let mut selectors = vec![self.selector()?];
        loop {
            match self.peek() {
                None => return Ok(selectors),
                Some(',') => {
                    self.next()?;
                    selectors.push(self.selector()?);
                }
                Some(_) => return Err(self.wrong("a comma or the end should stand here")),
            }
        }
    }

    fn selector(&mut self) -> Result<Selector, FilterError> {
        let mut path = vec![self.part()?];
        while self.peek() == Some('.') {
            self.next()?;
            path.push(self.part()?);
        }
        if matches!(self.peek(), None | Some(',')) {
            return Ok(Selector { path, test: Test::Present });
        }
        let test = match self.next()? {
            Token::Operator("==") => Test::Equal(self.value(&['"'])?),
            Token::Operator("!=") => Test::Unequal(self.value(&['"'])?),
            Token::Operator("~=") => Test::Matches(Regex::new(&self.value(&['"', '/', '|'])?).ok()),
            _ => return Err(self.wrong("one of the operators ==, != and ~= should stand here")),
        };
        Ok(Selector { path, test })
    }

    fn part(&mut self) -> Result<String, FilterError> {
        match self.next()? {
            Token::Word(word) => Ok(word.to_owned()),
            Token::Quoted(text) => self.unquoted(text, &['"']),
            _ => Err(self.wrong("a field's name should stand here")),
        }
    }

    fn value(&mut self, quotes: &[char]) -> Result<String, FilterError> {
        match self.next()? {
            Token::Word(text) | Token::Value(text) => Ok(text.to_owned()),
            Token::Quoted(text) => self.unquoted(text, quotes),
            _ => Err(self.wrong("a value should stand here")),
        }
    }

    /// The text between quotes, with Go's escapes resolved.
    fn unquoted(&self, text: &str, quotes: &[char]) -> Result<String, FilterError> {
        let quote = text.chars().next().filter(|quote| quotes.contains(quote));
        let quote = quote.ok_or_else(|| self.wrong("only a regular expression may stand between these quotes"))?;
        unescape(&text[1..text.len() - 1], quote).ok_or_else(|| self.wrong("the quoted text has a wrong escape"))
    }
}

/// Resolves the escapes of a Go string between `quote`s. `None` if one is wrong, or if the result is no text.
fn unescape(text: &str, quote: char) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        bytes.extend_from_slice(&rest.as_bytes()[..at]);
        let escape = rest[at + 1..].chars().next()?;
        rest = &rest[at + 1 + escape.len_utf8()..];
        let simple = match escape {
            'a' => Some(7),
            'b' => Some(8),
            'f' => Some(12),
            'n' => Some(b'\n'),
            'r' => Some(b'\r'),
            't' => Some(b'\t'),
            'v' => Some(11),
            '\\' => Some(b'\\'),
            _ if escape == quote => Some(escape as u8),
            _ => None,
        };
        if let Some(byte) = simple {
            bytes.push(byte);
            continue;
        }
        let (digits, radix, is_character) = match escape {
            'x' => (2, 16, false),
            'u' => (4, 16, true),
            'U' => (8, 16, true),
            '0'..='7' => (2, 8, false),
            _ => return None,
        };
        let number = rest.get(..digits).filter(|digits| digits.chars().all(|digit| digit.is_digit(radix)))?;
        rest = &rest[digits..];
        // The first digit of an octal number is the escape itself.
        let first = if radix == 8 { escape.to_digit(8)? * 64 } else { 0 };
        let number = first + u32::from_str_radix(number, radix).ok()?;
        if is_character {
            bytes.extend_from_slice(char::from_u32(number)?.encode_utf8(&mut [0; 4]).as_bytes());
        } else {
            bytes.push(u8::try_from(number).ok()?);
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    struct Subject(BTreeMap<&'static str, &'static str>);

    impl Fields for Subject {
        fn field(&self, path: &[String]) -> Option<&str> {
            self.0.get(path.join(".").as_str()).copied()
        }
    }

    fn subject() -> Subject {
        Subject(BTreeMap::from([
            ("kind", "active"),
            ("name", "a-1"),
            ("parent", ""),
            ("labels.containerd.io/gc.root", "yes"),
            ("labels.l", "2"),
            ("labels.odd \"name\"", "x,y"),
        ]))
    }

    fn matches(filters: &[&str]) -> bool {
        let filters: Vec<String> = filters.iter().map(|&filter| filter.to_owned()).collect();
        Filters::parse(&filters).unwrap().matches(&subject())
    }

    #[test]
    fn selectors_hold_as_containerd_says() {
        let holds = [
            "name",
            "name==a-1",
            "name==\"a-1\"",
            "name!=b",
            "name~=^a",
            "name~=/^a-[0-9]$/",
            "name~=|a.1|",
            "kind==active,labels.l==2",
            "labels.\"containerd.io/gc.root\"==yes",
            "labels.\"containerd.io/gc.root\"",
            "labels.\"odd \\\"name\\\"\"==\"x,y\"",
            "labels.\"odd \\x22name\\042\"==\"x\\u002cy\"",
            "parent==\"\"",
            "absent!=x",
            " name == a-1",
            "",
        ];
        for filter in holds {
            assert!(matches(&[filter]), "{filter}");
        }
        let fails =
            ["absent", "absent==\"\"", "absent!=\"\"", "name==b", "name~=^b", "name~=\"(\"", "name==a-1,kind==view"];
        for filter in fails {
            assert!(!matches(&[filter]), "{filter}");
        }
        assert!(matches(&[]), "no filter");
        assert!(matches(&["name==b", "kind==active"]), "one of two");
    }

    #[test]
    fn what_is_no_filter_is_refused_with_the_place() {
        for filter in [
            "=",
            "name==",
            "name=a",
            "name==a b",
            ",name",
            "name,",
            "name.",
            "name==/a/",
            "\"name",
            "name==\"\\q\"",
            "é",
        ] {
            let error = Filters::parse(&[filter.to_owned()]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("filter {filter:?} is wrong at byte ")), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_filter_or_an_error(text in "\\PC*", subject_text in "[a-z=!~.,\"/|\\\\ ]{0,30}") {
            for text in [text, subject_text] {
                if let Ok(filters) = Filters::parse(&[text]) {
                    filters.matches(&subject());
                }
            }
        }

        #[test]
        fn every_quoted_value_is_found(value in "[^\\n]{0,20}") {
            let quoted: String = value.chars().map(|c| match c {
                '"' | '\\' => format!("\\{c}"),
                _ => c.to_string(),
            }).collect();
            let filters = Filters::parse(&[format!("labels.\"{quoted}\"==\"{quoted}\"")]).unwrap();
            struct Echo(String);
            impl Fields for Echo {
                fn field(&self, path: &[String]) -> Option<&str> {
                    (path[1..].join(".") == self.0).then_some(&self.0)
                }
            }
            prop_assert!(filters.matches(&Echo(value)));
        }
    }
}
