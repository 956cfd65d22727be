"""What KubeRay 1.7's custom resources and the pods in them may say: unknown keys and wrong types are refused.

The custom resources' definitions are installed with the operator and in no Python package; these are their fields as
far as one would use them here. What one definition allows and another field forbids is in the validators.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.alias_generators import to_camel

Name = Annotated[str, StringConstraints(pattern=r"^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$")]
Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Count = Annotated[int, Field(ge=0)]
Port = Annotated[int, Field(ge=1, le=65535)]
Texts = dict[str, str]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Section):
    name: Name
    namespace: Name | None = None
    labels: Texts = {}
    annotations: Texts = {}


class PodMetadata(Section):
    labels: Texts = {}
    annotations: Texts = {}


class Named(Section):
    name: Name
    optional: bool = False


class Key(Section):
    name: Name
    key: str


class ValueFrom(Section):
    secret_key_ref: Key


class Variable(Section):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class VariablesFrom(Section):
    secret_ref: Named


class ContainerPort(Section):
    name: Name
    container_port: Port


class Resources(Section):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class Mount(Section):
    name: Name
    mount_path: str
    read_only: bool = False


class Container(Section):
    name: Name
    image: str
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    env: list[Variable] = []
    env_from: list[VariablesFrom] = []
    ports: list[ContainerPort] = []
    resources: Resources
    volume_mounts: list[Mount] = []

    @property
    def variables(self) -> Texts:
        return {variable.name: variable.value or "" for variable in self.env}


class EmptyDir(Section):
    medium: Literal["", "Memory"] = ""
    size_limit: Quantity


class Claim(Section):
    claim_name: Name


class Volume(Section):
    name: Name
    empty_dir: EmptyDir | None = None
    persistent_volume_claim: Claim | None = None

    @model_validator(mode="after")
    def _has_one_source(self) -> Volume:
        if (self.empty_dir is None) == (self.persistent_volume_claim is None):
            raise ValueError(f"volume {self.name} needs one source")
        return self


class Toleration(Section):
    key: str
    operator: Literal["Equal", "Exists"]
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSecurity(Section):
    run_as_non_root: bool
    run_as_user: Annotated[int, Field(ge=1)]
    run_as_group: Annotated[int, Field(ge=1)]
    fs_group: Annotated[int, Field(ge=1)]


class PodSpec(Section):
    restart_policy: Literal["Always", "OnFailure", "Never"]
    termination_grace_period_seconds: Count = 30
    service_account_name: Name | None = None
    security_context: PodSecurity
    node_selector: Texts = {}
    tolerations: list[Toleration] = []
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume] = []

    @model_validator(mode="after")
    def _mounts_have_volumes(self) -> PodSpec:
        volumes = [volume.name for volume in self.volumes]
        mounts = [mount.name for container in self.containers for mount in container.volume_mounts]
        if sorted(volumes) != sorted(set(mounts)):
            raise ValueError(f"volumes {volumes} but mounts of {mounts}")
        return self

    def volume_at(self, path: str) -> Volume:
        name = next(mount.name for mount in self.containers[0].volume_mounts if mount.mount_path == path)
        return next(volume for volume in self.volumes if volume.name == name)


class PodTemplate(Section):
    metadata: PodMetadata
    spec: PodSpec


class Head(Section):
    service_type: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None
    enable_ingress: bool = False
    ray_start_params: Texts
    resources: Texts = {}
    labels: Texts = {}
    template: PodTemplate


class WorkerGroup(Section):
    group_name: Name
    replicas: Count | None = None
    min_replicas: Count
    max_replicas: Count
    num_of_hosts: Annotated[int, Field(ge=1)] = 1
    idle_timeout_seconds: Count | None = None
    priority: int = 0
    resources: Texts = {}
    labels: Texts = {}
    suspend: bool = False
    ray_start_params: Texts
    template: PodTemplate

    @model_validator(mode="after")
    def _resources_are_said_once(self) -> WorkerGroup:
        said = {"num-cpus", "num-gpus", "memory", "resources"} & self.ray_start_params.keys()
        if self.resources and said:
            raise ValueError(f"group {self.group_name} has resources and rayStartParams {sorted(said)}")
        return self


class Autoscaler(Section):
    version: Literal["v1", "v2"]
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"]
    idle_timeout_seconds: Count
    image: str | None = None
    resources: Resources | None = None


class Auth(Section):
    mode: Literal["disabled", "token"]
    secret_name: Name | None = None


class ClusterSpec(Section):
    ray_version: str
    auth_options: Auth
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[WorkerGroup]
    suspend: bool = False


class RayCluster(Section):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Section):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    backoff_limit: Count = 0
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    pre_running_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: Count = 0
    runtime_env_yaml: Annotated[str | None, Field(alias="runtimeEnvYAML")] = None
    cluster_selector: Texts = {}
    suspend: bool = False
    ray_cluster_spec: ClusterSpec

    @model_validator(mode="after")
    def _clean_up_is_possible(self) -> JobSpec:
        if self.ttl_seconds_after_finished and not self.shutdown_after_job_finishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        return self


class RayJob(Section):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class ClaimResources(Section):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Section):
    access_modes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]]
    storage_class_name: str
    resources: ClaimResources


class PersistentVolumeClaim(Section):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


KINDS: dict[str, type[Section]] = {kind.__name__: kind for kind in (RayCluster, RayJob, PersistentVolumeClaim)}


def checked(manifest: dict[str, Any]) -> Any:
    """The manifest as a model of its kind."""
    return KINDS[manifest["kind"]].model_validate(manifest)
