//! Who imports whom: every module of a crate, by its whole path.
//!
//! A module refers to another by a `use`, or by a path in its code. `pub use` is no reference: it only passes on what its target
//! defines, and whoever uses the name refers to the target. Modules that exist for tests only are left out, and so are `mod tests`.

use std::collections::{BTreeMap, BTreeSet};

use syn::punctuated::Punctuated;
use syn::visit::{self, Visit};
use syn::{Attribute, Item, ItemMod, ItemUse, UseTree, Visibility};

/// A module's path below its crate, such as `["http", "mirror"]`; empty for the crate itself.
pub(crate) type ModulePath = Vec<String>;

/// A crate's modules and what each refers to.
#[derive(Debug, Default)]
pub(crate) struct ModuleGraph {
    /// What each module refers to, and by which names.
    pub(crate) edges: BTreeMap<ModulePath, BTreeMap<ModulePath, BTreeSet<String>>>,
}

/// A path as it stands in the code.
type CodePath = Vec<String>;

/// What one file says.
#[derive(Default)]
struct Reading {
    paths: Vec<CodePath>,
    /// `pub use`: the name that it gives, and its path.
    passed_on: Vec<(String, CodePath)>,
    /// Modules that only tests see.
    test_modules: BTreeSet<String>,
}

/// Whether an item exists for tests only.
fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
    })
}

impl Reading {
    fn add_tree(&mut self, tree: &UseTree, before: &[String], is_public: bool) {
        let with = |name: String| before.iter().cloned().chain([name]).collect::<Vec<_>>();
        match tree {
            UseTree::Path(path) => self.add_tree(&path.tree, &with(path.ident.to_string()), is_public),
            UseTree::Group(group) => group.items.iter().for_each(|tree| self.add_tree(tree, before, is_public)),
            UseTree::Glob(_) => self.paths.push(before.to_vec()),
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                let path = if name == "self" { before.to_vec() } else { with(name.clone()) };
                self.add_use(name, path, is_public);
            }
            UseTree::Rename(rename) => {
                let name = rename.ident.to_string();
                let path = if name == "self" { before.to_vec() } else { with(name) };
                self.add_use(rename.rename.to_string(), path, is_public);
            }
        }
    }

    fn add_use(&mut self, name: String, path: CodePath, is_public: bool) {
        if is_public { self.passed_on.push((name, path)) } else { self.paths.push(path) }
    }
}

