"""What other runtimes read: one file for each format."""
