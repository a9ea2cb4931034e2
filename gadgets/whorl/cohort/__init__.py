"""Many scans over many workers: what is to be done, each scan's work, the cluster, the summary."""
