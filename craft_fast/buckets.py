"""Aspect-ratio buckets: which size a picture is trained at. Pure arithmetic."""
