"""Many runs: comparisons, pictures, the command line."""
