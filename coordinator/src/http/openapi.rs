//! The OpenAPI description, derived from the handlers and the messages.

use axum::Json;
use http::StatusCode;
use utoipa::openapi::RefOr;
use utoipa::openapi::path::Operation;
use utoipa::{Modify, OpenApi};

use crate::http::handlers::events;
use crate::http::handlers::export;
use crate::http::handlers::fsck;
use crate::http::handlers::garbage;
use crate::http::handlers::hosts;
use crate::http::handlers::images;
use crate::http::handlers::jobs;
use crate::http::handlers::load;
use crate::http::handlers::metrics;
use crate::http::handlers::mirror;
use crate::http::handlers::profiles;
use crate::http::handlers::schedules;
use crate::http::handlers::settings;
use crate::http::handlers::status;
use crate::http::handlers::tokens;
use crate::http::handlers::wanted;

#[derive(OpenApi)]
#[openapi(
    info(title = "cachefs coordinator", description = "Images in a shared store: pulled once, served to many hosts."),
    modifiers(&Named),
    paths(
        document,
        status::version,
        status::status,
        images::list,
        images::detail,
        images::remove,
        images::wait,
        export::export,
        jobs::pull,
        jobs::list,
        jobs::detail,
        jobs::cancel,
        jobs::retry,
        load::load,
        metrics::metrics,
        garbage::status,
        garbage::collect,
        garbage::plan,
        garbage::policy,
        garbage::set_policy,
        garbage::pins,
        garbage::pin,
        garbage::unpin,
        profiles::trace,
        profiles::profile,
        mirror::version,
        mirror::answer,
        fsck::show,
        fsck::start,
        fsck::stop,
        schedules::list,
        schedules::add,
        schedules::detail,
        schedules::remove,
        schedules::pause,
        schedules::resume,
        schedules::run,
        schedules::plan,
        settings::present,
        settings::apply,
        settings::registries,
        wanted::wanted,
        wanted::hook,
        events::list,
        hosts::list,
        hosts::renew,
        hosts::release,
        tokens::list,
        tokens::create,
        tokens::revoke,
    )
)]
struct Description;

/// Names each operation by its method and path, because handlers of different subjects share names.
struct Named;

impl Modify for Named {
    fn modify(&self, description: &mut utoipa::openapi::OpenApi) {
        for (path, item) in &mut description.paths.paths {
            let words = path.trim_start_matches("/v1").split(|c: char| !c.is_ascii_alphanumeric());
            let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
            let operations = [
                ("get", &mut item.get),
                ("put", &mut item.put),
                ("post", &mut item.post),
                ("delete", &mut item.delete),
            ];
            for (method, operation) in operations {
                if let Some(operation) = operation {
                    operation.operation_id = Some(format!("{method}_{}", words.join("_")));
                    describe_responses(operation);
                }
            }
        }
    }
}

/// Describes each response that says nothing itself by its status: the specification requires a description.
fn describe_responses(operation: &mut Operation) {
    for (status, response) in &mut operation.responses.responses {
        let reason = StatusCode::from_bytes(status.as_bytes()).ok().and_then(|status| status.canonical_reason());
        if let RefOr::T(response) = response
            && response.description.is_empty()
        {
            response.description = reason.unwrap_or(status).to_owned();
        }
    }
}

/// The OpenAPI description of this API.
#[utoipa::path(get, path = coordinator_api::route::OPENAPI, responses((status = 200, description = "This document")))]
pub async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(Description::openapi())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_description_and_the_router_name_the_same_routes() {
        let document = serde_json::to_value(Description::openapi()).unwrap();
        let described: BTreeSet<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, item)| item.as_object().unwrap().keys().map(|method| (path.clone(), method.clone())))
            .collect();
        let routed: BTreeSet<(String, String)> = crate::http::router::routes()
            .iter()
            .flat_map(|(path, methods, _)| {
                methods.iter().map(|(method, _)| (path.replace("{*", "{"), method.to_string()))
            })
            .collect();
        assert_eq!(described, routed);
    }

    /// Checks what a validator requires and what the derivation does not guarantee.
    #[test]
    fn the_description_is_whole() {
        let document = serde_json::to_value(Description::openapi()).unwrap();
        let mut operations = BTreeSet::new();
        for (path, item) in document["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let name = format!("{method} {path}");
                let id = operation["operationId"].as_str().unwrap();
                assert!(operations.insert(id.to_owned()), "{name}: operation {id} is described twice");
                let responses = operation["responses"].as_object().unwrap();
                assert!(responses.contains_key("200"), "{name} never succeeds");
                for (status, response) in responses {
                    assert!(response["description"].is_string(), "{name} {status} has no description");
                }
                let parameters = operation["parameters"].as_array().map_or(&[][..], Vec::as_slice);
                let named = |place: &str| -> BTreeSet<&str> {
                    let named = parameters.iter().filter(|parameter| parameter["in"] == place);
                    named.map(|parameter| parameter["name"].as_str().unwrap()).collect()
                };
                let in_path: BTreeSet<&str> =
                    path.split('{').skip(1).map(|rest| rest.split('}').next().unwrap()).collect();
                assert_eq!(named("path"), in_path, "{name}");
                for parameter in parameters {
                    assert!(parameter["schema"].is_object(), "{name}: {parameter}");
                    assert!(parameter["in"] != "path" || parameter["required"] == true, "{name}: {parameter}");
                }
            }
        }
    }

    #[test]
    fn every_message_that_is_referred_to_is_described() {
        let text = serde_json::to_string(&Description::openapi()).unwrap();
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        for reference in text.split("\"#/components/schemas/").skip(1) {
            let name = reference.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name}");
        }
    }
}
