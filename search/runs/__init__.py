"""The folder of one run: its files, how they are written and read back, and resuming."""
