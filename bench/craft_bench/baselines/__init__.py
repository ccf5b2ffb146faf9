"""What others do, written from what is known of it, so that one run on one card can compare: no code is copied."""
