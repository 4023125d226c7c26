"""The report on a prepared set: numbers, captions, page."""
