//! The rules of what is added, kept and removed, in small examples.

use super::*;
use crate::docker::data_root::actual::{PresentImage, PresentLayer};
use crate::docker::data_root::desired::DesiredLayer;

fn d(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn owned() -> OwnedEntries {
    OwnedEntries::new("/mnt".into(), "/store".into(), String::new())
}

/// A store with one image `i` of layers `base` and `top`, named `a:v`.
fn wanted() -> DesiredState {
    let mut wanted = DesiredState { order: vec![d("base"), d("top")], ..DesiredState::default() };
    wanted.layers.insert(d("base"), DesiredLayer { parent: None, diff_id: d("1") });
    wanted.layers.insert(d("top"), DesiredLayer { parent: Some(d("base")), diff_id: d("2") });
    wanted.images.insert(d("i"), Vec::new());
    wanted.references.insert("a:v".into(), d("i"));
    wanted
}

/// The data-root and the owned entries after that image was added.
fn added() -> (ActualState, OwnedEntries) {
    let mut present = ActualState::default();
    let mut owned = owned();
    layer(&mut present, "base", None);
    layer(&mut present, "top", Some("base"));
    present.images.insert(d("i"), PresentImage { top: Some(d("top")), parent: None });
    present.references.set("a:v", d("i"));
    owned.layers.extend([d("base"), d("top")]);
    owned.images.insert(d("i"));
    owned.references.insert("a:v".into(), BTreeSet::from([d("i")]));
    (present, owned)
}

/// A layer whose directory has the name that we give.
fn layer(present: &mut ActualState, chain: &str, parent: Option<&str>) {
    let layer = PresentLayer { cache_id: d(chain).hex(), diff_id: d(chain), parent: parent.map(d) };
    present.layers.insert(d(chain), layer);
}

#[test]
fn an_empty_data_root_gets_everything() {
    let plan = Plan::new(&wanted(), &ActualState::default(), &owned());
    assert_eq!(plan.add_layers, [d("base"), d("top")]);
    assert_eq!(plan.add_images, BTreeSet::from([d("i")]));
    assert_eq!(plan.set_references, BTreeMap::from([("a:v".to_owned(), d("i"))]));
    assert!(plan.adds() && !plan.removes());
}

#[test]
fn a_second_time_there_is_nothing_to_do() {
    let (present, owned) = added();
    let plan = Plan::new(&wanted(), &present, &owned);
    assert!(!plan.adds() && !plan.removes());
    assert_eq!(plan.check_layers, [d("base"), d("top")]);
}

#[test]
fn what_was_removed_comes_back() {
    let (mut present, owned) = added();
    present.references.remove("a:v");
    present.images.clear();
    present.layers.remove(&d("top"));
    let plan = Plan::new(&wanted(), &present, &owned);
    assert_eq!(plan.add_layers, [d("top")]);
    assert_eq!(plan.add_images.len(), 1);
    assert_eq!(plan.set_references.len(), 1);
}

#[test]
fn what_the_user_pulled_is_left_alone() {
    let (present, _) = added();
    let plan = Plan::new(&wanted(), &present, &owned());
    assert!(!plan.adds() && plan.check_layers.is_empty());
    let plan = Plan::new(&DesiredState::default(), &present, &owned());
    assert!(!plan.removes());
}

#[test]
fn a_name_follows_the_store_unless_the_user_moved_it() {
    let (mut present, owned) = added();
    let mut wanted = wanted();
    wanted.images.insert(d("i2"), Vec::new());
    wanted.references.insert("a:v".into(), d("i2"));
    let plan = Plan::new(&wanted, &present, &owned);
    assert_eq!(plan.set_references, BTreeMap::from([("a:v".to_owned(), d("i2"))]));
    present.references.set("a:v", d("mine"));
    let plan = Plan::new(&wanted, &present, &owned);
    assert!(plan.set_references.is_empty());
    assert_eq!(plan.kept_references, BTreeSet::from(["a:v".to_owned()]));
    assert!(!Plan::new(&DesiredState::default(), &present, &owned).remove_references.contains("a:v"));
}

#[test]
fn what_vanished_from_the_store_goes_children_first() {
    let (present, owned) = added();
    let plan = Plan::new(&DesiredState::default(), &present, &owned);
    assert_eq!(plan.remove_references.len(), 1);
    assert_eq!(plan.remove_images, BTreeSet::from([d("i")]));
    assert_eq!(plan.remove_layers, [d("top"), d("base")]);
}

#[test]
fn what_is_used_stays() {
    type Use = fn(&mut ActualState);
    let uses: [(&str, Use); 6] = [
        ("another name", |p| p.references.set("mine:1", d("i"))),
        ("a container", |p| _ = p.container_images.insert(d("i"), BTreeSet::new())),
        ("a child image", |p| {
            p.images.insert(d("child"), PresentImage { top: Some(d("top")), parent: Some(d("i")) });
        }),
        ("a container's layer", |p| _ = p.container_layers.insert(d("top"))),
        ("a layer on top", |p| layer(p, "mine", Some("top"))),
        ("the build cache", |p| _ = p.build_cache.insert(d("top"))),
    ];
    for (number, (what, use_it)) in uses.into_iter().enumerate() {
        let (mut present, owned) = added();
        use_it(&mut present);
        let plan = Plan::new(&DesiredState::default(), &present, &owned);
        assert!(plan.remove_layers.is_empty(), "{what}");
        assert_eq!(plan.remove_images.is_empty(), number < 3, "{what}");
    }
    let (mut present, owned) = added();
    present.container_layers.insert(d("base"));
    assert_eq!(Plan::new(&DesiredState::default(), &present, &owned).remove_layers, [d("top")]);
}

#[test]
fn an_image_that_cannot_be_offered_any_more_is_not_removed() {
    let (present, owned) = added();
    let mut wanted = DesiredState::default();
    wanted.untouchable.references.insert("a:v".into());
    wanted.untouchable.images.insert(d("i"));
    wanted.untouchable.layers.insert(d("top"));
    assert!(!Plan::new(&wanted, &present, &owned).removes());
}

#[test]
fn a_cycle_of_parents_ends() {
    let (mut present, owned) = added();
    layer(&mut present, "base", Some("top"));
    Plan::new(&wanted(), &present, &owned);
    Plan::new(&DesiredState::default(), &present, &owned);
}

#[test]
fn what_the_user_pulled_again_after_rmi_is_the_users() {
    let (mut present, owned) = added();
    for layer in present.layers.values_mut() {
        layer.cache_id = "drawn by dockerd".into();
    }
    let plan = Plan::new(&DesiredState::default(), &present, &owned);
    assert!(!plan.removes());
    assert_eq!(plan.forget, BTreeSet::from([d("base"), d("top"), d("i")]));
    assert!(Plan::new(&wanted(), &present, &owned).check_layers.is_empty());
}

#[test]
fn what_is_gone_by_itself_is_forgotten() {
    let (_, owned) = added();
    let plan = Plan::new(&DesiredState::default(), &ActualState::default(), &owned);
    assert_eq!(plan.forget, BTreeSet::from([d("base"), d("top"), d("i")]));
    assert!(Plan::new(&wanted(), &ActualState::default(), &owned).forget.is_empty());
}

#[test]
fn what_older_software_added_and_docker_cannot_use_goes_and_what_a_name_meant_before_stays() {
    let (mut present, mut owned) = added();
    let mut wanted = DesiredState::default();
    wanted.unusable.insert(d("i"));
    wanted.untouchable.references.extend(["a:v".to_owned(), "b:v".to_owned()]);
    // The name of another bad image that still means a good one.
    present.images.insert(d("good"), PresentImage { top: Some(d("base")), parent: None });
    present.references.set("b:v", d("good"));
    owned.images.insert(d("good"));
    owned.references.insert("b:v".into(), BTreeSet::from([d("good")]));
    let plan = Plan::new(&wanted, &present, &owned);
    assert_eq!(plan.remove_references, BTreeSet::from(["a:v".to_owned()]));
    assert_eq!(plan.remove_images, BTreeSet::from([d("i")]));
    assert_eq!(plan.remove_layers, [d("top")]);
}
