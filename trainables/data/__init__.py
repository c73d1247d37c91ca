"""From a folder or a URI to labelled, presized images. Imports no torch."""
