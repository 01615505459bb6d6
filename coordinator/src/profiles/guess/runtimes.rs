//! What well-known programs read by themselves and because of their arguments: shells, Python, Node, Java.

use std::collections::HashSet;

use super::files::{File, base_name, join, parent};
use super::scripts::{Import, commands, javascript_imports, python_imports};
use super::{DEPTH_MAX, Guess, WHOLE_MAX};

/// How many modules of Python or JavaScript are followed, and how many wait for that.
const MODULES_MAX: usize = 1500;
const WAITING_MAX: usize = 20_000;
/// In how many directories Python's modules are looked for.
const ROOTS_MAX: usize = 32;
/// Arguments that are looked at.
const ARGUMENTS_MAX: usize = 64;
/// Programs that run another one, which an argument names.
const WRAPPERS: [&str; 11] = [
    "env",
    "tini",
    "tini-static",
    "dumb-init",
    "catatonit",
    "docker-init",
    "gosu",
    "su-exec",
    "nice",
    "setpriv",
    "exec",
];
/// Modules that Python 3.11 and later has inside.
const FROZEN: [&str; 16] = [
    "_collections_abc",
    "_sitebuiltins",
    "abc",
    "codecs",
    "genericpath",
    "importlib",
    "importlib._bootstrap",
    "importlib._bootstrap_external",
    "importlib.machinery",
    "importlib.util",
    "io",
    "os",
    "posixpath",
    "runpy",
    "site",
    "stat",
];
/// Modules that Python reads before the program's first line.
const PYTHON_START: [&str; 13] = [
    "encodings",
    "encodings.aliases",
    "encodings.utf_8",
    "codecs",
    "io",
    "abc",
    "site",
    "os",
    "stat",
    "posixpath",
    "genericpath",
    "_collections_abc",
    "_sitebuiltins",
];
/// Files of a Java runtime that it reads before the program's first class.
const JAVA_START: [&str; 14] = [
    "lib/libjli.so",
    "lib/jvm.cfg",
    "lib/server/libjvm.so",
    "lib/server/classes.jsa",
    "lib/server/classes_nocoops.jsa",
    "lib/libjimage.so",
    "lib/libjava.so",
    "lib/libverify.so",
    "lib/libzip.so",
    "lib/libnio.so",
    "lib/libnet.so",
    "lib/modules",
    "conf/security/java.security",
    "lib/security/default.policy",
];