impl<'ast> Visit<'ast> for Reading {
    fn visit_item(&mut self, item: &'ast Item) {
        let attributes = match item {
            Item::Mod(item) => &item.attrs,
            Item::Fn(item) => &item.attrs,
            Item::Impl(item) => &item.attrs,
            Item::Use(item) => &item.attrs,
            Item::Struct(item) => &item.attrs,
            Item::Const(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        match item {
            Item::Mod(module) if is_for_tests(attributes) => _ = self.test_modules.insert(module.ident.to_string()),
            _ if is_for_tests(attributes) => {}
            _ => visit::visit_item(self, item),
        }
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        if !is_for_tests(&function.attrs) {
            visit::visit_impl_item_fn(self, function);
        }
    }

    fn visit_item_mod(&mut self, module: &'ast ItemMod) {
        // A module in the same file is of its file.
        visit::visit_item_mod(self, module);
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let is_public = !matches!(item.vis, Visibility::Inherited);
        self.add_tree(&item.tree, &[], is_public);
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        // What is given to format!, assert! and the like are expressions; other macros have a language of their own.
        let arguments = called.parse_body_with(Punctuated::<syn::Expr, syn::Token![,]>::parse_terminated);
        for argument in arguments.iter().flatten() {
            let mut inside = Reading::default();
            inside.visit_expr(argument);
            self.paths.append(&mut inside.paths);
        }
        visit::visit_macro(self, called);
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            self.paths.push(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }
}

/// Reads one file's text.
fn read(name: &str, text: &str) -> Reading {
    let file = syn::parse_file(text).unwrap_or_else(|error| panic!("{name} cannot be parsed: {error}"));
    let mut reading = Reading::default();
    reading.visit_file(&file);
    reading
}

/// The module that `path`, as it stands in the module `own`, leads to, and the name that follows; nothing if it leads out of the crate.
fn resolve(path: &CodePath, own: &ModulePath, modules: &BTreeSet<ModulePath>) -> Option<(ModulePath, Option<String>)> {
    let mut rest = path.iter().peekable();
    let mut at = match path.first().map(String::as_str)? {
        "crate" => {
            rest.next();
            Vec::new()
        }
        "self" | "super" => {
            let mut at = own.clone();
            while let Some(step) = rest.next_if(|step| *step == "self" || *step == "super") {
                if step == "super" {
                    at.pop();
                }
            }
            at
        }
        first => {
            let child: ModulePath = own.iter().cloned().chain([first.to_owned()]).collect();
            modules.contains(&child).then(|| own.clone())?
        }
    };
    while let Some(name) = rest.peek() {
        let next: ModulePath = at.iter().cloned().chain([(*name).clone()]).collect();
        if !modules.contains(&next) {
            break;
        }
        at = next;
        rest.next();
    }
    Some((at, rest.next().cloned()))
}

impl ModuleGraph {
    /// The graph of a crate whose files are given by their modules' paths.
    pub(crate) fn new(files: &BTreeMap<ModulePath, &str>) -> ModuleGraph {
        let mut readings: BTreeMap<ModulePath, Reading> =
            files.iter().map(|(path, text)| (path.clone(), read(&path.join("::"), text))).collect();
        let for_tests: BTreeSet<ModulePath> = readings
            .iter()
            .flat_map(|(path, reading)| {
                reading.test_modules.iter().map(|name| path.iter().cloned().chain([name.clone()]).collect())
            })
            .collect();
        readings.retain(|path, _| !(1..=path.len()).any(|len| for_tests.contains(&path[..len])));
        let modules: BTreeSet<ModulePath> = readings.keys().cloned().collect();
        let mut passed_on = BTreeMap::new();
        for (own, reading) in &readings {
            for (name, path) in &reading.passed_on {
                if let Some((target, last)) = resolve(path, own, &modules) {
                    passed_on.insert((own.clone(), name.clone()), (target, last));
                }
            }
        }
        let mut graph = ModuleGraph::default();
        for (own, reading) in &readings {
            for path in &reading.paths {
                let Some((mut target, mut name)) = resolve(path, own, &modules) else { continue };
                // As often as there are modules at most: names that are passed on in a circle do not compile.
                for _ in 0..modules.len() {
                    let Some(key) = name.clone().map(|name| (target.clone(), name)) else { break };
                    let Some((next, last)) = passed_on.get(&key) else { break };
                    (target, name) = (next.clone(), last.clone());
                }
                if target != *own {
                    let names = graph.edges.entry(own.clone()).or_default().entry(target).or_default();
                    names.insert(name.unwrap_or_else(|| "*".to_owned()));
                }
            }
        }
        graph
    }

    /// Sets of modules that refer to each other in a circle, each with the references that make it.
    pub(crate) fn cycles(&self) -> Vec<Vec<String>> {
        let reach = |from: &ModulePath| {
            let (mut reached, mut next) = (BTreeSet::new(), vec![from.clone()]);
            while let Some(module) = next.pop() {
                for target in self.edges.get(&module).into_iter().flat_map(BTreeMap::keys) {
                    if reached.insert(target.clone()) {
                        next.push(target.clone());
                    }
                }
            }
            reached
        };
        let reached: BTreeMap<&ModulePath, BTreeSet<ModulePath>> =
            self.edges.keys().map(|module| (module, reach(module))).collect();
        let is_joined = |a: &ModulePath, b: &ModulePath| {
            reached.get(a).is_some_and(|from| from.contains(b)) && reached.get(b).is_some_and(|from| from.contains(a))
        };
        let (mut seen, mut cycles) = (BTreeSet::new(), Vec::new());
        for module in self.edges.keys().filter(|module| is_joined(module, module)) {
            if seen.contains(module) {
                continue;
            }
            let members: BTreeSet<&ModulePath> = self.edges.keys().filter(|other| is_joined(module, other)).collect();
            let mut lines = Vec::new();
            for member in &members {
                for (target, names) in self.edges.get(*member).into_iter().flatten() {
                    if members.contains(target) {
                        let names: Vec<&str> = names.iter().map(String::as_str).collect();
                        lines.push(format!("{} uses {} ({})", shown(member), shown(target), names.join(", ")));
                    }
                }
            }
            seen.extend(members.into_iter().cloned());
            cycles.push(lines);
        }
        cycles
    }
}

/// A module's path as it stands in code.
pub(crate) fn shown(path: &ModulePath) -> String {
    if path.is_empty() { "the crate's root".to_owned() } else { path.join("::") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn graph(files: &[(&str, &str)]) -> ModuleGraph {
        let path = |name: &str| name.split("::").filter(|part| !part.is_empty()).map(str::to_owned).collect();
        ModuleGraph::new(&files.iter().map(|(name, text)| (path(name), *text)).collect())
    }

    fn targets(graph: &ModuleGraph, module: &[&str]) -> Vec<String> {
        let module: ModulePath = module.iter().map(|part| (*part).to_owned()).collect();
        graph.edges.get(&module).into_iter().flat_map(BTreeMap::keys).map(shown).collect()
    }

    #[test]
    fn references_are_found_however_they_are_written() {
        let graph = graph(&[
            ("", "pub mod a; pub mod b; pub mod c;"),
            ("a", "mod inner; use crate::{b::{self, X}, c as see}; fn f() -> super::c::Y { inner::g() }"),
            ("a::inner", "pub fn g() { assert!(crate::b::h() == 1, 2); }"),
            ("b", "pub struct X; pub fn h() {} use std::fmt::Debug;"),
            ("c", "pub struct Y;"),
        ]);
        assert_eq!(targets(&graph, &["a"]), ["a::inner", "b", "c"]);
        assert_eq!(targets(&graph, &["a", "inner"]), ["b"]);
        assert!(targets(&graph, &["b"]).is_empty() && graph.cycles().is_empty());
    }

    #[test]
    fn a_planted_cycle_is_found_between_parent_and_child_too() {
        let two = graph(&[("", "mod a; mod b;"), ("a", "use crate::b::X;"), ("b", "pub struct X(super::a::Y);")]);
        assert_eq!(two.cycles(), [["a uses b (X)", "b uses a (Y)"]]);
        let family = graph(&[
            ("", "mod a;"),
            ("a", "mod child; pub struct Error; use child::Child;"),
            ("a::child", "use super::Error; pub struct Child;"),
        ]);
        assert_eq!(family.cycles(), [["a uses a::child (Child)", "a::child uses a (Error)"]]);
        let glob = graph(&[("", "mod a;"), ("a", "mod child; use child::*;"), ("a::child", "use super::*;")]);
        assert_eq!(glob.cycles().len(), 1);
    }

    #[test]
    fn what_is_passed_on_refers_to_where_it_is_defined() {
        let graph = graph(&[
            ("", "mod a; mod user;"),
            ("a", "mod child; mod error; pub use child::Child; pub use error::Error;"),
            ("a::child", "use super::Error; pub struct Child;"),
            ("a::error", "pub struct Error;"),
            ("user", "use crate::a::Child;"),
        ]);
        assert!(graph.cycles().is_empty(), "{:?}", graph.cycles());
        assert_eq!(targets(&graph, &["user"]), ["a::child"]);
    }

    #[test]
    fn tests_may_refer_to_whatever_they_like() {
        let graph = graph(&[
            ("", "mod a; mod b;"),
            ("a", "use crate::b::X; #[cfg(test)] mod tests { use crate::b::*; }"),
            ("b", "pub struct X; #[cfg(test)] mod tests; #[cfg(test)] fn f(_: crate::a::Z) {}"),
            ("b::tests", "use crate::a;"),
        ]);
        assert!(graph.cycles().is_empty(), "{:?}", graph.cycles());
    }
}
