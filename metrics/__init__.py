"""Feature detectors, streamed statistics, distances and per-source reports."""
