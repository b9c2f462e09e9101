"""Many runs: sweeps, comparisons, their plots, the command line."""
