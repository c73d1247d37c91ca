"""Search spaces: what a search varies, and the spaces that come with the project."""
