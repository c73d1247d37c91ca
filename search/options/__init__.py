"""What a search is asked for, and the checks that need no Ray."""
