//! A store like that of a large site: images of twenty layers each, none of them shared, written by the store's own publisher.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use store::catalogue::Change;
use store::image::{ImageRecord, LayerRecord, Platform, RequestedBy};
use store::layer::{self, FileContent, LayerFacts, LayerTree, Metadata, NodeKind, PieceSource, ROOT};
use store::pack::PackWriter;
use store::publisher::{Publisher, create, write_synced};
use store::recipe::RecipeWriter;
use store::{ContentDigest, Digest, chunk};

/// Layers of each image.
pub(crate) const LAYERS: usize = 20;
/// Images of each repository.
const TAGS: usize = 10;
/// Images published in one generation of the catalogue.
const TOGETHER: usize = 100;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The name of image `number`.
pub(crate) fn name(number: usize) -> String {
    format!("{}:v{}", repository(number), number % TAGS)
}

fn repository(number: usize) -> String {
    format!("registry.example.com/team{}/app{}", number / TAGS % 50, number / TAGS)
}

/// Publishes a layer of one file.
fn layer(publisher: &Publisher, image: usize, position: usize) -> Result<LayerRecord> {
    let content = format!("layer {position} of image {image}\n").into_bytes();
    let staging = publisher.stage()?;
    let mut pack = PackWriter::create(&staging.pack())?;
    let placed = pack.append(&chunk::compress(&content)?)?;
    let pack = pack.finish()?;
    let recipe = RecipeWriter::new(Vec::new())?.finish()?;
    write_synced(&staging.recipe(), &recipe)?;
    let mut tree = LayerTree::new();
    let digest = ContentDigest::of(&content);
    let pieces = vec![PieceSource::Chunk { chunk: 0, start: 0 }];
    let file = FileContent { digest, size: content.len() as u64, pieces };
    tree.insert(ROOT, b"file", Metadata::default(), NodeKind::File(file));
    let diff_id = Digest::of(&content);
    let (recipe_len, recipe_digest) = (recipe.len() as u64, ContentDigest::of(&recipe));
    let facts = LayerFacts { diff_id, tar_size: 10_240, recipe_len, recipe_digest };
    let index = tree.encode(&facts, &[placed.in_pack(pack)])?;
    write_synced(&staging.index(), &layer::seal(&index)?)?;
    publisher.publish_layer(staging, &diff_id, Some(&pack))?;
    let blob = Digest::of(format!("blob of {diff_id}").as_bytes());
    Ok(LayerRecord { diff_id, size: 10_240, blob, blob_size: 4_096, media_type: LAYER_TYPE.to_owned() })
}

/// Publishes the layers and blobs of image `number`. Its name is not in the catalogue yet.
fn image(publisher: &Publisher, number: usize) -> Result<ImageRecord> {
    let layers = (0..LAYERS).map(|position| layer(publisher, number, position)).collect::<Result<Vec<_>>>()?;
    let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let platform = Platform::host();
    let config = json!({
        "os": platform.os,
        "architecture": platform.architecture,
        "config": { "Cmd": ["/file"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = config.to_string().into_bytes();
    let descriptor = |media_type: &str, digest: &Digest, size: u64| json!({ "mediaType": media_type, "digest": digest.to_string(), "size": size });
    let config_digest = Digest::of(&config);
    let of_layers: Vec<_> = layers.iter().map(|l| descriptor(&l.media_type, &l.blob, l.blob_size)).collect();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config_digest, config.len() as u64),
        "layers": of_layers,
    });
    let manifest = manifest.to_string().into_bytes();
    let manifest_digest = Digest::of(&manifest);
    publisher.put_blob(&config_digest, &config)?;
    publisher.put_blob(&manifest_digest, &manifest)?;
    Ok(ImageRecord {
        repository: repository(number),
        tag: Some(format!("v{}", number % TAGS)),
        target: manifest_digest,
        manifest: manifest_digest,
        media_type: MANIFEST_TYPE.to_owned(),
        config: config_digest,
        platform,
        layers,
        published_at: 1_700_000_000 + number as u64,
        ordered_by: RequestedBy::Operator,
    })
}

/// Creates a store of `images` images at `root`.
pub(crate) fn build(root: &Path, images: usize) -> Result<()> {
    std::fs::create_dir(root).with_context(|| format!("cannot create {}", root.display()))?;
    create(root)?;
    let publisher = Publisher::open(root, "bench")?;
    for first in (0..images).step_by(TOGETHER) {
        let numbers = first..images.min(first + TOGETHER);
        let changes = numbers.map(|number| Ok(Change::Set(image(&publisher, number)?.into())));
        publisher.commit(changes.collect::<Result<Vec<_>>>()?)?;
    }
    publisher.release()?;
    Ok(())
}
