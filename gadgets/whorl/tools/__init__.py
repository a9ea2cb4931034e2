"""What a person looks at: inspection, comparison, demo, report on a dictionary."""
