"""The memory of a sweep: one study on disk with all its trials, from which everything else is worked out."""
