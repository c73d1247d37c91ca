"""What a person sees of a search: live table, report, charts and test set."""
