//! What scripts name: the commands of a shell script, the modules that Python and JavaScript sources import.
//!
//! None of these is a parser of its language. They over-read a little: what they name counts only if the image has it.

/// Names in one script that are looked at.
const NAMES_MAX: usize = 2000;

/// Commands that every shell has itself, though images have programs of these names, too.
const BUILTINS: [&str; 9] = ["[", "echo", "false", "kill", "printf", "pwd", "test", "time", "true"];

/// Words after which another command begins.
const INTRODUCING: [&str; 12] =
    ["if", "then", "else", "elif", "while", "until", "do", "exec", "!", "command", "eval", "{"];

/// The words of a shell script that stand where a command does.
pub(super) fn commands(script: &str) -> Vec<&str> {
    let mut commands = Vec::new();
    for line in script.lines().take(NAMES_MAX * 8) {
        let mut expects = true;
        for word in words(line) {
            match word {
                Word::Comment => break,
                Word::Separator => expects = true,
                Word::Plain(_) if !expects => {}
                Word::Plain(word) if INTRODUCING.contains(&word) || is_assignment(word) => {}
                Word::Plain(word) => {
                    expects = false;
                    if !BUILTINS.contains(&word) && !commands.contains(&word) && commands.len() < NAMES_MAX {
                        commands.push(word);
                    }
                }
            }
        }
    }
    commands
}

enum Word<'a> {
    Plain(&'a str),
    /// Something after which a command begins: `;`, `|`, `&`, a parenthesis, a backquote.
    Separator,
    Comment,
}

/// The words of one line. Quotes hold words together and are left out.
fn words(line: &str) -> Vec<Word<'_>> {
    let mut words = Vec::new();
    let mut rest = line;
    while let Some(first) = rest.chars().next() {
        let len = first.len_utf8();
        rest = match first {
            c if c.is_whitespace() => &rest[len..],
            '#' => {
                words.push(Word::Comment);
                return words;
            }
            ';' | '|' | '&' | '(' | ')' | '`' => {
                words.push(Word::Separator);
                &rest[len..]
            }
            // `"$(command)"` begins a command, too.
            '"' if rest.starts_with("\"$(") => &rest[2..],
            '$' if rest.starts_with("$(") => &rest[len..],
            '\'' | '"' => {
                let end = rest[len..].find(first).map_or(rest.len(), |at| len + at + 1);
                words.push(Word::Plain(rest[..end].trim_matches(first)));
                &rest[end..]
            }
            _ => {
                let end = rest.find(|c: char| c.is_whitespace() || ";|&()`'\"".contains(c)).unwrap_or(rest.len());
                words.push(Word::Plain(&rest[..end]));
                &rest[end..]
            }
        };
    }
    words
}

fn is_assignment(word: &str) -> bool {
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    word.split_once('=').is_some_and(|(name, _)| is_name(name))
}

/// A module that Python source imports when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Import {
    /// How many packages up the name begins, for `from ..name import`; 0 for a plain one.
    pub(super) up: usize,
    /// The dotted name; may be empty after dots.
    pub(super) name: String,
}

/// What Python source imports at its top level. Imports in functions and classes run later or never.
pub(super) fn python_imports(source: &str) -> Vec<Import> {
    let mut imports = Vec::new();
    // Whether the lines that are indented now belong to something that runs when the module is loaded.
    let mut runs = true;
    let joined = source.replace("\\\n", " ");
    let mut lines = joined.lines();
    while let Some(line) = lines.next() {
        let code = line.trim_start();
        if code.is_empty() || code.starts_with('#') {
            continue;
        }
        if code.len() == line.len() {
            runs = ["try:", "else:", "finally:", "except", "if ", "elif ", "with "]
                .iter()
                .any(|word| code.starts_with(word))
                && !code.contains("TYPE_CHECKING");
        } else if !runs {
            continue;
        }
        for statement in code.split(';').map(str::trim) {
            if let Some(names) = statement.strip_prefix("import ") {
                imports.extend(listed(names).map(|name| Import { up: 0, name: name.to_owned() }));
            } else if let Some((from, names)) =
                statement.strip_prefix("from ").and_then(|rest| rest.split_once(" import"))
            {
                let up = from.bytes().take_while(|byte| *byte == b'.').count();
                let mut names = names.split('#').next().unwrap_or_default().to_owned();
                while names.contains('(') && !names.contains(')') {
                    let Some(more) = lines.next() else { break };
                    names.push_str(more.split('#').next().unwrap_or_default());
                }
                let package = from[up..].trim();
                imports.push(Import { up, name: package.to_owned() });
                let separator = if package.is_empty() { "" } else { "." };
                // What is imported from a package may be a module of it.
                let member = |name: &str| Import { up, name: format!("{package}{separator}{name}") };
                imports.extend(listed(names.trim().trim_matches(['(', ')'])).filter(|name| *name != "*").map(member));
            }
        }
        if imports.len() >= NAMES_MAX {
            break;
        }
    }
    imports.truncate(NAMES_MAX);
    imports
}

