//! After a coordinator died during a repair, the next leader puts back what the repair had moved into quarantine. A damaged
//! object still serves its good part, and the next check finds it again.

use std::collections::HashSet;

use store::ContentDigest;
use store::catalogue::Catalogue;
use store::error::Result;
use store::publisher::{Moved, Publisher, Suspect};

use crate::admin::fsck::finding::{has_blob, has_layer};

/// Puts back quarantined objects that images need and that exist nowhere else. Returns how many. Must run before any check or
/// pull.
pub fn put_back(publisher: &Publisher) -> Result<usize> {
    let missing = publisher.quarantined()?.into_iter().filter(|(_, replaced)| !replaced);
    let missing: Vec<Suspect> = missing.map(|(suspect, _)| suspect).collect();
    if missing.is_empty() {
        return Ok(0);
    }
    let catalogue = publisher.catalogue();
    let lost: HashSet<ContentDigest> = missing.iter().filter_map(pack_of).collect();
    // A layer brings its packs along. Packs of layers that were not moved are put back on their own.
    let used = packs_in_use(publisher, &catalogue, &lost)?;
    let mut count = 0;
    for suspect in missing {
        let needed = match suspect {
            Suspect::Layer(diff_id) => catalogue.images().any(|image| has_layer(image, &diff_id)),
            Suspect::Blob(digest) => catalogue.images().any(|image| has_blob(image, &digest)),
            Suspect::Pack(pack) => used.contains(&pack),
            // A snapshot was committed before a generation was moved away.
            Suspect::Generation(_) => false,
        };
        match needed.then(|| publisher.reinstate(suspect)) {
            Some(Ok(Moved::Away)) => count += 1,
            Some(Err(error)) if error.is_of_object() => tracing::warn!("it stays in quarantine: {error}"),
            Some(Err(error)) => return Err(error),
            Some(Ok(Moved::Nothing)) | None => {}
        }
    }
    Ok(count)
}

fn pack_of(suspect: &Suspect) -> Option<ContentDigest> {
    match suspect {
        Suspect::Pack(pack) => Some(*pack),
        _ => None,
    }
}

/// Which of `packs` layers or startup tables refer to. Reads indexes until all packs are accounted for.
fn packs_in_use(
    publisher: &Publisher,
    catalogue: &Catalogue,
    packs: &HashSet<ContentDigest>,
) -> Result<HashSet<ContentDigest>> {
    let startups = catalogue.startups().map(|startup| startup.pack).filter(|pack| packs.contains(pack));
    let mut used: HashSet<ContentDigest> = startups.collect();
    if packs.is_empty() {
        return Ok(used);
    }
    for diff_id in publisher.store().survey()?.layers {
        if used.len() == packs.len() {
            break;
        }
        let Ok(index) = publisher.store().index(&diff_id) else { continue };
        let of_layer = (0..index.pack_count()).filter_map(|number| index.pack(number).ok());
        used.extend(of_layer.filter(|pack| packs.contains(pack)));
    }
    Ok(used)
}
