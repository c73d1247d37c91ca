"""Ray: connecting to it, its resources, and the number of trials at once."""
