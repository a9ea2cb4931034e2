"""The package by which Siemens' OpenRecon platform installs whorl on a scanner."""
