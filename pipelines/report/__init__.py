"""What is said about a run: reports over its tables, and its score against a known truth."""
