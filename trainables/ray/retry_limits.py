"""The limits of all retries."""

MAX_TRIES = 3
"""Losses of its workers after which a command fails its trial."""
MAX_LOST_NODES = 10
"""The same for losses together with a node, which on preemptible machines happen to good trials as well."""
MAX_START_FAILURES = 10
"""Failed starts of its workers after which a group ends."""
MAX_HOSTS = 3
"""Worker groups lost in one epoch, on nodes that are still alive, after which a trial fails."""
ACTOR_RETRIES = 2
"""Restarts by Tune of a trial whose own actor is lost."""
MAX_CONSECUTIVE_FAILURES = 5
"""Consecutive failed trials that abort the search."""
