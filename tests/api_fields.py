"""What the APIs behind the cluster files call their fields, and what a file has that they do not."""

from typing import Any


def wrong_fields(value: Any, kind: Any, kinds: dict[str, dict], path: str = "") -> list[str]:
    """Where `value` differs from `kind`, a line each; none where all is right.

    A kind is a Python type, `object` for anything, `[kind]` for a list, `{str: kind}` for a mapping with names of its
    own, or the name of one in `kinds`: a mapping with these fields only, where `!` marks those that it cannot lack.
    """
    if isinstance(kind, list):
        if not isinstance(value, list):
            return [f"{path}: a list, not {value!r}"]
        return [wrong for i, one in enumerate(value) for wrong in wrong_fields(one, kind[0], kinds, f"{path}[{i}]")]
    if not isinstance(kind, str | dict):
        return [] if kind is object or type(value) is kind else [f"{path}: {kind.__name__}, not {value!r}"]
    if not isinstance(value, dict):
        return [f"{path}: a mapping, not {value!r}"]
    if isinstance(kind, dict):
        return [wrong for name, one in value.items() for wrong in wrong_fields(one, kind[str], kinds, f"{path}.{name}")]
    fields = {name.removesuffix("!"): one for name, one in kinds[kind].items()}
    lacking = {name[:-1] for name in kinds[kind] if name.endswith("!")} - value.keys()
    return [
        *(f"{path}.{name}: {kind} has no such field" for name in value if name not in fields),
        *(f"{path}.{name}: missing" for name in sorted(lacking)),
        *(
            wrong
            for name, one in value.items()
            if name in fields
            for wrong in wrong_fields(one, fields[name], kinds, f"{path}.{name}")
        ),
    ]


def mappings(value: Any, kind: Any, kinds: dict[str, dict], path: tuple = ()) -> list[tuple]:
    """The paths of all mappings in `value` whose fields `kinds` has."""
    if isinstance(kind, list):
        return [found for i, one in enumerate(value) for found in mappings(one, kind[0], kinds, (*path, i))]
    if not isinstance(kind, str):
        return []
    fields = {name.removesuffix("!"): one for name, one in kinds[kind].items()}
    inner = (mappings(one, fields[name], kinds, (*path, name)) for name, one in value.items() if name in fields)
    return [path, *(found for one in inner for found in one)]


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def _any(names: str) -> dict[str, type]:
    return dict.fromkeys(names.split(), object)


GCE = {
    # https://cloud.google.com/compute/docs/reference/rest/v1/instances/insert
    "Instance": _any("confidentialInstanceConfig deletionProtection description hostname reservationAffinity tags")
    | {
        "machineType!": str,
        "minCpuPlatform": str,
        "labels": {str: str},
        "disks!": ["AttachedDisk"],
        "guestAccelerators": ["AcceleratorConfig"],
        "metadata": "Metadata",
        "networkInterfaces": ["NetworkInterface"],
        "scheduling": "Scheduling",
        "serviceAccounts": ["ServiceAccount"],
    },
    "AttachedDisk": _any("deviceName diskEncryptionKey diskSizeGb index interface mode source")
    | {"boot!": bool, "autoDelete!": bool, "type": str, "initializeParams!": "AttachedDiskInitializeParams"},
    "AttachedDiskInitializeParams": _any("diskName labels provisionedIops provisionedThroughput sourceSnapshot")
    | {"diskSizeGb!": int, "diskType!": str, "sourceImage!": str},
    "AcceleratorConfig": {"acceleratorType!": str, "acceleratorCount!": int},
    "Metadata": {"items!": ["MetadataItem"]},
    "MetadataItem": {"key!": str, "value!": str},
    "NetworkInterface": _any("accessConfigs aliasIpRanges network networkIP nicType stackType subnetwork"),
    "Scheduling": _any("maxRunDuration minNodeCpus nodeAffinities preemptible terminationTime")
    | {
        "automaticRestart": bool,
        "instanceTerminationAction": str,
        "onHostMaintenance": str,
        "provisioningModel": str,
    },
    "ServiceAccount": {"email!": str, "scopes!": [str]},
}

