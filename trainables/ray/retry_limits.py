"""How often something that failed is tried again before it fails what it belongs to."""

MAX_TRIES = 3
"""Losses of its workers after which a command fails its trial."""
MAX_LOST_NODES = 10
"""The same, counting losses together with their node: on preemptible machines these happen to good trials, too."""
MAX_START_FAILURES = 10
"""Failed starts of a group's workers after which the group is given up."""
MAX_HOSTS = 3
"""Worker groups lost within one epoch, their nodes alive, after which a trial fails."""
ACTOR_RETRIES = 2
"""Restarts by Tune of a trial whose own actor is lost."""
MAX_CONSECUTIVE_FAILURES = 5
"""Consecutive failed trials that abort the search."""
