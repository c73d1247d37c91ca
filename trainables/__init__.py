"""One trial: the recipe, the training loop and the warm workers that run it."""

from trainables.system.machine import ensure_home

ensure_home()
