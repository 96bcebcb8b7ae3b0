"""The output of an export: the bundle, its report, files for other runtimes."""
