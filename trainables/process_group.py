"""How the workers of a group reach each other: on the address by which their node joined the cluster.

gloo listens on the address of the host name, which is 127.0.1.1 on many Linux systems (Debian's /etc/hosts): workers on
other machines wait for it in vain. NCCL looks at the network interfaces itself.
"""

import os
import socket
import struct
from dataclasses import dataclass

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

INTERFACE = "GLOO_SOCKET_IFNAME"


@dataclass
class NodeTorchConfig(TorchConfig):
    """Ray Train's, with gloo on the node's own address."""

    @property
    def backend_cls(self):
        return _NodeTorchBackend


class _NodeTorchBackend(_TorchBackend):
    def on_start(self, worker_group, backend_config: TorchConfig) -> None:
        worker_group.execute(use_node_interface)
        super().on_start(worker_group, backend_config)


def use_node_interface() -> None:
    """Tell gloo, in this worker, the interface to use; a user's own choice stays."""
    if INTERFACE not in os.environ and (name := interface_of(ray.util.get_node_ip_address())):
        os.environ[INTERFACE] = name


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an IPv4 address, or None where none has or the system is no Linux."""
    try:
        import fcntl
    except ImportError:
        return None
    get_address = 0x8915  # SIOCGIFADDR, see netdevice(7)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                found = fcntl.ioctl(probe, get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it is down, or has no such address
                continue
            if socket.inet_ntoa(found[20:24]) == address:
                return name
    return None
