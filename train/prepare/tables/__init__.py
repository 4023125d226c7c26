"""The tables between the steps: schemas, units of work, workers, quarantine."""