KUBERAY = {
    # https://ray-project.github.io/kuberay/reference/api/, KubeRay 1.6
    "RayCluster": {"apiVersion!": str, "kind!": str, "metadata!": "ObjectMeta", "spec!": "RayClusterSpec"},
    "RayClusterSpec": _any("gcsFaultToleranceOptions headServiceAnnotations managedBy suspend upgradeStrategy")
    | {
        "authOptions": "AuthOptions",
        "autoscalerOptions": "AutoscalerOptions",
        "enableInTreeAutoscaling": bool,
        "headGroupSpec!": "HeadGroupSpec",
        "rayVersion": str,
        "workerGroupSpecs": ["WorkerGroupSpec"],
    },
    "AuthOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "AutoscalerOptions": _any("args command env envFrom image imagePullPolicy resources securityContext volumeMounts")
    | {"idleTimeoutSeconds": int, "upscalingMode": str, "version": str},
    "HeadGroupSpec": _any("enableIngress headService labels resources serviceType")
    | {"rayStartParams": {str: str}, "template!": "PodTemplateSpec"},
    "WorkerGroupSpec": _any("labels numOfHosts resources scaleStrategy suspend")
    | {
        "groupName!": str,
        "idleTimeoutSeconds": int,
        "maxReplicas!": int,
        "minReplicas!": int,
        "rayStartParams": {str: str},
        "replicas": int,
        "template!": "PodTemplateSpec",
    },
    "RayJob": {"apiVersion!": str, "kind!": str, "metadata!": "ObjectMeta", "spec!": "RayJobSpec"},
    "RayJobSpec": _any("clusterSelector deletionStrategy jobId managedBy metadata submitterConfig submitterPodTemplate")
    | {
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "entrypoint": str,
        "entrypointNumCpus": float,
        "entrypointNumGpus": float,
        "entrypointResources": str,
        "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": str,
        "shutdownAfterJobFinishes": bool,
        "submissionMode": str,
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
    },
}

KUBERNETES = KUBERAY | {
    # https://kubernetes.io/docs/reference/kubernetes-api/
    "ObjectMeta": {"name": str, "namespace": str, "labels": {str: str}, "annotations": {str: str}},
    "Pod": {"apiVersion!": str, "kind!": str, "metadata!": "ObjectMeta", "spec!": "PodSpec"},
    "PodTemplateSpec": {"metadata": "ObjectMeta", "spec!": "PodSpec"},
    "PodSpec": _any("activeDeadlineSeconds affinity automountServiceAccountToken dnsConfig dnsPolicy hostNetwork")
    | _any("imagePullSecrets initContainers nodeName priorityClassName restartPolicy runtimeClassName schedulerName")
    | _any("serviceAccountName terminationGracePeriodSeconds topologySpreadConstraints")
    | {
        "containers!": ["Container"],
        "nodeSelector": {str: str},
        "securityContext": "PodSecurityContext",
        "tolerations": ["Toleration"],
        "volumes": ["Volume"],
    },
    "PodSecurityContext": _any("fsGroupChangePolicy runAsNonRoot seccompProfile supplementalGroups")
    | {"fsGroup": int, "runAsGroup": int, "runAsUser": int},
    "Container": _any(
        "args envFrom imagePullPolicy lifecycle livenessProbe readinessProbe securityContext startupProbe"
    )
    | {
        "command": [str],
        "env": ["EnvVar"],
        "image!": str,
        "name!": str,
        "ports": ["ContainerPort"],
        "resources": "ResourceRequirements",
        "volumeMounts": ["VolumeMount"],
        "workingDir": str,
    },
    "EnvVar": {"name!": str, "value": str, "valueFrom": object},
    "ContainerPort": {"containerPort!": int, "name": str, "protocol": str},
    "ResourceRequirements": {"limits": {str: str}, "requests": {str: str}},
    "VolumeMount": {"name!": str, "mountPath!": str, "readOnly": bool, "subPath": str},
    "Toleration": {"key": str, "operator": str, "value": str, "effect": str, "tolerationSeconds": int},
    "Volume": _any("configMap csi ephemeral hostPath nfs projected secret")
    | {
        "name!": str,
        "downwardAPI": "DownwardAPIVolumeSource",
        "emptyDir": "EmptyDirVolumeSource",
        "persistentVolumeClaim": "PersistentVolumeClaimVolumeSource",
    },
    "DownwardAPIVolumeSource": {"items!": ["DownwardAPIVolumeFile"], "defaultMode": int},
    "DownwardAPIVolumeFile": {"path!": str, "fieldRef": "ObjectFieldSelector", "mode": int},
    "ObjectFieldSelector": {"fieldPath!": str, "apiVersion": str},
    "EmptyDirVolumeSource": {"medium": str, "sizeLimit": str},
    "PersistentVolumeClaimVolumeSource": {"claimName!": str, "readOnly": bool},
    "PersistentVolumeClaim": {
        "apiVersion!": str,
        "kind!": str,
        "metadata!": "ObjectMeta",
        "spec!": "PersistentVolumeClaimSpec",
    },
    "PersistentVolumeClaimSpec": _any("dataSource selector volumeMode volumeName")
    | {"accessModes!": [str], "resources!": "ResourceRequirements", "storageClassName": str},
}
