"""A study: a scan, or several of a patient, opened with a model; a single one, or many side by side."""