/// The names in `a.b as c, d`.
fn listed(names: &str) -> impl Iterator<Item = &str> {
    let names = names.split('#').next().unwrap_or_default().split(',');
    names.filter_map(|name| name.split_whitespace().next()).map(|name| name.trim_matches(['(', ')']))
}

/// What JavaScript source requires or imports: `require("x")`, `import ... from "x"`, `import("x")`, `import "x"`.
pub(super) fn javascript_imports(source: &str) -> Vec<&str> {
    let mut names = Vec::new();
    for word in ["require(", " from ", "}from", "import ", "import("] {
        for (at, _) in source.match_indices(word).take(NAMES_MAX) {
            let rest = source[at + word.len()..].trim_start();
            let Some(quote) = rest.chars().next().filter(|c| matches!(c, '\'' | '"' | '`')) else { continue };
            let name = rest[1..].split([quote, '\n']).next().unwrap_or_default();
            if !name.is_empty() && !names.contains(&name) {
                names.push(name);
            }
        }
    }
    names.truncate(NAMES_MAX);
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_shell_script_names_its_commands() {
        let script = "#!/bin/sh\nset -e\nME=$(basename \"$0\")\nif [ \"$1\" = 'nginx' ] && find /etc -type f | sort -V; then\n\
                      A=1 envsubst < a > b  # grep is no command here\n  for f in x; do \"$f\"; done\nfi\nls=`id -u`\nexec su-exec app \"$@\"\n";
        assert_eq!(
            commands(script),
            ["set", "basename", "find", "sort", "envsubst", "for", "$f", "done", "fi", "id", "su-exec"]
        );
        assert_eq!(commands("gcc -o /tmp/hello a.c && /tmp/hello"), ["gcc", "/tmp/hello"]);
    }

    fn names(source: &str) -> Vec<(usize, String)> {
        python_imports(source).into_iter().map(|import| (import.up, import.name)).collect()
    }

    #[test]
    fn python_imports_what_runs_at_load() {
        let source = "\"\"\"Doc.\"\"\"\nimport json, os.path as p\nfrom . import abc\nfrom ..x.y import (a,  # one\n  b)\ntry:\n    import fast\n\
                      except ImportError:\n    import slow; import slower\ndef f():\n    import late\nif TYPE_CHECKING:\n    import never\n\
                      from z import *\nclass A:\n    import inner\n";
        let expected = [
            (0, "json"),
            (0, "os.path"),
            (1, ""),
            (1, "abc"),
            (2, "x.y"),
            (2, "x.y.a"),
            (2, "x.y.b"),
            (0, "fast"),
            (0, "slow"),
            (0, "slower"),
            (0, "z"),
        ];
        assert_eq!(names(source), expected.map(|(up, name)| (up, name.to_owned())));
        assert_eq!(names("import json, ssl, sqlite3, asyncio; print(json.dumps(\"ready\"))").len(), 4);
    }

    #[test]
    fn javascript_requires_and_imports() {
        let source = "const a = require('./a');\nimport b, { c } from \"b/c\";\nimport 'side';\nconst d = await import(`d`);\nrequire(name);";
        assert_eq!(javascript_imports(source), ["./a", "b/c", "side", "d"]);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(import |from | import|\\(|\\)|require\\(|['\"`$;|#\\\\\n .]|[a-zé]{1,3}){0,60}") {
            let _ = (commands(&text), python_imports(&text), javascript_imports(&text));
        }
    }
}
