"""Export to files that other runtimes read: one module for each format."""
