"""Fetches weights from timm's hub into its cache, as a child process of `pretrained_weights.require_weights`."""

import os
import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies

from trainables.network.pretrained_weights import no_weights_message


def main() -> None:
    """Fetches the weights of the architectures that the arguments name."""
    unreachable = _hub_unreachable()
    if unreachable:
        # The hub's client would retry for most of a minute. Offline, it only looks into its cache.
        os.environ["HF_HUB_OFFLINE"] = "1"
    import timm

    from trainables.network.model import check_architecture

    for arch in sys.argv[1:]:
        try:
            check_architecture(arch)
            timm.create_model(arch, pretrained=True)
        except ValueError as error:
            print(error)
            sys.exit(2)
        except Exception as error:  # the hub's clients raise many kinds; the message names it
            print(no_weights_message(arch, unreachable or error))
            sys.exit(2)


def _hub_unreachable() -> OSError | None:
    if getproxies().get("https"):
        return None  # the proxy resolves names
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return OSError(f"{host} cannot be resolved ({error.strerror})")
    return None


if __name__ == "__main__":
    main()
