"""What the machine lends: cores, memory, lines of the log."""
