"""From what an adapter read to one record: captions, tags, dates, what is to be remarked."""
