"""What runs a scan: collecting it, its dictionary, its slices, their deadlines."""
