"""A head computed on the features of a frozen backbone, which are kept for all trainings with that backbone."""
