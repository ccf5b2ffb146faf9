"""Files, records and locks of a run: nothing that was reported as done is ever lost."""
