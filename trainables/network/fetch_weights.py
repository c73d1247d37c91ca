"""Fetches weights from timm's hub into its cache, as a child process of `pretrained_weights.without_weights`."""

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

from trainables.network.pretrained_weights import no_weights_message

ANSWER_SECONDS = 10.0
"""How long the hub may take to answer at all."""


def main() -> None:
    """Fetches the weights of the architectures that the arguments name; prints the problems of the others as JSON."""
    unreachable = hub_unreachable()
    if unreachable:
        # The hub's client would retry for most of a minute, for each of them. Offline, it only looks into its cache.
        os.environ["HF_HUB_OFFLINE"] = "1"
    import timm

    from trainables.network.model import check_architecture

    problems = {}
    for arch in sys.argv[1:]:
        try:
            check_architecture(arch)
            timm.create_model(arch, pretrained=True)
        except ValueError as error:
            problems[arch] = str(error)
        except Exception as error:  # the hub's clients raise many kinds; the message names it
            problems[arch] = no_weights_message(arch, unreachable or error)
    print(json.dumps(problems))


def hub_unreachable() -> OSError | None:
    """Why the hub does not answer, or None if it does, be it with an error."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        # The hub's client may trust other certificates than Python does.
        return None if isinstance(reason, ssl.SSLError) else OSError(f"{hub} does not answer ({reason})")
    return None


if __name__ == "__main__":
    main()
