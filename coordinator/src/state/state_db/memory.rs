//! An engine in memory, for tests of the modules above it.

use std::collections::{BTreeMap, HashMap};

use parking_lot::Mutex;

use crate::state::state_db::Durability;
use crate::state::state_db::database::StateDatabase;
use crate::state::state_db::engine::{Change, Engine, Visitor};

/// One family's entries.
type Entries = BTreeMap<Vec<u8>, Vec<u8>>;

/// Remembers until it is dropped.
#[derive(Default)]
struct MemoryEngine(Mutex<HashMap<String, Entries>>);

/// A database in memory.
pub(crate) type MemoryStateDb = StateDatabase;

impl Default for StateDatabase {
    fn default() -> StateDatabase {
        StateDatabase::on(Box::new(MemoryEngine::default()))
    }
}

impl Engine for MemoryEngine {
    fn get(&self, family: &str, key: &[u8]) -> Result<Option<Vec<u8>>, String> {
        Ok(self.0.lock().get(family).and_then(|entries| entries.get(key)).cloned())
    }

    fn walk(&self, family: &str, visit: &mut Visitor<'_>) -> Result<(), String> {
        let entries = self.0.lock().get(family).cloned().unwrap_or_default();
        entries.iter().all(|(key, value)| visit(key, value));
        Ok(())
    }

    fn change(&self, family: &str, changes: &[Change<'_>], _durability: Durability) -> Result<(), String> {
        let mut families = self.0.lock();
        let entries = families.entry(family.to_owned()).or_default();
        for (key, value) in changes {
            match value {
                Some(value) => _ = entries.insert(key.to_vec(), value.to_vec()),
                None => _ = entries.remove(*key),
            }
        }
        Ok(())
    }

    fn clear(&self, family: &str) -> Result<(), String> {
        self.0.lock().remove(family);
        Ok(())
    }
}
