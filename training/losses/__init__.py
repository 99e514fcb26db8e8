"""What is minimised, each loss alone."""
