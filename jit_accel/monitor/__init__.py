"""Metrics, signs of trouble, log, progress and trackers of a run."""