impl Guess<'_> {
    /// What a program reads beyond what the loader does, by its name.
    pub(super) fn runtime(
        &mut self,
        invoked: &[u8],
        file: &File,
        arguments: &[String],
        depth: usize,
    ) -> Result<(), store::Error> {
        let arguments = &arguments[..arguments.len().min(ARGUMENTS_MAX)];
        let (called, real) = (lossy(base_name(invoked)), lossy(file.name()));
        match called.as_str() {
            "sh" | "bash" | "dash" | "ash" | "zsh" | "ksh" => self.shell(arguments, depth),
            name if WRAPPERS.contains(&name) => self.wrapped(arguments, depth),
            "node" | "nodejs" => self.node(arguments),
            "java" => self.java(file, arguments),
            name if is_python(name) || is_python(&real) => self.python(invoked, file, arguments),
            _ => self.named_files(arguments),
        }
    }

    /// A shell: a script of its own or in an argument, and what that starts.
    fn shell(&mut self, arguments: &[String], depth: usize) -> Result<(), store::Error> {
        let options = arguments.iter().take_while(|word| word.starts_with(['-', '+'])).count();
        let takes_text = arguments[..options].iter().any(|word| !word.starts_with("--") && word.contains('c'));
        let Some(first) = arguments.get(options) else { return Ok(()) };
        let text = if takes_text {
            first.clone()
        } else {
            let Some(script) = self.files.file(&self.in_working_dir(first.as_bytes()))? else { return Ok(()) };
            self.whole(&script)?;
            self.files.text(&script)?
        };
        for name in commands(&text) {
            if depth < DEPTH_MAX && !name.contains('$') {
                self.command(&[name.to_owned()], depth + 1)?;
            }
        }
        // An entrypoint script ends with the command that it was given.
        self.command(&arguments[options + 1..], depth + 1)
    }

    /// A program that runs another one.
    fn wrapped(&mut self, arguments: &[String], depth: usize) -> Result<(), store::Error> {
        for at in 0..arguments.len() {
            let word = &arguments[at];
            if !word.starts_with('-') && !word.contains('=') && self.found_in_path(word)?.is_some() {
                return self.command(&arguments[at..], depth + 1);
            }
        }
        Ok(())
    }

    /// Files that arguments name.
    fn named_files(&mut self, arguments: &[String]) -> Result<(), store::Error> {
        for argument in arguments {
            let path = argument
                .split_once('=')
                .filter(|(option, _)| option.starts_with('-'))
                .map_or(argument.as_str(), |(_, path)| path);
            if !path.contains('/') && !path.contains('.') {
                continue;
            }
            if let Some(file) =
                self.files.file(&self.in_working_dir(path.as_bytes()))?.filter(|file| file.inode.size <= WHOLE_MAX)
            {
                self.whole(&file)?;
            }
        }
        Ok(())
    }

    fn java(&mut self, program: &File, arguments: &[String]) -> Result<(), store::Error> {
        let home = parent(parent(&program.path)).to_vec();
        for name in JAVA_START {
            let Some(file) = self.files.file(&join(&join(b"/", &home), name.as_bytes()))? else { continue };
            if name.ends_with(".so") { self.linked(&file)? } else { _ = self.whole(&file)? }
        }
        self.named_files(arguments)
    }

    /// Node: the script, what it requires, and the `package.json` files that tell how to read them.
    fn node(&mut self, arguments: &[String]) -> Result<(), store::Error> {
        let Some(script) = arguments.iter().find(|word| !word.starts_with('-')) else { return Ok(()) };
        let path = self.in_working_dir(script.as_bytes());
        let mut queue: Vec<File> = self.javascript(&path)?.into_iter().collect();
        let mut followed = 0;
        while let Some(file) = queue.pop() {
            if followed >= MODULES_MAX || !self.whole(&file)? {
                continue;
            }
            followed += 1;
            let directory = join(b"/", parent(&file.path));
            self.nearest_package(&directory)?;
            let source = self.files.text(&file)?;
            for name in javascript_imports(&source).into_iter().rev() {
                let required = self.required(&directory, name.as_bytes())?;
                let is_new = |file: &File| !self.seen.contains(&file.member) && queue.len() < WAITING_MAX;
                queue.extend(required.filter(is_new));
            }
        }
        Ok(())
    }

    /// The nearest `package.json` at or above a directory.
    fn nearest_package(&mut self, directory: &[u8]) -> Result<(), store::Error> {
        let mut directory = directory.to_vec();
        while directory.len() > 1 {
            if let Some(package) = self.files.file(&join(&directory, b"package.json"))? {
                return self.whole(&package).map(drop);
            }
            directory = parent(&directory).to_vec();
        }
        Ok(())
    }

    /// The file that a script in `directory` means.
    fn required(&mut self, directory: &[u8], name: &[u8]) -> Result<Option<File>, store::Error> {
        if name.starts_with(b"node:") {
            return Ok(None);
        }
        if name.starts_with(b".") || name.starts_with(b"/") {
            return self.javascript(&join(directory, name));
        }
        let mut above = directory.to_vec();
        let mut candidates = Vec::new();
        while above.len() > 1 {
            candidates.push(join(&join(&above, b"node_modules"), name));
            above = parent(&above).to_vec();
        }
        candidates.extend(
            [&b"/node_modules"[..], b"/usr/share/nodejs", b"/usr/lib/node_modules"].map(|root| join(root, name)),
        );
        for candidate in candidates {
            if let Some(found) = self.javascript(&candidate)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// A script by its path, with or without its extension, or a directory's main script.
    fn javascript(&mut self, path: &[u8]) -> Result<Option<File>, store::Error> {
        for end in ["", ".js", ".mjs", ".cjs", ".json"] {
            if let Some(file) = self.files.file(&[path, end.as_bytes()].concat())? {
                return Ok(Some(file));
            }
        }
        if let Some(package) = self.files.file(&join(path, b"package.json"))? {
            let text = self.files.text(&package)?;
            let described: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
            let main = described["main"].as_str().or(described["module"].as_str()).unwrap_or("index.js");
            let main = join(path, main.as_bytes());
            for candidate in [main.clone(), [&main[..], b".js"].concat(), join(&main, b"index.js")] {
                if let Some(file) = self.files.file(&candidate)? {
                    self.whole(&package)?;
                    return Ok(Some(file));
                }
            }
        }
        self.files.file(&join(path, b"index.js"))
    }

    /// Python: its own start, the program, and the modules that both import.
    fn python(&mut self, invoked: &[u8], program: &File, arguments: &[String]) -> Result<(), store::Error> {
        let Some(mut python) = self.python_at(invoked, program)? else { return Ok(()) };
        for name in PYTHON_START {
            self.python_module(&mut python, name)?;
        }
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let imports = match word.as_str() {
                "-c" => words.next().map(|code| python_imports(code)).unwrap_or_default(),
                "-m" => {
                    let Some(name) = words.next() else { break };
                    [name.clone(), format!("{name}.__main__")].map(|name| Import { up: 0, name }).to_vec()
                }
                "-W" | "-X" => {
                    words.next();
                    continue;
                }
                option if option.starts_with('-') => continue,
                script => {
                    let Some(file) = self.files.file(&self.in_working_dir(script.as_bytes()))? else { break };
                    python.roots.insert(0, join(b"/", parent(&file.path)));
                    self.whole(&file)?;
                    python_imports(&self.files.text(&file)?)
                }
            };
            imports.iter().rev().for_each(|import| python.expect("", import));
            break;
        }
        self.named_files(words.as_slice())?;
        while let Some(name) = python.queue.pop() {
            self.python_module(&mut python, &name)?;
        }
        Ok(())
    }

    /// Where a Python finds its modules.
    fn python_at(&mut self, invoked: &[u8], program: &File) -> Result<Option<Python>, store::Error> {
        let prefix = join(b"/", parent(parent(&program.path)));
        for lib in [join(&prefix, b"lib"), join(&prefix, b"lib64"), b"/usr/local/lib".to_vec(), b"/usr/lib".to_vec()] {
            let names = self.files.names(&lib)?;
            for name in names.iter() {
                let Some(minor) =
                    std::str::from_utf8(name).ok().and_then(|name| name.strip_prefix("python3.")?.parse::<u32>().ok())
                else {
                    continue;
                };
                let is_other = is_versioned(program.name()) && program.name() != name;
                let standard = join(&lib, name);
                if is_other || self.files.file(&join(&standard, b"os.py"))?.is_none() {
                    continue;
                }
                let mut roots = vec![join(b"", self.process.working_dir.as_bytes())];
                roots.extend(
                    self.process
                        .variable("PYTHONPATH")
                        .into_iter()
                        .flat_map(|path| path.split(':'))
                        .take(ROOTS_MAX)
                        .map(|path| path.into()),
                );
                roots.extend([standard.clone(), join(&standard, b"lib-dynload"), join(&standard, b"site-packages")]);
                // A virtual environment has its modules beside the link that was invoked.
                let venv = join(&join(parent(parent(invoked)), b"lib"), name);
                let debian = [
                    join(b"/usr/local/lib", &join(name, b"dist-packages")),
                    b"/usr/lib/python3/dist-packages".to_vec(),
                ];
                roots.extend([join(&venv, b"site-packages")].into_iter().chain(debian));
                for root in roots.clone() {
                    self.python_paths(&root, &mut roots)?;
                }
                roots.truncate(ROOTS_MAX);
                return Ok(Some(Python { minor, roots, queue: Vec::new(), known: HashSet::new() }));
            }
        }
        Ok(None)
    }

    /// The `.pth` files of a directory of packages: the directories that they name.
    fn python_paths(&mut self, root: &[u8], roots: &mut Vec<Vec<u8>>) -> Result<(), store::Error> {
        if !root.ends_with(b"-packages") {
            return Ok(());
        }
        for name in self.files.names(root)?.iter().filter(|name| name.ends_with(b".pth")).take(100) {
            let Some(file) = self.files.file(&join(root, name))? else { continue };
            self.whole(&file)?;
            let text = self.files.text(&file)?;
            roots.extend(text.lines().filter(|line| line.starts_with('/')).take(ROOTS_MAX).map(|line| line.into()));
        }
        Ok(())
    }

    /// One module, and the packages that it is in.
    fn python_module(&mut self, python: &mut Python, dotted: &str) -> Result<(), store::Error> {
        let ends = dotted.match_indices('.').map(|(at, _)| at).chain([dotted.len()]);
        for name in ends.map(|end| &dotted[..end]) {
            let is_new = python.known.len() < MODULES_MAX && !name.is_empty() && python.known.insert(name.to_owned());
            if !is_new || (python.minor >= 11 && FROZEN.contains(&name)) || self.is_full() {
                continue;
            }
            let path = name.replace('.', "/");
            for root in python.roots.clone() {
                if self.python_file(python, name, &join(&root, path.as_bytes()))? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// The module `name` if it is at `base`; returns whether it is.
    fn python_file(&mut self, python: &mut Python, name: &str, base: &[u8]) -> Result<bool, store::Error> {
        for (source, package) in [(join(base, b"__init__.py"), name), ([base, b".py"].concat(), parent_package(name))] {
            let Some(source) = self.files.file(&source)? else { continue };
            let stem = lossy(source.name()).trim_end_matches(".py").to_owned();
            let compiled = format!("__pycache__/{stem}.cpython-3{}.pyc", python.minor);
            match self.files.file(&join(&join(b"/", parent(&source.path)), compiled.as_bytes()))? {
                Some(compiled) => self.whole(&compiled)?,
                None => self.whole(&source)?,
            };
            let imports = python_imports(&self.files.text(&source)?);
            imports.iter().rev().for_each(|import| python.expect(package, import));
            return Ok(true);
        }
        let start = [base_name(base), b"."].concat();
        let names = self.files.names(parent(base))?;
        let library = names
            .range(start.clone()..)
            .take_while(|name| name.starts_with(&start))
            .find(|name| name.ends_with(b".so"));
        let Some(library) = library else { return Ok(false) };
        match self.files.file(&join(parent(base), library))? {
            Some(library) => self.linked(&library).map(|()| true),
            None => Ok(false),
        }
    }
}

/// A Python whose imports are followed.
struct Python {
    /// 11 for Python 3.11.
    minor: u32,
    /// Directories of modules, in the order in which they are searched.
    roots: Vec<Vec<u8>>,
    /// Modules that are imported, the next one last.
    queue: Vec<String>,
    /// Modules that were looked at.
    known: HashSet<String>,
}

impl Python {
    /// Notes an import in a module of `package`.
    fn expect(&mut self, package: &str, import: &Import) {
        let mut name = import.name.clone();
        if import.up > 0 {
            let mut base = package;
            (1..import.up).for_each(|_| base = parent_package(base));
            let separator = if base.is_empty() || name.is_empty() { "" } else { "." };
            name = format!("{base}{separator}{name}");
        }
        if !self.known.contains(&name) && self.queue.len() < WAITING_MAX {
            self.queue.push(name);
        }
    }
}

fn parent_package(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(package, _)| package)
}

fn is_python(name: &str) -> bool {
    name.strip_prefix("python").is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.'))
}

/// Whether a program's name tells the minor version of Python, too.
fn is_versioned(name: &[u8]) -> bool {
    name.starts_with(b"python3.")
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
