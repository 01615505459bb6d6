//! The rules of what is added, kept and removed, as small worlds.

use super::*;
use crate::docker::data_root::present::{PresentImage, PresentLayer};
use crate::docker::data_root::wanted::WantedLayer;

fn d(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn ledger() -> Ledger {
    Ledger::new("/mnt".into(), "/store".into(), String::new())
}

/// A store with one image `i` of layers `base` and `top`, named `a:v`.
fn wanted() -> Wanted {
    let mut wanted = Wanted { order: vec![d("base"), d("top")], ..Wanted::default() };
    wanted.layers.insert(d("base"), WantedLayer { parent: None, diff_id: d("1"), copy: 0 });
    wanted.layers.insert(d("top"), WantedLayer { parent: Some(d("base")), diff_id: d("2"), copy: 0 });
    wanted.images.insert(d("i"), Vec::new());
    wanted.references.insert("a:v".into(), d("i"));
    wanted
}

/// The data-root and ledger after that image was added.
fn added() -> (Present, Ledger) {
    let mut present = Present::default();
    let mut ledger = ledger();
    layer(&mut present, "base", None);
    layer(&mut present, "top", Some("base"));
    present.images.insert(d("i"), PresentImage { top: Some(d("top")), parent: None });
    present.references.set("a:v", d("i"));
    ledger.layers.extend([d("base"), d("top")]);
    ledger.images.insert(d("i"));
    ledger.references.insert("a:v".into(), BTreeSet::from([d("i")]));
    (present, ledger)
}

/// A layer whose directory has the name that we give.
fn layer(present: &mut Present, chain: &str, parent: Option<&str>) {
    let layer = PresentLayer { cache_id: d(chain).hex(), parent: parent.map(d) };
    present.layers.insert(d(chain), layer);
}

#[test]
fn an_empty_data_root_gets_everything() {
    let plan = Plan::new(&wanted(), &Present::default(), &ledger());
    assert_eq!(plan.add_layers, [d("base"), d("top")]);
    assert_eq!(plan.add_images, BTreeSet::from([d("i")]));
    assert_eq!(plan.set_references, BTreeMap::from([("a:v".to_owned(), d("i"))]));
    assert!(plan.adds() && !plan.removes());
}

#[test]
fn a_second_time_there_is_nothing_to_do() {
    let (present, ledger) = added();
    let plan = Plan::new(&wanted(), &present, &ledger);
    assert!(!plan.adds() && !plan.removes());
    assert_eq!(plan.check_layers, [d("base"), d("top")]);
}

#[test]
fn what_was_removed_comes_back() {
    let (mut present, ledger) = added();
    present.references.remove("a:v");
    present.images.clear();
    present.layers.remove(&d("top"));
    let plan = Plan::new(&wanted(), &present, &ledger);
    assert_eq!(plan.add_layers, [d("top")]);
    assert_eq!(plan.add_images.len(), 1);
    assert_eq!(plan.set_references.len(), 1);
}

#[test]
fn what_the_user_pulled_is_left_alone() {
    let (present, _) = added();
    let plan = Plan::new(&wanted(), &present, &ledger());
    assert!(!plan.adds() && plan.check_layers.is_empty());
    let plan = Plan::new(&Wanted::default(), &present, &ledger());
    assert!(!plan.removes());
}

#[test]
fn a_name_follows_the_store_unless_the_user_moved_it() {
    let (mut present, ledger) = added();
    let mut wanted = wanted();
    wanted.images.insert(d("i2"), Vec::new());
    wanted.references.insert("a:v".into(), d("i2"));
    let plan = Plan::new(&wanted, &present, &ledger);
    assert_eq!(plan.set_references, BTreeMap::from([("a:v".to_owned(), d("i2"))]));
    present.references.set("a:v", d("mine"));
    let plan = Plan::new(&wanted, &present, &ledger);
    assert!(plan.set_references.is_empty());
    assert_eq!(plan.kept_references, BTreeSet::from(["a:v".to_owned()]));
    assert!(!Plan::new(&Wanted::default(), &present, &ledger).remove_references.contains("a:v"));
}

#[test]
fn what_vanished_from_the_store_goes_children_first() {
    let (present, ledger) = added();
    let plan = Plan::new(&Wanted::default(), &present, &ledger);
    assert_eq!(plan.remove_references.len(), 1);
    assert_eq!(plan.remove_images, BTreeSet::from([d("i")]));
    assert_eq!(plan.remove_layers, [d("top"), d("base")]);
}

#[test]
fn what_is_used_stays() {
    type Use = fn(&mut Present);
    let uses: [(&str, Use); 6] = [
        ("another name", |p| p.references.set("mine:1", d("i"))),
        ("a container", |p| _ = p.container_images.insert(d("i"))),
        ("a child image", |p| {
            p.images.insert(d("child"), PresentImage { top: Some(d("top")), parent: Some(d("i")) });
        }),
        ("a container's layer", |p| _ = p.container_layers.insert(d("top"))),
        ("a layer on top", |p| layer(p, "mine", Some("top"))),
        ("the build cache", |p| _ = p.build_cache.insert(d("top"))),
    ];
    for (number, (what, use_it)) in uses.into_iter().enumerate() {
        let (mut present, ledger) = added();
        use_it(&mut present);
        let plan = Plan::new(&Wanted::default(), &present, &ledger);
        assert!(plan.remove_layers.is_empty(), "{what}");
        assert_eq!(plan.remove_images.is_empty(), number < 3, "{what}");
    }
    let (mut present, ledger) = added();
    present.container_layers.insert(d("base"));
    assert_eq!(Plan::new(&Wanted::default(), &present, &ledger).remove_layers, [d("top")]);
}

#[test]
fn an_image_that_cannot_be_offered_any_more_is_not_removed() {
    let (present, ledger) = added();
    let mut wanted = Wanted::default();
    wanted.untouchable.references.insert("a:v".into());
    wanted.untouchable.images.insert(d("i"));
    wanted.untouchable.layers.insert(d("top"));
    assert!(!Plan::new(&wanted, &present, &ledger).removes());
}

#[test]
fn a_cycle_of_parents_ends() {
    let (mut present, ledger) = added();
    layer(&mut present, "base", Some("top"));
    Plan::new(&wanted(), &present, &ledger);
    Plan::new(&Wanted::default(), &present, &ledger);
}

#[test]
fn what_the_user_pulled_again_after_rmi_is_the_users() {
    let (mut present, ledger) = added();
    for layer in present.layers.values_mut() {
        layer.cache_id = "drawn by dockerd".into();
    }
    let plan = Plan::new(&Wanted::default(), &present, &ledger);
    assert!(!plan.removes());
    assert_eq!(plan.forget, BTreeSet::from([d("base"), d("top"), d("i")]));
    assert!(Plan::new(&wanted(), &present, &ledger).check_layers.is_empty());
}

#[test]
fn what_is_gone_by_itself_is_forgotten() {
    let (_, ledger) = added();
    let plan = Plan::new(&Wanted::default(), &Present::default(), &ledger);
    assert_eq!(plan.forget, BTreeSet::from([d("base"), d("top"), d("i")]));
    assert!(Plan::new(&wanted(), &Present::default(), &ledger).forget.is_empty());
}

#[test]
fn what_older_software_added_and_docker_cannot_use_goes_and_what_a_name_meant_before_stays() {
    let (mut present, mut ledger) = added();
    let mut wanted = Wanted::default();
    wanted.unusable.insert(d("i"));
    wanted.untouchable.references.extend(["a:v".to_owned(), "b:v".to_owned()]);
    // The name of another bad image that still means a good one.
    present.images.insert(d("good"), PresentImage { top: Some(d("base")), parent: None });
    present.references.set("b:v", d("good"));
    ledger.images.insert(d("good"));
    ledger.references.insert("b:v".into(), BTreeSet::from([d("good")]));
    let plan = Plan::new(&wanted, &present, &ledger);
    assert_eq!(plan.remove_references, BTreeSet::from(["a:v".to_owned()]));
    assert_eq!(plan.remove_images, BTreeSet::from([d("i")]));
    assert_eq!(plan.remove_layers, [d("top")]);
}
