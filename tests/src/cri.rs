//! A client of Kubernetes' container runtime interface, as a kubelet is one.

use std::path::Path;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

#[expect(unreachable_pub, reason = "generated; the contract is Kubernetes'")]
mod wire {
    tonic::include_proto!("runtime.v1");
}

use wire::image_service_client::ImageServiceClient;
use wire::runtime_service_client::RuntimeServiceClient;
use wire::{
    ContainerConfig, ContainerMetadata, CreateContainerRequest, ExecSyncRequest, IdMapping, ImageFsInfoRequest,
    ImageSpec, LinuxContainerConfig, LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    ListImagesRequest, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PullImageRequest,
    RemoveContainerRequest, RemoveImageRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest, UserNamespace,
};

/// Connects to a gRPC service on a socket.
pub async fn connect(socket: &Path) -> Result<Channel> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    endpoint.connect_with_connector(connector).await.with_context(|| format!("cannot connect to {}", socket.display()))
}

/// A connection to a container runtime.
#[derive(Debug)]
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    /// Its id.
    pub id: String,
    config: PodSandboxConfig,
    namespaces: NamespaceOption,
}

fn host_network() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        userns_options: None,
    }
}

/// A network and users of the pod's own; its root is the node's user `root`.
fn own_users(root: u32) -> NamespaceOption {
    let all = IdMapping { host_id: root, container_id: 0, length: 65536 };
    let users = UserNamespace { mode: NamespaceMode::Pod.into(), uids: vec![all], gids: vec![all] };
    NamespaceOption { network: NamespaceMode::Pod.into(), userns_options: Some(users), ..host_network() }
}

fn spec(image: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: image.to_owned() })
}

impl Cri {
    /// Connects to the runtime behind a socket.
    pub fn connect(socket: &Path) -> Result<Cri> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let channel = runtime.block_on(connect(socket))?;
        Ok(Cri { runtime, channel })
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }

    fn tasks(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    /// Pulls an image; returns its id.
    pub fn pull(&self, image: &str) -> Result<String> {
        let request = PullImageRequest { image: spec(image), sandbox_config: None };
        let mut images = self.images();
        let pulled = self.runtime.block_on(images.pull_image(request));
        Ok(pulled.with_context(|| format!("cannot pull {image}"))?.into_inner().image_ref)
    }

    /// The names of all images.
    pub fn list(&self) -> Result<Vec<String>> {
        let mut images = self.images();
        let listed = self.runtime.block_on(images.list_images(ListImagesRequest {}))?.into_inner();
        Ok(listed.images.into_iter().flat_map(|image| image.repo_tags).collect())
    }

    /// Removes an image.
    pub fn remove_image(&self, image: &str) -> Result<()> {
        let mut images = self.images();
        self.runtime.block_on(images.remove_image(RemoveImageRequest { image: spec(image) }))?;
        Ok(())
    }

    /// The directory that a kubelet looks at to know how full the disk of images is.
    pub fn image_directory(&self) -> Result<String> {
        let mut images = self.images();
        let told = self.runtime.block_on(images.image_fs_info(ImageFsInfoRequest {}))?.into_inner();
        let directory = told.image_filesystems.into_iter().find_map(|usage| Some(usage.fs_id?.mountpoint));
        directory.context("no file system of images is told")
    }

    /// Starts an empty pod that shares the node's network and users.
    pub fn pod(&self, name: &str) -> Result<Pod> {
        self.pod_with(name, host_network())
    }

    /// Starts an empty pod with a network and users of its own: `hostUsers: false`. Its root is the node's user `root`.
    pub fn pod_with_own_users(&self, name: &str, root: u32) -> Result<Pod> {
        self.pod_with(name, own_users(root))
    }

    fn pod_with(&self, name: &str, namespaces: NamespaceOption) -> Result<Pod> {
        let metadata = PodSandboxMetadata { name: name.into(), uid: name.into(), namespace: "test".into(), attempt: 0 };
        let security = LinuxSandboxSecurityContext { namespace_options: Some(namespaces.clone()) };
        let linux = LinuxPodSandboxConfig { cgroup_parent: String::new(), security_context: Some(security) };
        let config = PodSandboxConfig { metadata: Some(metadata), linux: Some(linux), ..PodSandboxConfig::default() };
        let mut tasks = self.tasks();
        let run = tasks.run_pod_sandbox(RunPodSandboxRequest { config: Some(config.clone()) });
        let id =
            self.runtime.block_on(run).with_context(|| format!("cannot start pod {name}"))?.into_inner().pod_sandbox_id;
        Ok(Pod { id, config, namespaces })
    }

    /// Starts a container in a pod; returns its id.
    pub fn run(&self, pod: &Pod, name: &str, image: &str, command: &[&str]) -> Result<String> {
        let security = LinuxContainerSecurityContext { namespace_options: Some(pod.namespaces.clone()) };
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: spec(image),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            linux: Some(LinuxContainerConfig { security_context: Some(security) }),
            ..ContainerConfig::default()
        };
        let create = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config),
            sandbox_config: Some(pod.config.clone()),
        };
        let mut tasks = self.tasks();
        self.runtime.block_on(async {
            let made = tasks.create_container(create).await.with_context(|| format!("cannot make container {name}"))?;
            let container_id = made.into_inner().container_id;
            let start = StartContainerRequest { container_id: container_id.clone() };
            tasks.start_container(start).await.with_context(|| format!("cannot start container {name}"))?;
            Ok(container_id)
        })
    }

    /// Runs a command in a container; returns its exit code and its standard output.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<(i32, String)> {
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = ExecSyncRequest { container_id: container.to_owned(), cmd, timeout: 60 };
        let mut tasks = self.tasks();
        let ran = self.runtime.block_on(tasks.exec_sync(request))?.into_inner();
        Ok((ran.exit_code, String::from_utf8_lossy(&ran.stdout).into_owned()))
    }

    /// Stops and removes a container.
    pub fn remove(&self, container: &str) -> Result<()> {
        let container_id = container.to_owned();
        let mut tasks = self.tasks();
        self.runtime.block_on(async {
            tasks.stop_container(StopContainerRequest { container_id: container_id.clone(), timeout: 0 }).await?;
            tasks.remove_container(RemoveContainerRequest { container_id }).await?;
            Ok(())
        })
    }

    /// Stops and removes a pod with its containers.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        let pod_sandbox_id = pod.id.clone();
        let mut tasks = self.tasks();
        self.runtime.block_on(async {
            tasks.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() }).await?;
            tasks.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await?;
            Ok(())
        })
    }
}
