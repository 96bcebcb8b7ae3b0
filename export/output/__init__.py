"""What an export writes: the bundle, its report, files for other runtimes."""
