"""Ray: connecting to it, its resources, and how many trials run at once."""
