//! Tokens against a database in memory, at times that the tests choose.

use super::*;
use crate::state::state_db::memory::MemoryStateDb;

fn root() -> Caller {
    Caller { proof: Proof::Local { uid: 0 }, role: Role::Admin, images: Images::default() }
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn new(name: &str) -> NewToken {
    NewToken { name: name.to_owned(), role: Role::Host, images: vec!["r/team/*".to_owned()], expires_seconds: None }
}

#[test]
fn a_token_is_good_until_it_expires_or_is_revoked() {
    let tokens = Tokens::open(Arc::new(MemoryStateDb::default())).unwrap();
    let lasting = tokens.create(new("lasting"), &root(), at(0)).unwrap();
    let short = NewToken { expires_seconds: Some(60), ..new("short") };
    let short = tokens.create(short, &root(), at(0)).unwrap();
    let who = tokens.verify(&lasting.token, at(1)).unwrap().caller;
    assert_eq!((who.actor().as_str(), who.role), ("token lasting", Role::Host));
    assert!(who.images.contain_name("r/team/app:1") && !who.images.contain_name("r/other"));
    assert!(tokens.verify(&short.token, at(59)).is_ok());
    assert_eq!(tokens.verify(&short.token, at(60)), Err(Rejected::Expired("short".to_owned())));
    assert!(tokens.is_good("short", at(59)) && !tokens.is_good("short", at(60)));
    tokens.revoke("lasting").unwrap();
    assert_eq!(tokens.verify(&lasting.token, at(1)), Err(Rejected::Unknown));
    assert_eq!(tokens.revoke("lasting"), Err(TokenError::Unknown("lasting".to_owned())));
}

#[test]
fn what_is_kept_is_not_the_token_and_survives_a_restart() {
    let state_db = Arc::new(MemoryStateDb::default());
    let first = Tokens::open(state_db.clone()).unwrap();
    let made = first.create(new("a"), &root(), at(0)).unwrap();
    let parts: Vec<&str> = made.token.split('_').collect();
    assert_eq!((parts[0], parts[1].len(), parts[2].len()), ("cfs", 2 * ID_BYTES, 2 * SECRET_BYTES));
    let records = state_db.records(Table::Tokens).unwrap();
    assert_eq!(records.len(), 1);
    assert!(!String::from_utf8_lossy(&records[0].1).contains(parts[2]));
    let again = Tokens::open(state_db.clone()).unwrap();
    assert!(again.verify(&made.token, at(1)).is_ok());
    assert_eq!(again.list(), [TokenInfo { last_used_at: Some(at(1)), ..made.info }]);
    again.revoke("a").unwrap();
    assert!(Tokens::open(state_db).unwrap().list().is_empty());
}

#[test]
fn nothing_but_the_token_is_the_token() {
    let tokens = Tokens::open(Arc::new(MemoryStateDb::default())).unwrap();
    let token = tokens.create(new("a"), &root(), at(0)).unwrap().token;
    let other = tokens.create(new("b"), &root(), at(0)).unwrap().token;
    let (id, secret) = (token.split('_').nth(1).unwrap(), other.split('_').nth(2).unwrap());
    for wrong in [
        "",
        "cfs_",
        "cfs__",
        &token[1..],
        &token[..token.len() - 1],
        &format!("{token}0"),
        &format!("cfs_{id}_{secret}"),
    ] {
        assert_eq!(tokens.verify(wrong, at(1)), Err(Rejected::Unknown), "{wrong}");
    }
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let tokens = Tokens::open(Arc::new(MemoryStateDb::default())).unwrap();
    tokens.create(new("a"), &root(), at(0)).unwrap();
    let refused = |new: NewToken| tokens.create(new, &root(), at(0)).unwrap_err();
    assert_eq!(refused(new("a")), TokenError::Exists("a".to_owned()));
    assert!(matches!(refused(new("a b")), TokenError::BadName(_)));
    assert!(matches!(refused(NewToken { images: vec!["a b".to_owned()], ..new("b") }), TokenError::Pattern(_)));
    assert_eq!(refused(NewToken { role: Role::Admin, ..new("b") }), TokenError::RestrictedAdmin);
    for seconds in [0, u64::MAX] {
        assert_eq!(refused(NewToken { expires_seconds: Some(seconds), ..new("b") }), TokenError::BadLife);
    }
    assert_eq!(tokens.list().len(), 1);
}

#[test]
fn uses_are_noted_by_the_minute_and_written_by_ten() {
    let state_db = Arc::new(MemoryStateDb::default());
    let tokens = Tokens::open(state_db.clone()).unwrap();
    let token = tokens.create(new("a"), &root(), at(0)).unwrap().token;
    let mut writes = 0;
    for second in 0..=1200 {
        if let Some(id) = tokens.verify(&token, at(second)).unwrap().to_write {
            tokens.write_use(&id);
            writes += 1;
        }
    }
    assert_eq!(writes, 3);
    assert_eq!(Tokens::open(state_db).unwrap().list()[0].last_used_at, Some(at(1200)));
}
