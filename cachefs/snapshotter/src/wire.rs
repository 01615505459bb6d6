//! The messages and the service, as generated from `proto/`.

#![expect(missing_docs, clippy::too_many_lines, reason = "generated; the wire contract is containerd's")]

/// Package `containerd.types`.
pub mod containerd {
    /// Types.
    pub mod types {
        tonic::include_proto!("containerd.types");
    }
    /// Services.
    pub mod services {
        /// The snapshots service.
        pub mod snapshots {
            /// Its first version.
            pub mod v1 {
                tonic::include_proto!("containerd.services.snapshots.v1");
            }
        }
    }
}

pub use containerd::services::snapshots::v1::*;
pub use containerd::types::Mount;
